"""Questions whose answer is known: for tests, and to compare strategies. No model is run."""

import dataclasses

import numpy as np

from adaptive.search.visits import Visits


@dataclasses.dataclass(frozen=True)
class Planted:
  """A plan is right if it runs all `critical` layers, and those of `repeated` twice.

  The family is one of many, without noise, and layers do not stand in for each other: what it shows is a direction.
  """

  critical: frozenset[int]
  repeated: frozenset[int] = frozenset()

  def reward(self, visits: Visits) -> float:
    """1 where the plan is right, else 0."""
    kept = all(visits[layer] >= 1 for layer in self.critical)
    return float(kept and all(visits[layer] >= 2 for layer in self.repeated))

  def rewards(self, wanted: list[Visits]) -> list[float]:
    """Of several plans."""
    return [self.reward(visits) for visits in wanted]


def plant(num_layers: int, critical: int, repeated: int, rng: np.random.Generator) -> Planted:
  """A random one: so many layers are critical, and so many, critical or not, are to be repeated."""
  draw = lambda number: frozenset(map(int, rng.choice(num_layers, number, replace=False)))
  return Planted(draw(critical), draw(repeated))

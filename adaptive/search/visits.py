"""A plan: how often each layer of a model runs, layer after layer. Which plans there are, and what one action changes.

The actions and the limits are those of Dr.LLM's search (Heakl et al., arXiv 2510.12773): layers keep their
order, a run of one or two layers is skipped, a layer is repeated once more. Departure: a plan is the counts rather than
the path, since under these limits each tells the other; the path of a plan is never longer than twice the model.
"""

import dataclasses
import itertools
from collections.abc import Iterator

from adaptive.config import require

Visits = tuple[int, ...]  # how often each layer runs: 0 skips it, 1 is the model as it is, 2 repeats it

_SKIPPED_AT_ONCE = (1, 2)
_MOST_LAYERS = 8  # of which all plans are listed: 5,524 plans, and 2.9 times as many with every layer more


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a plan may be.

  Attributes:
    max_skips_in_a_row: consecutive layers that do not run. max_visits: of one layer.
  """

  max_skips_in_a_row: int = 2
  max_visits: int = 2

  def __post_init__(self):
    require(self.max_skips_in_a_row >= 0, f"max_skips_in_a_row={self.max_skips_in_a_row} must be at least 0")
    require(1 <= self.max_visits <= 255, f"max_visits={self.max_visits} must lie in 1 .. 255")


PUBLISHED = Limits()  # Dr.LLM's


def default(num_layers: int) -> Visits:
  """The model as it is: every layer once."""
  require(num_layers >= 1, f"num_layers={num_layers} must be at least 1")
  return (1,) * num_layers


def length(visits: Visits) -> int:
  """Layers that run one after the other, each as often as it does."""
  return sum(visits)


def allowed(visits: Visits, limits: Limits = PUBLISHED) -> bool:
  """Whether a plan keeps to the limits. The model as it is always does."""
  if not 0 <= min(visits) <= max(visits) <= limits.max_visits:
    return False
  # As bytes, because a search asks this some ten thousand times, and bytes are looked through at once.
  return bytes(limits.max_skips_in_a_row + 1) not in bytes(visits)


def edits(visits: Visits, limits: Limits = PUBLISHED) -> list[Visits]:
  """All allowed plans one action away: a run of one or two layers that run now is skipped, or a layer repeated.

  No action brings a skipped layer back, so that no sequence of actions comes back to a plan.
  """
  repeated = (_with(visits, layer, visits[layer] + 1) for layer in range(len(visits)) if visits[layer] > 0)
  return [plan for plan in itertools.chain(_skips(visits), repeated) if allowed(plan, limits)]


def shorter(visits: Visits, limits: Limits = PUBLISHED) -> list[Visits]:
  """All allowed plans one action away with fewer layers to run: a run skipped, or a repeated layer once less."""
  less = (_with(visits, layer, visits[layer] - 1) for layer in range(len(visits)) if visits[layer] > 1)
  return [plan for plan in itertools.chain(_skips(visits), less) if allowed(plan, limits)]


def _skips(visits: Visits) -> Iterator[Visits]:
  for run in _SKIPPED_AT_ONCE:
    for layer in range(len(visits) - run + 1):
      if all(visits[layer : layer + run]):
        yield (*visits[:layer], *(0,) * run, *visits[layer + run :])


def _with(visits: Visits, layer: int, count: int) -> Visits:
  return (*visits[:layer], count, *visits[layer + 1 :])


def every(num_layers: int, limits: Limits = PUBLISHED) -> Iterator[Visits]:
  """All allowed plans, each once.

  Raises:
    ConfigError: the model has more layers than can be searched through.
  """
  require(
    1 <= num_layers <= _MOST_LAYERS, f"all plans are listed of 1 to {_MOST_LAYERS} layers: num_layers={num_layers}"
  )
  counts = itertools.product(range(limits.max_visits + 1), repeat=num_layers)
  return (visits for visits in counts if allowed(visits, limits))

"""What a search has seen, how it asks for more, and what it found.

A search is a generator: it yields the plans that it wants evaluated and is sent their rewards, in 0 .. 1 and in the
same order. So it does not know who evaluates them, and whoever does can serve hundreds of searches with one batch
(`adaptive.search.driver`).
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable

from adaptive.config import require
from adaptive.search import visits as plans
from adaptive.search.visits import Visits


@dataclasses.dataclass(frozen=True)
class Found:
  """The best plan of a search.

  Attributes:
    visits: the plan of the highest reward; of several the one with the fewest layers to run, of those the first seen.
    reward: its own. default_reward: that of the model as it is. evaluations: distinct plans that were asked for.
  """

  visits: Visits
  reward: float
  default_reward: float
  evaluations: int


Search = Generator[list[Visits], list[float], Found]
Asking = Generator[list[Visits], list[float], None]  # part of a search


class Memory:
  """Rewards by plan: none is asked for twice, and no more than the budget allows.

  Args:
    budget: distinct plans that may be evaluated, the model as it is among them.
  """

  def __init__(self, num_layers: int, budget: int):
    require(budget >= 1, f"a budget of {budget} evaluations must be at least 1")
    self.default, self.rewards = plans.default(num_layers), {}
    self._budget = budget

  @property
  def left(self) -> int:
    """Evaluations that the budget still allows."""
    return self._budget - len(self.rewards)

  def begin(self) -> Asking:
    """Asks for the model as it is, alone: what a search is for may hang on it."""
    yield from self.ask([self.default])

  def ask(self, wanted: Iterable[Visits]) -> Asking:
    """Asks for those of the plans that are not known yet, the first ones where the budget does not allow all.

    Raises:
      ConfigError: what comes back is not one reward in 0 .. 1 for each.
    """
    new = [visits for visits in dict.fromkeys(wanted) if visits not in self.rewards][: self.left]
    if not new:
      return
    rewards = yield new
    require(len(rewards) == len(new), f"{len(new)} plans were asked for, and {len(rewards)} rewards came back")
    for visits, reward in zip(new, map(float, rewards)):
      require(0 <= reward <= 1, f"the reward {reward:g} of a plan must lie in 0 .. 1")  # which NaN does not
      self.rewards[visits] = reward

  def best(self, goal: float = math.inf) -> Found:
    """Of what was seen. Never worse than the model as it is, which is the first thing seen.

    Where that reaches the goal, a longer plan is none, however much surer it is of the answer.
    """
    right, most = self.rewards[self.default] >= goal, plans.length(self.default)
    seen = [visits for visits in self.rewards if not right or plans.length(visits) <= most]
    best = min(seen, key=lambda visits: (-self.rewards[visits], plans.length(visits)))
    return Found(best, self.rewards[best], self.rewards[self.default], len(self.rewards))


def run(search: Search, evaluate: Callable[[list[Visits]], list[float]]) -> Found:
  """Drives one search to its end: `evaluate` gives the rewards of plans."""
  try:
    wanted = next(search)
    while True:
      wanted = search.send(evaluate(wanted))
  except StopIteration as end:
    return end.value

"""Strategies of searching for the best plan of one question, all called alike: see `Strategy` and the table below.

Which to take: where the model is right, shortening its plan step by step beats a tree by far, which spends itself on
lengthening plans and on wrong ones; where it is wrong, no step makes a plan both shorter and right. `find_then_shrink`
does the one, if it must, and then the other. `benchmarks/layer_search.py` compares them.
"""

from collections.abc import Callable

import numpy as np

from adaptive.config import require
from adaptive.search import visits as plans
from adaptive.search.mcts import Tree, mcts
from adaptive.search.memory import Asking, Memory, Search
from adaptive.search.visits import PUBLISHED, Limits, Visits

# (num_layers, budget, rng, limits=, goal=, ...) -> the search. `budget`: distinct plans that may be evaluated, the
# model as it is among them and first, alone. `rng`: all that the search draws comes from there. `goal`: a reward that
# is good enough, to those strategies that stop for it or change their ways. What a setting forbids is raised, as
# ConfigError, when the first plan is asked for.
Strategy = Callable[..., Search]

_IDLE_DRAWS = 1000  # in a row that show no new plan: there are hardly any left
_IDLE_DESCENTS = 10


def exhaustive(
  num_layers: int,
  budget: int,
  rng: np.random.Generator,
  limits: Limits = PUBLISHED,
  goal: float = 1.0,
  width: int = 256,
) -> Search:
  """All allowed plans, `width` at a time: what tests hold the others to.

  Raises:
    ConfigError: the model has more than 8 layers, or more plans than the budget allows to evaluate.
  """
  every = list(plans.every(num_layers, limits))
  require(budget >= len(every), f"{num_layers} layers have {len(every)} plans, more than the budget of {budget}")
  memory = Memory(num_layers, budget)
  yield from memory.begin()
  for start in range(0, len(every), width):
    yield from memory.ask(every[start : start + width])
  return memory.best(goal)


def random_edits(
  num_layers: int,
  budget: int,
  rng: np.random.Generator,
  limits: Limits = PUBLISHED,
  goal: float = 1.0,
  most: int = 4,
  width: int = 8,
) -> Search:
  """Plans that one to `most` random actions make of the model as it is, asked for `width` at a time."""
  memory = Memory(num_layers, budget)
  yield from memory.begin()
  while memory.left and (new := _draws(memory, rng, limits, most, min(width, memory.left))):
    yield from memory.ask(new)
  return memory.best(goal)


def _draws(memory: Memory, rng: np.random.Generator, limits: Limits, most: int, number: int) -> list[Visits]:
  """So many random plans that were not seen, some perhaps twice; fewer where they are hard to come by."""
  drawn, idle = [], 0
  while len(drawn) < number and idle < _IDLE_DRAWS:
    visits = memory.default
    for _ in range(rng.integers(1, most + 1)):
      near = plans.edits(visits, limits)
      visits = near[rng.integers(len(near))] if near else visits
    drawn, idle = ([*drawn, visits], 0) if visits not in memory.rewards else (drawn, idle + 1)
  return drawn


def hill_climb(
  num_layers: int,
  budget: int,
  rng: np.random.Generator,
  limits: Limits = PUBLISHED,
  goal: float = 1.0,
  start: Visits | None = None,
  width: int = 1,
) -> Search:
  """Shortens a plan action by action, as long as its reward holds; see `shrink`.

  Args:
    start: the model as it is, unless given. width: plans that are asked for at once.

  Raises:
    ConfigError: the limits forbid `start`, or it is a plan of another number of layers.
  """
  memory = Memory(num_layers, budget)
  start = memory.default if start is None else start
  fits = len(start) == num_layers and plans.allowed(start, limits)
  require(fits, f"start={start} is no plan of {num_layers} layers that {limits} allow")
  yield from memory.begin()
  yield from memory.ask([start])
  yield from shrink(memory, start, rng, limits, width)
  return memory.best(goal)


def shrink(memory: Memory, start: Visits, rng: np.random.Generator, limits: Limits, width: int = 1) -> Asking:
  """Goes from plan to shorter plan, until the budget is spent.

  A step tries the plans that are one action shorter in random order and goes to the first (of `width`, the best) whose
  reward is neither below that of the plan it leaves nor below the default's. Layers that could not go before, in this
  descent, are tried again last: what a plan needs, shorter plans mostly need too.

  Where no plan will do, the descent has ended, and another begins at `start`, in another order: limits on skips in a
  row, and layers that can stand in for each other, make many ends. What was seen before costs nothing. When 10 descents
  in a row saw nothing new, the search ends, whatever is left of the budget.

  A reward of 0 is no ground to go on: a plan that is as wrong as the last is no progress, so that of a model that is
  wrong the plans one action away are tried, and no others.
  """
  idle = 0
  while start in memory.rewards and memory.left and idle < _IDLE_DESCENTS:
    before = memory.left
    yield from _descent(memory, start, rng, limits, width)
    idle = 0 if memory.left < before else idle + 1


def _descent(memory: Memory, here: Visits, rng: np.random.Generator, limits: Limits, width: int) -> Asking:
  rewards, failed = memory.rewards, set()
  near = _promising_first(here, failed, rng, limits)
  while near:
    tried, near = near[:width], near[width:]
    yield from memory.ask(tried)
    floor = max(rewards[here], rewards[memory.default])
    better = [visits for visits in tried if _holds(rewards.get(visits, 0.0), floor)]
    failed |= {_changed(here, visits) for visits in tried if visits not in better}
    if better:
      here = max(better, key=lambda visits: (rewards[visits], -plans.length(visits)))
      near = _promising_first(here, failed, rng, limits)


def _promising_first(
  here: Visits, failed: set[frozenset[int]], rng: np.random.Generator, limits: Limits
) -> list[Visits]:
  """Plans one action shorter in random order, but those that change all layers of a change that failed come last."""

  def doubtful(visits: Visits) -> bool:
    layers = _changed(here, visits)
    return any(change <= layers for change in failed)

  near = plans.shorter(here, limits)
  return sorted((near[i] for i in rng.permutation(len(near))), key=doubtful)


def _changed(here: Visits, there: Visits) -> frozenset[int]:
  """Layers that do not run as often in the one plan as in the other."""
  return frozenset(layer for layer, (a, b) in enumerate(zip(here, there)) if a != b)


def _holds(reward: float, floor: float) -> bool:
  return reward > 0 and reward >= floor


def greedy(
  num_layers: int, budget: int, rng: np.random.Generator, limits: Limits = PUBLISHED, goal: float = 1.0
) -> Search:
  """Leaves out each layer once, in random order, and keeps it out where the reward holds: L + 1 evaluations at most.

  A layer that may not go, since its neighbours are out, stays. As in `shrink`, 0 holds nothing.
  """
  memory = Memory(num_layers, budget)
  yield from memory.begin()
  here = memory.default
  for layer in rng.permutation(num_layers):
    visits = (*here[:layer], 0, *here[layer + 1 :])
    if plans.allowed(visits, limits):
      yield from memory.ask([visits])
      here = visits if _holds(memory.rewards.get(visits, 0.0), memory.rewards[here]) else here
  return memory.best(goal)


def find_then_shrink(
  num_layers: int,
  budget: int,
  rng: np.random.Generator,
  limits: Limits = PUBLISHED,
  goal: float = 1.0,
  width: int = 1,
) -> Search:
  """Where the model misses the goal, a tree search to the first plan that reaches it; from there, `shrink`.

  A model that reaches the goal as it is costs no tree. One budget serves both.
  """
  memory = Memory(num_layers, budget)
  yield from memory.begin()
  if memory.rewards[memory.default] < goal:
    yield from Tree(memory, rng, limits).grow(goal)
  yield from shrink(memory, memory.best(goal).visits, rng, limits, width)
  return memory.best(goal)


STRATEGIES: dict[str, Strategy] = {
  "exhaustive": exhaustive,
  "random": random_edits,
  "hill_climb": hill_climb,
  "greedy": greedy,
  "mcts": mcts,
  "find_then_shrink": find_then_shrink,
}

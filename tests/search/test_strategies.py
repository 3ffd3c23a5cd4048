"""Strategies: what all of them keep to, what each does, and how they compare on planted questions."""

import functools
import itertools
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from recorded import watched, without_structure

from adaptive.config import ConfigError
from adaptive.search import visits as plans
from adaptive.search.memory import Memory, run
from adaptive.search.planted import Planted, plant
from adaptive.search.strategies import STRATEGIES
from adaptive.search.visits import Limits

LOOKING = sorted(set(STRATEGIES) - {"exhaustive"})
REWARDS = {
  "none": lambda visits: 0.0,
  "all": lambda visits: 1.0,
  "planted": Planted(frozenset([0, 2]), frozenset([1])).reward,
  "without structure": without_structure,
}


def rng(*seed):
  return np.random.default_rng(seed)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
  strategy=st.sampled_from(LOOKING),
  layers=st.integers(3, 9),
  budget=st.integers(1, 80),
  seed=st.integers(0, 1000),
  limits=st.builds(Limits, st.integers(0, 2), st.integers(1, 3)),
  reward=st.sampled_from(sorted(REWARDS)),
)
def test_what_every_search_keeps_to(strategy, layers, budget, seed, limits, reward):
  reward = REWARDS[reward]
  found, asked = watched(STRATEGIES[strategy](layers, budget, rng(seed), limits), reward)
  seen = list(itertools.chain(*asked))
  assert asked[0] == [plans.default(layers)]
  assert all(asked)  # no request is empty
  assert len(set(seen)) == len(seen) == found.evaluations <= budget
  assert all(len(visits) == layers and plans.allowed(visits, limits) for visits in seen)
  best = min(range(len(seen)), key=lambda i: (-reward(seen[i]), sum(seen[i]), i))
  assert (found.visits, found.reward, found.default_reward) == (seen[best], reward(seen[best]), reward(seen[0]))


@pytest.mark.parametrize("strategy", LOOKING)
def test_a_seed_is_a_search(strategy):
  requests = lambda seed: watched(STRATEGIES[strategy](12, 60, rng(seed)), without_structure)[1]
  assert requests(3) == requests(3)
  assert requests(3) != requests(4)


@pytest.mark.parametrize("strategy", ["random", "mcts"])
def test_the_whole_budget_is_used_where_there_are_plans_enough(strategy):
  assert run(STRATEGIES[strategy](28, 120, rng(0)), lambda wanted: [1.0] * len(wanted)).evaluations == 120


def test_exhaustive_sees_all_plans_in_chunks():
  _, asked = watched(STRATEGIES["exhaustive"](5, 222, rng(0), width=100), without_structure)
  assert sorted(itertools.chain(*asked)) == sorted(plans.every(5))
  assert asked[0] == [plans.default(5)]
  assert max(map(len, asked)) == 100


def test_exhaustive_needs_its_budget():
  with pytest.raises(ConfigError, match="5 layers have 222 plans, more than the budget of 221"):
    next(STRATEGIES["exhaustive"](5, 221, rng(0)))


@pytest.mark.parametrize("wrong", [[], [1.0, 1.0], [1.5], [-0.1], [float("nan")]])
def test_rewards_that_are_none(wrong):
  with pytest.raises(ConfigError, match="reward"):
    run(STRATEGIES["mcts"](4, 10, rng(0)), lambda wanted: wrong)


def test_a_budget_of_nothing():
  with pytest.raises(ConfigError, match="budget of 0"):
    next(STRATEGIES["greedy"](4, 0, rng(0)))


def test_of_equal_rewards_the_shortest_and_of_those_the_first():
  memory = Memory(3, 9)
  memory.rewards |= {(1, 1, 1): 0.5, (2, 1, 1): 0.9, (1, 1, 0): 0.9, (0, 1, 1): 0.9, (0, 0, 1): 0.4}
  assert memory.best().visits == (1, 1, 0)
  assert (memory.best().default_reward, memory.best().evaluations) == (0.5, 5)


def test_of_a_model_that_is_right_no_plan_is_longer():
  memory = Memory(3, 9)
  memory.rewards |= {(1, 1, 1): 0.6, (2, 1, 1): 0.9, (1, 1, 0): 0.7, (0, 1, 1): 0.5}
  assert memory.best(0.5).visits == (1, 1, 0)
  assert memory.best(0.8).visits == (2, 1, 1)
  surer = lambda visits: 0.5 + sum(visits) / 100
  for name in ("exhaustive", "mcts", "random"):
    found, _ = watched(STRATEGIES[name](4, 100, rng(0), goal=0.5), surer)
    assert found.visits == (1,) * 4


def test_the_default_stays_where_nothing_is_better():
  only = lambda visits: float(visits == (1,) * 8)
  for name in LOOKING:
    found, _ = watched(STRATEGIES[name](8, 100, rng(0)), only)
    assert (found.visits, found.reward) == ((1,) * 8, 1.0), name


def test_random_plans_are_a_few_actions_away():
  _, asked = watched(STRATEGIES["random"](28, 100, rng(0), most=2), without_structure)
  changed = [sum(count != 1 for count in visits) for visits in itertools.chain(*asked[1:])]
  assert set(changed) == {1, 2, 3, 4}  # two actions skip four layers at most


def test_greedy_tries_each_layer_once():
  task = Planted(frozenset([1, 4]))
  found, asked = watched(STRATEGIES["greedy"](6, 100, rng(0)), task.reward)
  assert len(asked) <= 7
  assert found.visits == (0, 1, 0, 0, 1, 0)
  found, asked = watched(STRATEGIES["greedy"](6, 100, rng(0)), lambda visits: 0.0)
  assert [plans.length(wanted[0]) for wanted in asked] == [6] + [5] * 6  # a wrong plan is not gone on from


@pytest.mark.parametrize("width", [1, 4])
def test_hill_climb_goes_from_its_start_down(width):
  start = (2, 1, 2, 1, 1, 1, 1, 1)
  task = Planted(frozenset([3, 6]), frozenset([0]))
  found, asked = watched(STRATEGIES["hill_climb"](8, 300, rng(1), start=start, width=width), task.reward)
  assert asked[:2] == [[plans.default(8)], [start]]
  assert max(map(len, asked)) == width
  assert all(visits[0] <= 2 and visits[2] <= 2 and max(visits[3:]) == 1 for visits in itertools.chain(*asked))
  assert found.visits == (2, 0, 0, 1, 0, 0, 1, 0)


def test_hill_climb_wants_an_allowed_start():
  for start in [(1, 1), (0, 0, 0, 1), (3, 1, 1, 1)]:
    with pytest.raises(ConfigError, match="is no plan of 4 layers"):
      next(STRATEGIES["hill_climb"](4, 10, rng(0), start=start))


def test_hill_climb_never_goes_on_from_a_worse_plan():
  asked = watched(STRATEGIES["hill_climb"](10, 400, rng(2)), without_structure)[1]
  seen = set(itertools.chain(*asked))
  floor = without_structure(plans.default(10))
  good = {visits for visits in seen if without_structure(visits) >= floor}
  reached = {there for visits in good for there in plans.shorter(visits)}
  assert seen <= reached | {plans.default(10)}


@pytest.mark.parametrize(("default", "start"), [(0.5, 0.75), (0.5, 0.25)])
def test_hill_climb_goes_below_neither_its_start_nor_the_default(default, start):
  """Plans without layer 0 are as good as the worse of the two, so nobody goes on from one."""
  worse = min(default, start)
  rewards = {(1,) * 6: default, (1, 2, 1, 1, 1, 1): start}
  reward = lambda visits: rewards.get(visits, worse if visits[0] == 0 else 0.0)
  search = STRATEGIES["hill_climb"](6, 100, rng(0), start=(1, 2, 1, 1, 1, 1))
  _, asked = watched(search, reward)
  assert (0, 2, 1, 1, 1, 1) in itertools.chain(*asked)
  near = {(1,) * 6, (1, 2, 1, 1, 1, 1), *plans.shorter((1, 2, 1, 1, 1, 1))}
  below = set(plans.shorter((1,) * 6)) if start < default else set()  # the way leads over the default, which will do
  assert set(itertools.chain(*asked)) <= near | below


def test_hill_climb_begins_anew_at_the_end_of_a_descent():
  """Skips in a row are limited: which of five useless layers went first decides how many may go."""
  task = Planted(frozenset([0, 6]))
  lengths = [plans.length(run(STRATEGIES["hill_climb"](7, 80, rng(seed)), task.rewards).visits) for seed in range(20)]
  assert set(lengths) == {3}


def test_find_then_shrink_builds_a_tree_only_where_the_model_is_wrong():
  right = Planted(frozenset(range(0, 28, 2)))
  _, asked = watched(STRATEGIES["find_then_shrink"](28, 100, rng(0)), right.reward)
  assert all(max(visits) == 1 for visits in itertools.chain(*asked))
  wrong = Planted(frozenset(range(0, 28, 2)), frozenset([4]))
  found, asked = watched(STRATEGIES["find_then_shrink"](28, 200, rng(0)), wrong.reward)
  first = next(i for i, (visits,) in enumerate(asked) if wrong.reward(visits))
  assert found.reward == 1.0
  assert plans.length(found.visits) < plans.length(asked[first][0])
  for (before,) in asked[first + 1 :]:
    assert all(a <= b for a, b in zip(before, asked[first][0]))


def test_the_room_does_not_wait_for_jax():
  code = "import sys, adaptive.search.driver, adaptive.search.strategies; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_find_then_shrink_stops_at_its_goal():
  """A reward of a half is what the goal asks for, so the plan that is wholly right is never looked for."""
  reward = lambda visits: 0.5 if visits[3] == 1 else float(visits[3] == 2)
  _, asked = watched(STRATEGIES["find_then_shrink"](12, 100, rng(0), goal=0.5), reward)
  assert all(visits[3] < 2 for visits in itertools.chain(*asked))
  assert run(STRATEGIES["find_then_shrink"](12, 100, rng(0)), lambda w: [*map(reward, w)]).reward == 1.0


@functools.cache
def planted(strategy, budget, critical, repeated):
  """Of 40 questions of a model with 28 layers: how many are solved, and mean layers saved of those."""
  found = [
    run(STRATEGIES[strategy](28, budget, rng(seed, 1)), plant(28, critical, repeated, rng(seed, 0)).rewards)
    for seed in range(40)
  ]
  saved = [28 - plans.length(one.visits) for one in found if one.reward == 1.0]
  return len(saved), float(np.mean(saved or [0]))


@pytest.mark.parametrize("critical", [18, 24])
@pytest.mark.parametrize("budget", [50, 200])
def test_where_the_model_is_right_shrinking_saves_at_least_twice_what_a_tree_saves(critical, budget):
  shrunk, tree = planted("find_then_shrink", budget, critical, 0), planted("mcts", budget, critical, 0)
  assert shrunk[0] == tree[0] == 40
  assert shrunk[1] >= 2 * tree[1] > 0
  assert planted("hill_climb", budget, critical, 0) == shrunk


@pytest.mark.parametrize(("budget", "least"), [(50, 12), (200, 30)])
def test_where_it_is_wrong_a_tree_solves_what_a_climb_cannot(budget, least):
  tree, climb = planted("mcts", budget, 18, 1)[0], planted("hill_climb", budget, 18, 1)[0]
  assert tree >= climb + least


def test_find_then_shrink_solves_as_many_as_a_tree_with_fewer_layers():
  both, tree = planted("find_then_shrink", 200, 18, 1), planted("mcts", 200, 18, 1)
  assert both[0] == tree[0]
  assert both[1] >= tree[1] + 4

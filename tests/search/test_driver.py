"""Side by side: each search finds what it finds alone, and all that they ask for is one batch."""

import functools
import itertools

import numpy as np
import pytest
from recorded import without_structure

from adaptive.config import ConfigError
from adaptive.search.driver import Progress, search_many
from adaptive.search.memory import run
from adaptive.search.planted import plant
from adaptive.search.strategies import STRATEGIES

NAMES = sorted(set(STRATEGIES) - {"exhaustive"})


def task(key):
  return plant(12, 6, key % 2, np.random.default_rng((key, 0)))


def begin(key, budget=None):
  """Questions of different strategies and budgets."""
  rng = np.random.default_rng((key, 1))
  return STRATEGIES[NAMES[key % len(NAMES)]](12, budget or 10 + 7 * (key % 9), rng)


def questions(number, budget=None):
  return [(key, functools.partial(begin, key, budget)) for key in range(number)]


def evaluate(asked):
  return [task(key).reward(visits) for key, visits in asked]


@pytest.mark.parametrize("width", [1, 4, 100])
def test_every_search_finds_what_it_finds_alone(width):
  found = list(search_many(questions(23), evaluate, width))
  assert len(found) == 23
  assert dict(found) == {key: run(begin(key), task(key).rewards) for key in range(23)}


def test_neighbours_change_nothing():
  alone = dict(search_many(questions(23)[7:8], evaluate, 4))
  assert alone[7] == dict(search_many(questions(23), evaluate, 4))[7]


def test_a_batch_holds_what_all_of_them_ask_for():
  batches = []

  def watched(asked):
    batches.append(asked)
    return evaluate(asked)

  found = dict(search_many(questions(10), watched, 4))
  assert [(key, sum(visits)) for key, visits in batches[0]] == [(0, 12), (1, 12), (2, 12), (3, 12)]
  assert all(1 <= len({key for key, _ in batch}) <= 4 for batch in batches)
  assert (
    len({one for batch in batches for one in batch})
    == sum(map(len, batches))
    == sum(one.evaluations for one in found.values())
  )
  # Places are filled as they become free: no batch but the last ones has one.
  kept = [len({key for key, _ in batch}) for batch in batches]
  last = next(i for i, batch in enumerate(batches) if 9 in {key for key, _ in batch})
  assert kept[:last] == [4] * last


def test_searches_begin_when_there_is_a_place_and_results_come_at_once():
  made, evaluated = [], []

  def source():
    for key in range(50):
      made.append(key)
      yield key, functools.partial(STRATEGIES["mcts"], 12, 1 if key == 1 else 30, np.random.default_rng(key))

  results = search_many(source(), lambda asked: evaluated.append(len(asked)) or evaluate(asked), width=3)
  assert made == []
  assert next(results)[0] == 1  # of one evaluation: while its neighbours go on
  assert evaluated == [3]
  assert made == [0, 1, 2]
  next(results)
  assert made == [0, 1, 2, 3]
  results.close()


def test_progress_is_told():
  told = []
  found = list(search_many(questions(9), evaluate, 4, told.append))
  assert told[-1] == Progress(9, 0, len(told), sum(one.evaluations for _, one in found))
  assert [one.batches for one in told] == list(range(1, len(told) + 1))
  assert all(a.ended <= b.ended and a.evaluations < b.evaluations for a, b in itertools.pairwise(told))
  assert max(one.running for one in told) == 4


def test_rewards_may_be_an_array():
  found = dict(search_many(questions(5), lambda asked: np.array(evaluate(asked), np.float32), 5))
  assert found == dict(search_many(questions(5), evaluate, 5))


def test_nothing_to_do():
  assert list(search_many([], evaluate, 4)) == []


def test_what_cannot_be():
  with pytest.raises(ConfigError, match="width=0"):
    next(search_many(questions(2), evaluate, 0))
  with pytest.raises(ConfigError, match="two searches have the key 0"):
    list(search_many([*questions(2), *questions(1)], evaluate, 1))
  with pytest.raises(ConfigError, match="3 plans were asked for, and 2 rewards came back"):
    list(search_many(questions(3), lambda asked: [1.0] * 2, 3))


def test_any_rewards_will_do():
  found = dict(search_many(questions(12), lambda asked: [without_structure(visits) for _, visits in asked], 6))
  assert {key: one.visits for key, one in found.items()} == {
    key: run(begin(key), lambda wanted: [*map(without_structure, wanted)]).visits for key in range(12)
  }

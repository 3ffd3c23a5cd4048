"""Plans: which are allowed, what one action makes of them, and that listing is complete."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from adaptive.config import ConfigError
from adaptive.search import visits as plans
from adaptive.search.visits import Limits

COUNTS = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple)
LIMITS = st.builds(Limits, st.integers(0, 3), st.integers(1, 3))


def longest_gap(visits):
  return max((len(list(run)) for skipped, run in itertools.groupby(visits, lambda n: n == 0) if skipped), default=0)


@hypothesis.given(COUNTS, LIMITS)
def test_allowed_is_what_the_limits_say(visits, limits):
  expected = longest_gap(visits) <= limits.max_skips_in_a_row and max(visits) <= limits.max_visits
  assert plans.allowed(visits, limits) == expected


def test_the_model_as_it_is():
  assert plans.default(4) == (1, 1, 1, 1)
  assert plans.length((0, 2, 1, 2)) == 5
  assert not plans.allowed((1, -1))
  with pytest.raises(ConfigError, match="num_layers=0"):
    plans.default(0)


def test_one_action_by_hand():
  skipped = {(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (0, 0, 1, 1), (1, 0, 0, 1), (1, 1, 0, 0)}
  repeated = {(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)}
  assert set(plans.edits((1, 1, 1, 1))) == skipped | repeated
  assert set(plans.shorter((1, 1, 1, 1))) == skipped
  # No third skip in a row, no third visit, no way back to a skipped layer; a repeated layer may go, or run once again.
  assert set(plans.edits((0, 0, 1, 2))) == {(0, 0, 2, 2), (0, 0, 1, 0)}
  assert set(plans.shorter((0, 0, 1, 2))) == {(0, 0, 1, 0), (0, 0, 1, 1)}


def test_a_root_has_about_three_actions_a_layer():
  assert len(plans.edits(plans.default(28))) == 28 + 27 + 28


@hypothesis.given(COUNTS, LIMITS)
def test_neighbours_are_allowed_distinct_and_one_action_away(visits, limits):
  hypothesis.assume(plans.allowed(visits, limits))
  near, less = plans.edits(visits, limits), plans.shorter(visits, limits)
  assert len(set(near)) == len(near)
  assert len(set(less)) == len(less)
  for there in {*near, *less}:
    changed = [layer for layer, (a, b) in enumerate(zip(visits, there)) if a != b]
    assert plans.allowed(there, limits)
    assert 1 <= len(changed) <= 2
    if len(changed) == 2:
      assert changed[1] == changed[0] + 1
      assert [there[layer] for layer in changed] == [0, 0]
    assert all(visits[layer] > 0 for layer in changed)
  assert all(plans.length(there) < plans.length(visits) for there in less)
  assert {there for there in near if plans.length(there) < plans.length(visits)} <= set(less)


@pytest.mark.parametrize("limits", [Limits(), Limits(1, 2), Limits(0, 1), Limits(2, 1), Limits(3, 3)])
def test_actions_lead_to_every_plan(limits):
  seen, border = {plans.default(5)}, {plans.default(5)}
  while border:
    border = {there for visits in border for there in plans.edits(visits, limits)} - seen
    seen |= border
  assert seen == set(plans.every(5, limits))


def test_every_plan_is_listed_once():
  # With at most two skips in a row, a plan ends with no, one or two of them after one of two counts.
  numbers = [1, 3, 9]
  for _ in range(6):
    numbers.append(2 * sum(numbers[-3:]))
  for layers in range(1, 9):
    every = list(plans.every(layers))
    assert len(set(every)) == len(every) == numbers[layers]


def test_too_many_to_list():
  with pytest.raises(ConfigError, match=r"1 to 8 layers: num_layers=9$"):
    plans.every(9)  # before the first plan is asked for


@pytest.mark.parametrize("wrong", [dict(max_skips_in_a_row=-1), dict(max_visits=0)])
def test_limits_that_forbid_the_model(wrong):
  with pytest.raises(ConfigError, match=next(iter(wrong))):
    Limits(**wrong)

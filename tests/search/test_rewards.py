"""Rewards by hand."""

import math

import numpy as np
import pytest

from adaptive.config import ConfigError
from adaptive.data.questions import Question
from adaptive.search import rewards
from adaptive.search.scorer import Options

CHOICE = Question("c", "Which?", (" no", " yes, it is", " "), 1)
TEXT = Question("t", "What?", (), " this")


def scores(log_probs, tokens=None, greedy=None):
  number = len(log_probs)
  return Options(np.array(log_probs), np.array(tokens or [1] * number), np.array(greedy or [False] * number))


def worth(kind, question, *args):
  value = rewards.find(kind, [question])(question, scores(*args))
  assert type(value) is float
  return value


def test_choice_is_the_likeliest_text():
  assert worth("choice", CHOICE, [-3.0, -2.0, -9.0]) == 1.0
  assert worth("choice", CHOICE, [-2.0, -3.0, -9.0]) == 0.0
  assert worth("choice", CHOICE, [-3.0, -2.0, -1.0]) == 0.0


def test_choice_per_character_counts_no_blanks_around_it():
  # 2 and 10 characters, and one that is nothing but a blank counts as one
  assert worth("choice_per_character", CHOICE, [-2.0, -9.0, -5.0]) == 1.0  # -1, -0.9, -5
  assert worth("choice_per_character", CHOICE, [-2.0, -11.0, -5.0]) == 0.0
  assert worth("choice_per_character", CHOICE, [-2.0, -9.0, -0.5]) == 0.0


def test_margin_is_half_the_share_and_half_the_choice():
  log_probs = np.log([0.1, 0.3, 0.1]) - 700  # as texts they are all but impossible
  assert worth("margin", CHOICE, log_probs) == pytest.approx(0.5 * 0.6 + 0.5)
  assert worth("margin", CHOICE, np.log([0.5, 0.3, 0.2])) == pytest.approx(0.5 * 0.3)
  assert 0.5 < worth("margin", CHOICE, [-1.001, -1.0, -1.001]) < 1
  assert worth("margin", CHOICE, [-9999.0, 0.0, -9999.0]) == 1.0
  assert worth("margin", CHOICE, [0.0, -9999.0, -9999.0]) == 0.0


def test_margin_per_character():
  means = np.array([-1.0, -0.9, -5.0])
  shares = np.exp(means) / np.exp(means).sum()
  found = worth("margin_per_character", CHOICE, means * [2, 10, 1])
  assert found == pytest.approx(0.5 * shares[1] + 0.5)
  assert found >= rewards.goal("margin_per_character")


@pytest.mark.parametrize("kind", ["choice", "choice_per_character", "margin", "margin_per_character"])
def test_where_nothing_has_a_probability_nothing_is_right(kind):
  first = Question("f", "Which?", (" a", " b"), 0)
  assert worth(kind, first, [-math.inf, -math.inf]) == 0.0
  assert worth(kind, first, [-1.0, -math.inf]) == 1.0


def test_exact_is_greedy_and_looks_at_the_right_option():
  assert worth("exact", CHOICE, [-1.0, -2.0, -3.0], None, [False, True, False]) == 1.0
  assert worth("exact", CHOICE, [-1.0, -2.0, -3.0], None, [True, False, True]) == 0.0
  assert worth("exact", TEXT, [-1.0], None, [True]) == 1.0


def test_likelihood_is_the_mean_over_tokens():
  assert worth("likelihood", TEXT, [math.log(0.5) + math.log(0.125)], [2]) == pytest.approx(0.25)
  assert worth("likelihood", CHOICE, [-1.0, math.log(0.3), -2.0], [5, 1, 7]) == pytest.approx(0.3)
  assert worth("likelihood", TEXT, [0.0], [3]) == 1.0


def test_margin_of_a_text_is_half_likelihood_and_half_exact():
  assert worth("margin", TEXT, [2 * math.log(0.4)], [2], [False]) == pytest.approx(0.2)
  assert worth("margin", TEXT, [2 * math.log(0.4)], [2], [True]) == pytest.approx(0.7)


@pytest.mark.parametrize("kind", rewards.REWARDS)
def test_rewards_lie_in_0_to_1_and_reach_the_goal_where_the_question_is_answered(kind):
  rng = np.random.default_rng(0)
  found = [worth(kind, CHOICE, -rng.exponential(5, 3), [2, 3, 1], list(rng.random(3) < 0.5)) for _ in range(100)]
  assert 0 <= min(found) <= max(found) <= 1
  assert worth(kind, CHOICE, [-300.0, -0.1, -300.0], None, [False, True, False]) >= rewards.goal(kind)
  wrong = worth(kind, CHOICE, [-0.1, -300.0, -0.1], None, [True, False, True])
  assert wrong < rewards.goal(kind) or kind == "likelihood"


def test_goals():
  goals = {kind: rewards.goal(kind) for kind in rewards.REWARDS}
  assert goals == {
    "choice": 1.0, "choice_per_character": 1.0, "margin": 0.5, "margin_per_character": 0.5, "exact": 1.0,
    "likelihood": 0.0,
  }  # fmt: skip


def test_what_cannot_be_is_refused():
  with pytest.raises(ConfigError, match="unknown reward 'luck'; the rewards are choice, .*, likelihood"):
    rewards.find("luck", [CHOICE])
  for kind in ("choice", "choice_per_character", "margin_per_character"):
    with pytest.raises(ConfigError, match=f"reward '{kind}' needs options, which question 't' lacks"):
      rewards.find(kind, [CHOICE, TEXT])
  for kind in ("margin", "exact", "likelihood"):
    assert rewards.find(kind, [CHOICE, TEXT]) is rewards.REWARDS[kind]

"""Thresholds: the budget is kept, the rank is right, and the risk is exceeded no oftener than was said."""

import dataclasses

import numpy as np
import pytest

from adaptive.config import ConfigError
from adaptive.evaluation import thresholds
from adaptive.evaluation.thresholds import Seen


def calibrated(rows=60, length=40, exits=3, seed=0, shift=0.0):
  """Tokens whose exits are right with the probability that they signal (less `shift`); the model always is."""
  rng = np.random.default_rng(seed)
  n = rows * length
  easy = rng.beta(2, 1, (1, n))
  signals = np.clip(easy ** np.linspace(1.5, 0.3, exits)[:, None] + 0.01 * rng.normal(size=(exits, n)), 0, 1)
  right = np.concatenate([rng.random((exits, n)) < signals - shift, np.ones((1, n), bool)])
  return Seen(signals, right, np.repeat(np.arange(rows), length), by_exit(np.linspace(0.3, 1.0, exits + 1)), 1.0)


def by_exit(costs):
  """FLOPs of tokens whose costs are their own, whatever the others do."""
  return lambda left: float(costs[left].mean())


def test_a_token_leaves_at_the_first_exit_above_its_threshold_strictly():
  signals = np.array([[0.5, 0.9, 0.1], [0.6, 0.2, 0.7]])
  seen = Seen(signals, np.ones((3, 3), bool), np.zeros(3), by_exit(np.array([1.0, 2, 4])), 4.0)
  assert thresholds.where_left(seen, (0.5, 0.6)).tolist() == [2, 0, 1]
  found = thresholds.outcome(seen, (0.5, 0.6))
  assert (found.cost, found.share) == (7 / 3, 7 / 12)


@pytest.mark.parametrize("shares", [(0.2, 0.3, 0.1), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.5, 0.5, 0.0)])
def test_shares_are_met_by_rank(shares):
  seen = calibrated()
  seen = dataclasses.replace(seen, signals=np.random.default_rng(1).random(seen.signals.shape))
  left = thresholds.where_left(seen, thresholds.for_shares(seen, np.array(shares)))
  np.testing.assert_allclose([np.mean(left == e) for e in range(3)], shares, atol=1e-3)


def test_a_budget_is_kept_and_more_buys_more_agreement():
  seen, found = calibrated(), []
  for budget in (0.35, 0.5, 0.7, 0.9, 1.0):
    solution = thresholds.for_budget(seen, budget)
    assert solution.share <= budget
    assert solution == thresholds.outcome(seen, solution.thresholds)
    found.append(solution.agreement)
  assert found == sorted(found)
  assert found[-1] == 1.0
  uniform = max(
    (o for t in np.linspace(0, 1, 101) if (o := thresholds.outcome(seen, (t,) * 3)).share <= 0.5),
    key=lambda o: o.agreement,
  )
  assert found[1] > uniform.agreement - 0.01, "no worse than one threshold for all"


def test_an_impossible_budget_is_refused():
  with pytest.raises(ConfigError, match=r"a budget of 0\.2 .* the cheapest thresholds found cost 0\.3"):
    thresholds.for_budget(calibrated(rows=4), 0.2)
  with pytest.raises(ConfigError, match=r"a budget of 1\.1 .* must be more than 0 and at most 1"):
    thresholds.for_budget(calibrated(rows=4), 1.1)


def test_a_threshold_is_halfway_between_the_last_that_leaves_and_the_first_that_stays():
  """So that nothing depends on how another program rounds a signal; of equal signals all stay."""
  signals = np.array([[0.5, 0.9, 0.1, 0.5, 0.7]], np.float32)
  seen = Seen(signals, np.ones((2, 5), bool), np.zeros(5), by_exit(np.array([1.0, 2.0])), 2.0)
  found = [thresholds.for_shares(seen, np.array([number / 5]))[0] for number in range(6)]
  np.testing.assert_allclose(found, [np.inf, 0.8, 0.6, 0.5, 0.3, 0.1], rtol=1e-5)
  assert [np.sum(signals > limit) for limit in found] == [0, 1, 2, 2, 4, 5]


def test_the_test_of_a_mean_errs_no_oftener_than_its_level():
  """At the edge of the hypothesis, over many draws."""
  rng = np.random.default_rng(0)
  for a, b in ((1, 9), (0.3, 2.7), (20, 180)):
    rejected = np.mean([thresholds.p_value(rng.beta(a, b, 80), 0.1) <= 0.1 for _ in range(600)])
    assert rejected < 0.1 + 3 * np.sqrt(0.09 / 600)
  assert thresholds.p_value(np.full(100, 0.02), 0.1) < 0.05, "and sees what is plain"
  assert thresholds.p_value(np.full(100, 0.3), 0.1) == 1.0


def test_the_floor_holds_on_new_text_as_often_as_was_said():
  """Learn then Test: the share of calibration sets whose threshold is bad is at most 1 - confidence."""
  large = calibrated(rows=3000, seed=99)
  bad, shares = 0, []
  for seed in range(60):
    found = thresholds.for_floor(calibrated(rows=80, seed=seed), 0.9, 0.8)
    bad += thresholds.outcome(large, found.thresholds).agreement < 0.9
    shares.append(found.share)
  assert bad / 60 <= 0.2 + 3 * np.sqrt(0.16 / 60)
  assert np.mean(shares) < 0.95, "it does let tokens leave"


def test_a_floor_that_no_text_could_show_is_refused_and_a_high_one_lets_few_leave():
  with pytest.raises(
    ConfigError, match="4 rows cannot show an agreement of 0.999 with confidence 0.9.*: take --rows=8192$"
  ):
    thresholds.for_floor(calibrated(rows=4), 0.999, 0.99)
  strict, loose = (thresholds.for_floor(calibrated(rows=300, shift=0.3), floor, 0.8) for floor in (0.98, 0.8))
  assert strict.agreement >= 0.98
  assert strict.share > 0.9
  assert loose.share < strict.share


@pytest.mark.parametrize("budget", [0.3, 0.301, 0.35, 0.45, 0.9])
def test_a_first_exit_that_is_never_sure_leaves_every_budget_a_solution(budget):
  seen = calibrated()
  seen.signals[0] = 0.0
  assert thresholds.for_budget(seen, budget).share <= budget


def test_counts_of_patience_have_thresholds_between_them():
  seen = calibrated(rows=200)
  counts = np.cumsum(seen.signals > 0.6, axis=0)
  found = thresholds.for_floor(dataclasses.replace(seen, signals=counts.astype(float), counts=True), 0.7, 0.8)
  assert found.thresholds[0] % 1 == 0.5
  assert found.share < 1


def test_a_floor_is_tried_on_the_same_thresholds_whatever_decay_divides_signals_by():
  """Signals that were divided may be above 1; only those that count exits have a grid of halves."""
  seen = calibrated()
  divided = dataclasses.replace(seen, signals=seen.signals / 0.9)
  assert thresholds.for_floor(seen, 0.9, 0.9).share < 0.9
  assert thresholds.for_floor(divided, 0.9, 0.9).share < 0.9
  counts = dataclasses.replace(seen, signals=np.round(3 * seen.signals), counts=True)
  assert thresholds.for_floor(counts, 0.75, 0.9).thresholds[0] % 1 == 0.5


def test_tokens_that_may_not_leave_are_never_ranked():
  seen = calibrated()
  signals = seen.signals.copy()
  signals[:, ::4] = -np.inf
  seen = dataclasses.replace(seen, signals=signals)
  plan = thresholds.for_shares(seen, np.array([1.0, 0.0, 0.0]))
  assert -1e-20 < plan[0] < 0, "just below the least that was measured"
  assert set(thresholds.where_left(seen, plan)[::4]) == {3}
  assert set(thresholds.where_left(seen, plan)[1::4]) == {0}
  found = thresholds.for_budget(seen, 0.55)
  assert min(found.thresholds) > -1e-20


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan")])
def test_what_is_no_share_is_no_budget(budget):
  with pytest.raises(ConfigError, match="must be more than 0 and at most 1"):
    thresholds.check_budget(budget)

"""Pareto mathematics against hand-computed fronts, slow loops, and an independent implementation (moocore)."""

import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import moocore
import numpy as np
import pytest

from adaptive.evaluation import pareto

# Few distinct values, so that ties and duplicates are common; small integers, so that areas are exact in float64.
POINTS = hnp.arrays(np.int64, st.tuples(st.integers(1, 25), st.just(2)), elements=st.integers(0, 12)).map(
  lambda points: points.astype(np.float64)
)
quick = hypothesis.settings(max_examples=80, deadline=None, derandomize=True)


def test_front_by_hand():
  #       A    B    C    D    E    F
  cost = [3.0, 1.0, 2.0, 2.0, 5.0, 4.0]
  good = [5.0, 2.0, 4.0, 3.0, 6.0, 5.0]
  # D costs what C costs and is worse; F is as good as A and dearer.
  assert pareto.front(cost, good).tolist() == [1, 2, 0, 4]


def test_hypervolume_by_hand():
  # Steps 1..2 at height 2, 2..3 at 4, 3..5 at 5; the point at cost 5 touches the reference and covers nothing.
  assert pareto.hypervolume([1, 2, 3, 5], [2, 4, 5, 6], (5.0, 0.0)) == 1 * 2 + 1 * 4 + 2 * 5
  assert pareto.hypervolume([1, 2, 3, 5], [2, 4, 5, 6], (5.0, 2.0)) == 1 * 0 + 1 * 2 + 2 * 3
  assert pareto.normalised_hypervolume([1, 2, 3, 5], [2, 4, 5, 6], 3, 0.0) == pytest.approx(16 / ((5 - 1) * 6))


def test_auc_by_hand():
  # Over costs 1 -> 2 -> 8 that is one and two doublings, at qualities 1 and 3, relative to the full model's 4.
  assert pareto.normalised_auc([8, 1, 2], [4, 1, 3], 0) == pytest.approx((1 * 1 + 2 * 3) / (3 * 4))
  with pytest.raises(ValueError, match="positive"):
    pareto.normalised_auc([0.0, 1.0], [1.0, 2.0], 1)


@quick
@hypothesis.given(POINTS)
def test_front_equals_moocore(points):
  index = pareto.front(points[:, 0], points[:, 1])
  reference = moocore.filter_dominated(points, maximise=[False, True])
  np.testing.assert_array_equal(points[index], np.unique(reference, axis=0))
  assert np.all(np.diff(points[index], axis=0) > 0)


@quick
@hypothesis.given(POINTS, st.integers(1, 13), st.integers(-1, 11))
def test_hypervolume_equals_moocore(points, c_ref, q_ref):
  ours = pareto.hypervolume(points[:, 0], points[:, 1], (c_ref, q_ref))
  assert ours == moocore.hypervolume(points, ref=[c_ref, q_ref], maximise=[False, True])


def test_hypervolume_equals_moocore_on_reals():
  rng = np.random.default_rng(0)
  for n in (1, 3, 30, 300):
    points = rng.normal(size=(n, 2))
    reference = moocore.hypervolume(points, ref=[1.5, -1.0], maximise=[False, True])
    assert pareto.hypervolume(points[:, 0], points[:, 1], (1.5, -1.0)) == pytest.approx(reference, rel=1e-12)


@quick
@hypothesis.given(POINTS, st.randoms(use_true_random=False))
def test_order_and_repeats_do_not_matter(points, random):
  order = list(range(len(points))) * 2
  random.shuffle(order)
  again = points[order]
  before, after = pareto.front(*points.T), pareto.front(*again.T)
  np.testing.assert_array_equal(points[before], again[after])
  assert pareto.hypervolume(*points.T, (13, -1)) == pareto.hypervolume(*again.T, (13, -1))


def test_first_of_duplicates_is_kept():
  assert pareto.front([2, 1, 1, 2], [3, 1, 1, 3]).tolist() == [1, 0]


@quick
@hypothesis.given(POINTS, st.data())
def test_only_points_beyond_the_front_add_area(points, data):
  area = pareto.hypervolume(*points.T, (13, -1))
  cost, quality = points[data.draw(st.integers(0, len(points) - 1))]
  dominated = np.vstack([points, [cost + 1, quality]])
  assert pareto.hypervolume(*dominated.T, (13, -1)) == area
  member = points[data.draw(st.sampled_from(pareto.front(*points.T).tolist()))]
  dominating = np.vstack([points, np.add(member, [-1, 1])])
  assert pareto.hypervolume(*dominating.T, (13, -1)) > area


def test_normalised_hypervolume_bounds():
  cost, ideal = [1.0, 2.0, 4.0], [3.0, 3.0, 3.0]
  assert pareto.normalised_hypervolume(cost, ideal, 2, 0.0) == 1.0
  # Another unit of cost or another zero of quality changes nothing.
  quality = np.array([1.0, 2.5, 3.0])
  value = pareto.normalised_hypervolume(cost, quality, 2, 0.5)
  assert 0 < value < 1
  assert pareto.normalised_hypervolume(np.multiply(cost, 1e9), 7 * quality + 2, 2, 7 * 0.5 + 2) == pytest.approx(value)


def test_degenerate_families_have_a_value():
  assert pareto.normalised_hypervolume([5.0], [0.4], 0, 0.0) == 0.0
  assert pareto.normalised_hypervolume([5.0, 5.0], [0.4, 0.5], 0, 0.0) == 0.0
  assert pareto.normalised_hypervolume([1.0, 5.0], [0.4, 0.1], 1, 0.1) == 0.0
  assert pareto.normalised_auc([5.0], [0.4], 0) == 0.0
  assert math.isnan(pareto.normalised_hypervolume([1.0, 5.0], [0.4, math.nan], 1, 0.0))
  assert math.isnan(pareto.kendall_tau([5.0], [0.4]))


def test_points_that_are_not_finite_cover_nothing():
  cost, quality = [1.0, 2.0, 3.0, 4.0], [np.nan, 1.0, np.inf, 2.0]
  assert pareto.front(cost, quality).tolist() == [1, 3]
  assert pareto.hypervolume(cost, quality, (4.0, 0.0)) == 2.0
  # The cheapest sub-model still sets the bound of the box, else a diverged one would raise the score.
  assert pareto.normalised_hypervolume(cost, quality, 3, 0.0) == pytest.approx(2.0 / (3 * 2))
  assert pareto.front([], []).tolist() == []


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r"\[n\]"):
    pareto.front([1.0, 2.0], [1.0])


def test_retention():
  assert pareto.retention([0.5, 0.3, 0.4], 0) == (pytest.approx(0.6), pytest.approx(0.8), 1)
  assert pareto.retention([0.5, 0.5, math.nan], 0) == (0.0, pytest.approx(2 / 3), 2)
  assert math.isnan(pareto.retention([0.0, 0.5], 0)[0])


GRID = [{"depth": depth, "width": width} for depth in (1, 2) for width in (1, 2)]  # 11, 12, 21, 22


def test_monotonicity_by_hand():
  # 11 inside 12, 21, 22; 12 and 21 inside 22, and not comparable with each other.
  assert pareto.monotonicity_violations(GRID, [1, 2, 3, 4]) == (0, 5)
  assert pareto.monotonicity_violations(GRID, [1, 3, 2, 4]) == (0, 5)
  assert pareto.monotonicity_violations(GRID, [4, 3, 2, 1]) == (5, 5)
  assert pareto.monotonicity_violations(GRID, [1, 4, 3, 3.5]) == (1, 5)


def test_tolerance_of_three_forms():
  quality = [1.0, 4.0, 3.0, 3.5]  # 12 beats 22 by 0.5
  count = lambda tolerance: pareto.monotonicity_violations(GRID, quality, tolerance)[0]
  assert (count(0.4), count(0.5)) == (1, 0)
  assert (count([0, 0.3, 9, 0.3]), count([0, 0.4, 9, 0.4])) == (1, 0)  # hypot 0.42 and 0.57
  pairs = np.zeros((4, 4))
  pairs[3, 1] = 9  # of the other order: has no say
  assert count(pairs) == 1
  pairs[1, 3] = 0.6
  assert count(pairs) == 0
  assert count([0, math.nan, 0, 0]) == 1


def test_nested_compares_like_with_like():
  dials = [
    {"depth": 2, "path": "even"},
    {"depth": 3, "path": "even"},
    {"depth": 4, "path": "odd"},
    {"depth": 9},
    {"depth": 3, "path": "even"},
    {"depth": 10, "width": 3},
  ]
  expected = np.zeros((6, 6), bool)
  expected[0, [1, 4]] = True
  np.testing.assert_array_equal(pareto.nested(dials), expected)


def test_a_diverged_larger_model_is_a_violation():
  assert pareto.monotonicity_violations(GRID, [1, 2, 3, math.nan], [0.1, 0.1, 0.1, math.nan]) == (3, 5)
  assert pareto.monotonicity_violations(GRID, [math.nan] * 4) == (0, 5)


@quick
@hypothesis.given(POINTS, st.sampled_from([0.0, 1.0, 2.5]))
def test_worse_and_dearer_equals_loops(points, tolerance):
  expected = [any(c <= cost and q > quality + tolerance for c, q in points) for cost, quality in points]
  result = pareto.worse_and_dearer(*points.T, tolerance)
  assert result.tolist() == expected
  assert not result[pareto.front(*points.T)].any()


@quick
@hypothesis.given(POINTS)
def test_kendall_equals_loops(points):
  n, concordant, cost_pairs, quality_pairs = len(points), 0, 0, 0
  for i in range(n):
    for j in range(i):
      c, q = np.sign(points[i] - points[j])
      concordant, cost_pairs, quality_pairs = concordant + c * q, cost_pairs + c * c, quality_pairs + q * q
  if cost_pairs * quality_pairs == 0:
    assert math.isnan(pareto.kendall_tau(*points.T))
  else:
    assert pareto.kendall_tau(*points.T) == pytest.approx(concordant / math.sqrt(cost_pairs * quality_pairs))


def test_kendall_by_hand():
  assert pareto.kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
  assert pareto.kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
  assert pareto.kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)

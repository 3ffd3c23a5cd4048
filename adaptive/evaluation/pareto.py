"""Pareto mathematics of a family of sub-models: pure functions of arrays, nothing of JAX.

Throughout, `cost` [n] is better when lower and `quality` [n] is better when higher (pass `-loss` for a loss). Any unit
will do. A point whose cost or quality is not finite (a diverged sub-model) is never on a front and covers nothing;
where sub-models are compared with each other it counts as worse than every finite one.

A `tolerance` says how much better counts as better, and has three forms:
  scalar   the same for every pair;
  [n]      each sub-model's own noise, such as twice the paired standard error of its difference from the full model. A
           pair's tolerance is the root of the sum of squares: exact when one of the two is the full model (whose noise
           is 0), and otherwise on the safe side as long as the two differences correlate positively;
  [n, n]   one value per pair, in the order (better one, worse one).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike


def front(cost: ArrayLike, quality: ArrayLike) -> np.ndarray:
  """Indices of the points that no other point dominates, by rising cost (so by rising quality too).

  Of points that are equal in both coordinates the first is kept. O(n log n).

  Raises:
    ValueError: the arrays are not one-dimensional and of one length.
  """
  cost, quality = _points(cost, quality)
  finite = np.flatnonzero(np.isfinite(cost) & np.isfinite(quality))
  order = finite[np.lexsort((finite, -quality[finite], cost[finite]))]
  best_before = np.concatenate(([-np.inf], np.maximum.accumulate(quality[order])[:-1]))
  return order[quality[order] > best_before]


def hypervolume(cost: ArrayLike, quality: ArrayLike, reference: tuple[float, float]) -> float:
  """Area that the points dominate inside the corner `reference` = (c_ref, q_ref), exactly.

  The sum over the front of (c_{i+1} - c_i) (q_i - q_ref), the last point reaching to c_ref. Points that cost c_ref or
  more, or reach no more than q_ref, cover nothing. In units of cost times quality.
  """
  cost, quality = _points(cost, quality)
  c_ref, q_ref = reference
  index = front(cost, quality)
  index = index[(cost[index] < c_ref) & (quality[index] > q_ref)]
  widths = np.diff(np.append(cost[index], c_ref))
  return float(np.sum(widths * (quality[index] - q_ref)))


def normalised_hypervolume(cost: ArrayLike, quality: ArrayLike, full: int, q_ref: float) -> float:
  """Hypervolume with c_ref = the full model's cost, over (c_ref - c_min) (q_full - q_ref).

  1 means that the full model's quality was to be had at the cheapest sub-model's cost; above 1, smaller ones are
  better than the full one. The full model itself covers no area, it only sets the bounds.

  Returns 0 where the box is empty: a family of one (a dense model), a full model that is the cheapest of all, or one
  no better than q_ref. It offers no choice below its own cost, and 0 keeps it from ranking above families that do.
  Returns nan where the full model's own cost or quality is not finite.

  Args:
    cost, quality: [n].
    full: index of the full model.
    q_ref: quality of a trivial predictor, in the units of `quality`.
  """
  cost, quality = _points(cost, quality)
  width = cost[full] - np.min(cost[np.isfinite(cost)], initial=cost[full])
  height = quality[full] - q_ref
  if not np.isfinite(width * height):
    return float("nan")
  if width <= 0 or height <= 0:
    return 0.0
  return hypervolume(cost, quality, (cost[full], q_ref)) / float(width * height)


def normalised_auc(cost: ArrayLike, quality: ArrayLike, full: int) -> float:
  """Mean over log cost of the best quality within a budget, from the cheapest sub-model to the full one, over q_full.

  The normalised hypervolume on a logarithmic cost axis with q_ref = 0, where every halving of the cost weighs the
  same; degenerate families as there.

  Raises:
    ValueError: a cost is not positive.
  """
  cost, quality = _points(cost, quality)
  if np.any(cost <= 0):
    raise ValueError("an area over log cost needs positive costs")
  return normalised_hypervolume(np.log(cost), quality, full, 0.0)


def retention(quality: ArrayLike, full: int) -> tuple[float, float, int]:
  """Quality over the full model's quality, of all n sub-models, the full one included.

  A sub-model whose quality is not finite retains nothing (0).

  Returns:
    the worst, the mean, and the index of the worst; nan for both values where the full model's quality is not positive.
  """
  quality = np.asarray(quality, np.float64)
  if not quality[full] > 0 or not np.isfinite(quality[full]):
    return float("nan"), float("nan"), full
  ratio = np.where(np.isfinite(quality), quality, 0.0) / quality[full]
  return float(ratio.min()), float(ratio.mean()), int(ratio.argmin())


def nested(dials: Sequence[Mapping[str, int | float | str]]) -> np.ndarray:
  """[n, n] booleans: is sub-model i strictly inside sub-model j?

  It is when no numeric dial of i exceeds that of j, at least one is smaller, and every other dial (a string, a
  boolean) is equal. Sub-models that do not share the same set of dials are not comparable.
  """
  n = len(dials)
  inside = np.ones((n, n), bool)
  smaller = np.zeros((n, n), bool)
  keys = [frozenset(dial) for dial in dials]
  inside &= _equal(keys)
  for key in sorted(frozenset().union(*keys)):
    column = [dial.get(key, 0) for dial in dials]
    if all(_is_number(value) for value in column):
      values = np.asarray(column, np.float64)
      inside &= values[:, None] <= values[None]
      smaller |= values[:, None] < values[None]
    else:
      inside &= _equal(column)
  return inside & smaller


def monotonicity_violations(
  dials: Sequence[Mapping[str, int | float | str]], quality: ArrayLike, tolerance: ArrayLike = 0.0
) -> tuple[int, int]:
  """Nested pairs whose smaller member is better than the larger one by more than the tolerance.

  Returns:
    the number of such pairs, and the number of all nested pairs.
  """
  pairs = nested(dials)
  return int(np.sum(pairs & _better(quality, tolerance))), int(np.sum(pairs))


def worse_and_dearer(cost: ArrayLike, quality: ArrayLike, tolerance: ArrayLike = 0.0) -> np.ndarray:
  """[n] booleans: does another sub-model cost no more and do better by more than the tolerance?

  With tolerance 0 these are the points off the front, except for repeats of a point on it.
  """
  cost, quality = _points(cost, quality)
  return np.any((cost[:, None] <= cost[None]) & _better(quality, tolerance), axis=0)


def kendall_tau(cost: ArrayLike, quality: ArrayLike) -> float:
  """Kendall's tau-b, in [-1, 1], ties allowed; nan where either array is constant. 1: dearer is always better."""
  cost, quality = _points(cost, quality)
  quality = _worst_where_undefined(quality)
  # Comparisons rather than the sign of a difference: -inf equals itself, where its difference would be nan.
  c = (cost[:, None] > cost[None]).astype(np.float64) - (cost[:, None] < cost[None])
  q = (quality[:, None] > quality[None]).astype(np.float64) - (quality[:, None] < quality[None])
  untied = np.sqrt(np.sum(c * c) * np.sum(q * q))
  return float(np.sum(c * q) / untied) if untied > 0 else float("nan")


def _points(cost: ArrayLike, quality: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  cost, quality = np.asarray(cost, np.float64), np.asarray(quality, np.float64)
  if cost.ndim != 1 or cost.shape != quality.shape:
    raise ValueError(f"cost {cost.shape} and quality {quality.shape} must both be [n]")
  return cost, quality


def _worst_where_undefined(quality: ArrayLike) -> np.ndarray:
  quality = np.asarray(quality, np.float64)
  return np.where(np.isfinite(quality), quality, -np.inf)


def _better(quality: ArrayLike, tolerance: ArrayLike) -> np.ndarray:
  """[n, n] booleans: is i better than j by more than the pair's tolerance?"""
  quality = _worst_where_undefined(quality)
  # A diverged sub-model has no standard error either; its infinite distance needs none.
  tolerance = np.nan_to_num(np.asarray(tolerance, np.float64), nan=0.0)
  if tolerance.ndim == 1:
    tolerance = np.hypot(tolerance[:, None], tolerance[None])
  return quality[:, None] > quality[None] + tolerance


def _is_number(value: object) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _equal(column: Sequence[object]) -> np.ndarray:
  return np.array([[a == b for b in column] for a in column], bool).reshape(len(column), len(column))

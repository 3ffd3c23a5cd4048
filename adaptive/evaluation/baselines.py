"""What a method that decides by what it sees has to beat: chance at the same rate, fixed plans, smaller dense models.

All are losses at the FLOPs of a sub-model. Between two fixed plans, or two dense models, lies what a coin tossed for
each request between them gives: their lower convex hull is the best that can be had without a look at the input. No
more than all of the FLOPs has to be spent: beyond the best plan its loss can be had, and below the cheapest there is
none.
"""

from collections.abc import Sequence

import numpy as np

from adaptive.evaluation.results import Family, Result


def decides(result: Result) -> bool:
  """Whether a sub-model's cost depends on what it sees: then its decisions at random were measured, too."""
  return result.random_loss is not None


def fixed(family: Family) -> np.ndarray:
  """[n] loss of the family's own fixed plans at the FLOPs of each sub-model that decides; nan for the others."""
  plans = [r for r in family.results if not decides(r)]
  deciding = np.array([decides(r) for r in family.results])
  return np.where(deciding, _hull(plans, family.column("flops_per_token")), np.nan)


def dense(families: Sequence[Family], flops: float) -> float:
  """Loss at so many FLOPs of dense models that were trained for themselves: the runs of one sub-model each."""
  return float(_hull([f.results[0] for f in families if len(f.results) == 1], np.array([flops]))[0])


def _hull(plans: Sequence[Result], flops: np.ndarray) -> np.ndarray:
  """[n] lower convex hull of the plans' loss over FLOPs, at n values, never rising; nan below the cheapest."""
  hull: list[tuple[float, float]] = []
  for point in _better(plans):
    while len(hull) > 1 and _above(hull[-1], hull[-2], point):
      hull.pop()
    hull.append(point)
  if not hull:
    return np.full(flops.shape, np.nan)
  x, y = np.array(hull).T
  return np.where(flops >= x[0] * (1 - 1e-9), np.interp(flops, x, y), np.nan)


def _better(plans: Sequence[Result]) -> list[tuple[float, float]]:
  """FLOPs and losses of the plans that are better than all that cost no more, in order of their FLOPs."""
  found: list[tuple[float, float]] = []
  for point in sorted((r.flops_per_token, r.loss) for r in plans if np.isfinite(r.loss)):
    if not found or point[1] < found[-1][1]:
      found.append(point)
  return found


def _above(middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]) -> bool:
  """Whether the middle point is on or above the line between the other two, whose costs differ."""
  line = left[1] + (right[1] - left[1]) * (middle[0] - left[0]) / (right[0] - left[0])
  return middle[1] >= line


def cheapest(family: Family, share: float) -> Result:
  """The sub-model of the fewest FLOPs that keeps so much of the full model's accuracy; the full model at worst."""
  full = family.results[family.full_index]
  good = [r for r in family.results if r.accuracy >= share * full.accuracy] or [full]
  return min(good, key=lambda r: r.flops_per_token)

"""Thresholds for early exit: for a budget of FLOPs, or for a floor of quality that holds with a stated confidence.

A budget is met as in Dynamic Perceiver (Han et al., arXiv 2306.11248) and MSDNet: a share of the tokens in proportion
to r^k leaves at exit k, each threshold is the signal at the right rank among those that have not left, and r is the one
whose cost is the budget. A floor is met as in CALM (arXiv 2207.07061, Section 4.2), by Learn then Test: one threshold
for all exits is lowered step by step, as long as a test rejects that the risk is above the floor's.

Both work on what a calibration set shows at every exit, with the keys of the full model; what decoding with another
key/value rule then does is measured by an evaluation.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from adaptive.config import require


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a calibration set shows, of n tokens at e exits, the last one the model's own.

  Attributes:
    signals: how sure each early exit is, [e - 1, n].
    right: whether an exit's likeliest token is the model's, [e, n].
    rows: which row of text each token is of, [n]: tokens of a row are no independent witnesses.
    costs: FLOPs of a token that leaves at each exit, [e], increasing.
  """

  signals: np.ndarray
  right: np.ndarray
  rows: np.ndarray
  costs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Solution:
  """Thresholds of the early exits, the mean cost of a token, its share of the model's, and the agreement with it."""

  thresholds: tuple[float, ...]
  cost: float
  share: float
  agreement: float


def where_left(seen: Seen, thresholds: Sequence[float]) -> np.ndarray:
  """The exit at which each token leaves, [n]: the first with a signal strictly above its threshold."""
  above = seen.signals > np.asarray(thresholds, np.float64)[:, None]
  return np.argmax(np.concatenate([above, np.ones_like(above[:1])]), axis=0)


def outcome(seen: Seen, thresholds: Sequence[float]) -> Solution:
  """What thresholds would have done on the calibration set."""
  left = where_left(seen, thresholds)
  cost = float(seen.costs[left].mean())
  agreement = float(np.take_along_axis(seen.right, left[None], axis=0).mean())
  return Solution(tuple(map(float, thresholds)), cost, cost / float(seen.costs[-1]), agreement)


def for_shares(seen: Seen, shares: np.ndarray) -> tuple[float, ...]:
  """Thresholds by which these shares of the tokens leave at the early exits, [e - 1]: ranks among those still there."""
  number, staying, found = seen.signals.shape[1], np.ones(seen.signals.shape[1], bool), []
  for signal, share in zip(seen.signals, shares):
    there = np.sort(signal[staying])[::-1]
    leaving = min(round(share * number), len(there))
    # Strictly above: the first that stays is the threshold; with none left to stay, anything lower than the last.
    limit = there[leaving] if leaving < len(there) else np.nextafter(there[-1], -np.inf) if len(there) else np.inf
    found.append(float(limit))
    staying &= ~(signal > limit)
  return tuple(found)


def for_budget(seen: Seen, budget: float) -> Solution:
  """Thresholds of the best agreement found whose mean cost is at most `budget` of the full model's.

  ConfigError for a budget below what the first exit costs.
  """
  least = float(seen.costs[0] / seen.costs[-1])
  require(least <= budget <= 1, f"a budget of {budget:g} of the full model's FLOPs must lie in {least:.3g} .. 1")
  early = len(seen.signals)
  lowest = np.nextafter(seen.signals[0].min(), -np.inf)
  best = outcome(seen, (lowest, *[np.inf] * (early - 1)))  # all leave at once, which every budget allows
  for ratio in np.exp(np.linspace(-3, 3, 61)):
    for last in np.linspace(0, 1, 41):  # what is left for the model's own exit
      weights = ratio ** np.arange(early)
      found = outcome(seen, for_shares(seen, (1 - last) * weights / weights.sum()))
      if found.share <= budget and (found.agreement, -found.cost) > (best.agreement, -best.cost):
        best = found
  return best


def p_value(losses: np.ndarray, limit: float) -> float:
  """Of the hypothesis that the mean of independent losses in 0..1 is above `limit`, by betting against it.

  The capital process of Waudby-Smith and Ramdas (arXiv 2010.09686, Section 4): what a gambler who bets that losses are
  lower has made is more than 1 / p with probability at most p, if they are not.
  """
  count = np.arange(1, len(losses) + 1)
  mean = (0.5 + np.cumsum(losses)) / (count + 1)
  variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (count + 1)
  before = np.concatenate([[0.25], variance[:-1]])  # a bet knows only the past
  bet = np.minimum(np.sqrt(2 * np.log(10.0) / (len(losses) * before)), 0.75 / max(1 - limit, 1e-12))
  capital = np.exp(np.cumsum(np.log1p(-bet * (losses - limit))))
  return float(min(1.0, 1.0 / capital.max()))


def for_floor(seen: Seen, floor: float, confidence: float, grid: Sequence[float] | None = None) -> Solution:
  """One threshold for all exits, as low as can be shown to keep agreement with the model at `floor` or above.

  Fixed-sequence testing: thresholds are tried from high to low, each by a test at level 1 - confidence, until the first
  that fails; with probability `confidence` over calibration sets the one returned is good on new text like it.

  Args:
    floor: share of tokens that have to be the model's own, mean over rows. grid: thresholds that are tried, chosen
      without a look at these tokens; unless given, 200 steps from 1 to 0, or halves between the counts of patience.

  Raises:
    ConfigError: so few rows could not show such an agreement even if all tokens agreed.
  """
  require(0 < floor < 1, f"an agreement of {floor:g} must lie between 0 and 1")
  require(0 < confidence < 1, f"a confidence of {confidence:g} must lie between 0 and 1")
  if grid is None:
    grid = np.linspace(0, 1, 201) if seen.signals.max() <= 1 else np.arange(len(seen.signals)) + 0.5
  _, row = np.unique(seen.rows, return_inverse=True)
  size = np.bincount(row)
  require(
    p_value(np.zeros(len(size)), 1 - floor) <= 1 - confidence,
    f"{len(size)} rows cannot show an agreement of {floor:g} with confidence {confidence:g}: take more",
  )
  kept = outcome(seen, (np.inf,) * len(seen.signals))
  for value in sorted(grid, reverse=True):
    thresholds = (float(value),) * len(seen.signals)
    wrong = 1.0 - np.take_along_axis(seen.right, where_left(seen, thresholds)[None], axis=0)[0]
    if p_value(np.bincount(row, wrong) / size, 1 - floor) > 1 - confidence:
      break
    kept = outcome(seen, thresholds)
  return kept

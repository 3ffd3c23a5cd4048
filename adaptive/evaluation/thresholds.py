"""Thresholds for early exit: for a budget of FLOPs, or for a floor of quality that holds with a stated confidence.

A budget is met as in Dynamic Perceiver (Han et al., arXiv 2306.11248) and MSDNet: a share of the tokens in proportion
to r^k leaves at exit k, each threshold is the signal at the right rank among those that have not left, and r is the one
whose cost is the budget. A floor is met as in CALM (arXiv 2207.07061, Section 4.2), by Learn then Test: one threshold
for all exits is lowered step by step, as long as a test rejects that the risk is above the floor's.

Both work on what a calibration set shows at every exit, with the keys of the full model; what decoding with another
key/value rule then does is measured by an evaluation.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from adaptive.config import require


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a calibration set shows, of n tokens at e exits, the last one the model's own.

  Attributes:
    signals: how sure each early exit is, [e - 1, n]; -inf where a token may not leave.
    right: whether an exit's likeliest token is the model's, [e, n].
    rows: which row of text each token is of, [n]: tokens of a row are no independent witnesses.
    flops: exits where the tokens leave, int [n] -> mean FLOPs of a token. What one costs may depend on where others
      leave: with the full model's keys those that have left are taken up when a later one goes on.
    full: FLOPs of a token of the full model. A plan under which none leaves costs more if it asks logits on the way.
    counts: whether signals are whole numbers (patience).
  """

  signals: np.ndarray
  right: np.ndarray
  rows: np.ndarray
  flops: Callable[[np.ndarray], float]
  full: float
  counts: bool = False


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
  cost = seen.flops(left)
  agreement = float(np.take_along_axis(seen.right, left[None], axis=0).mean())
  return Solution(tuple(map(float, thresholds)), cost, cost / seen.full, agreement)


def just_below(value: float) -> float:
  """A threshold that a signal of this value passes, wherever it is compared.

  The next number of float32 will not do: below 0 it is a denormal, which accelerators and XLA take for 0; and where
  thresholds decay with the position (`Exiting.decay`) a signal passes through a division and a product.
  """
  return float(np.float32(value) - np.maximum(1e-6 * np.abs(np.float32(value)), np.float32(1e-30)))


def for_shares(seen: Seen, shares: np.ndarray) -> tuple[float, ...]:
  """Thresholds by which these shares of the tokens leave at the early exits, [e - 1]: ranks among those still there."""
  number, staying, found = seen.signals.shape[1], np.ones(seen.signals.shape[1], bool), []
  for signal, share in zip(seen.signals, shares):
    there = np.sort(signal[staying & np.isfinite(signal)])[::-1]
    leaving = min(round(share * number), len(there))
    limit = _between(there, leaving)
    found.append(limit)
    staying &= ~(signal > limit)
  return tuple(found)


def _between(falling: np.ndarray, number: int) -> float:
  """A threshold that so many of these signals, largest first, pass; fewer where the next is equal to the last of them.

  It is halfway between the last that passes and the first that stays: another program may round a signal otherwise.
  """
  if number == 0:
    return np.inf
  if number == len(falling):
    return just_below(falling[-1])
  last, first = falling[number - 1], falling[number]
  middle = np.float32(0.5 * (float(last) + float(first)))
  return float(middle if middle < last else first)


def for_budget(seen: Seen, budget: float) -> Solution:
  """Thresholds of the best agreement found whose mean cost is at most `budget` of the full model's.

  ConfigError for a budget below the cheapest that was found; that can be all of the full model's FLOPs and more, where
  a head is asked at every exit, or those who wait begin anew with every token.
  """
  check_budget(budget)
  found = [outcome(seen, plan) for plan in _plans(seen)]
  least = min(solution.share for solution in found)
  require(
    least <= budget,
    f"a budget of {budget:g} of the full model's FLOPs cannot be met: the cheapest thresholds found cost {least:.3g}",
  )
  return max((one for one in found if one.share <= budget), key=lambda one: (one.agreement, -one.cost))


def _plans(seen: Seen) -> Iterator[tuple[float, ...]]:
  """Thresholds for budgets to choose among: all leave at once, or shares in proportion to r^k."""
  early = len(seen.signals)
  first = seen.signals[0]
  yield (just_below(first[np.isfinite(first)].min(initial=0.0)), *[np.inf] * (early - 1))
  for ratio in np.exp(np.linspace(-3, 3, 61)):
    for last in np.linspace(0, 1, 41):  # what is left for the model's own exit
      weights = ratio ** np.arange(early)
      yield for_shares(seen, (1 - last) * weights / weights.sum())


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


def check_budget(budget: float) -> None:
  """ConfigError for what is no share of the full model's FLOPs."""
  require(0 < budget <= 1, f"a budget of {budget:g} of the full model's FLOPs must be more than 0 and at most 1")


def check_floor(floor: float, confidence: float) -> None:
  """ConfigError for what is no probability."""
  require(0 < floor < 1, f"an agreement of {floor:g} must lie between 0 and 1")
  require(0 < confidence < 1, f"a confidence of {confidence:g} must lie between 0 and 1")


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
  check_floor(floor, confidence)
  if grid is None:
    grid = np.arange(len(seen.signals)) + 0.5 if seen.counts else np.linspace(0, 1, 201)
  _, row = np.unique(seen.rows, return_inverse=True)
  size = np.bincount(row)
  shows = lambda rows: p_value(np.zeros(rows), 1 - floor) <= 1 - confidence  # if all tokens agree
  enough = next(rows for rows in (max(len(size), 1) << doublings for doublings in itertools.count()) if shows(rows))
  require(
    enough == len(size),
    f"{len(size)} rows cannot show an agreement of {floor:g} with confidence {confidence:g}: take --rows={enough}",
  )
  kept = outcome(seen, (np.inf,) * len(seen.signals))
  for value in sorted(grid, reverse=True):
    thresholds = (float(value),) * len(seen.signals)
    wrong = 1.0 - np.take_along_axis(seen.right, where_left(seen, thresholds)[None], axis=0)[0]
    if p_value(np.bincount(row, wrong) / size, 1 - floor) > 1 - confidence:
      break
    kept = outcome(seen, thresholds)
  return kept

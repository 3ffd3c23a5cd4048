"""What a round of self-speculative decoding costs, for every draft and length: in layers, or in measured seconds.

DEL counts the layers that run one after the other, as if checking many tokens took as long as running one. On an
accelerator that is nearly so. On a CPU it is not, and nowhere is a drafted token's head free. Seconds of a few rounds
tell what a layer costs for a token that is drafted, for a pass that checks, and for every token in that pass, and what
a drafted token's head costs.

Machines are not that even, nor are they as quick in every minute: from then on, a Kalman filter learns the logarithm of
each pair's seconds, which it takes for constant, follows that of the machine's speed, and tells how sure it is.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

_COLD = 4  # of a program's first rounds: they take up to twice as long, and tell nothing
_PROBES = 4  # of each of the first pairs, after those
# Standard deviations, as shares of a round's seconds. What was measured on CPUs:
_NOISE = 0.1  # of one round beside the next of the same pair
_UNEVEN = 0.12  # of a pair beside the sum of its parts
_DRIFT = 0.03  # of the machine's speed from round to round
_OUTLIER = 2.0  # standard deviations: what surprises more counts as if it surprised so much


class RoundCosts:
  """Cost of a round, by draft and length.

  Args:
    layers: that each draft runs. full: layers of the model. lengths: that a round may draft, increasing.
    overhead: of a drafted token beside its layers, in layers, while no seconds are known.
  """

  def __init__(self, layers: Sequence[int], full: int, lengths: Sequence[int], overhead: float):
    below, tokens = np.array(layers, np.float64)[:, None], np.array(lengths, np.float64)[None]
    self._counted = tokens * (below + overhead) + full  # DEL, eq. 4: d l + L
    above = full - below + 0 * tokens
    # A drafted token's layers, which the last of them runs too; its head; a pass over the layers above; their tokens.
    self._parts = np.stack([(tokens + 1) * below, tokens + 0 * below, above, above * (tokens + 1)], axis=-1)
    shape = self._counted.shape
    # No draft; a middling one, short; and it, the cheapest and the dearest as long as the model's layers take. What a
    # round costs is a sum of four parts.
    fits, middle = (tokens * below <= full) | (tokens == tokens.min()), shape[0] // 2
    long = [(draft, int(np.flatnonzero(fits[draft])[-1])) for draft in (0, middle, shape[0] - 1)]
    pairs = ((0, 0), (middle, 0 if long[1][1] == 1 else min(1, shape[1] - 1)), *long)
    self._first: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}  # seconds
    self._asked = self._untold()
    self._ran: collections.Counter[tuple[int, int]] = collections.Counter()
    self._mean = self._covariance = None  # of the logarithms: of all pairs' seconds, and last of the machine's slowness

  @property
  def table(self) -> np.ndarray:
    """Costs [e, n] by draft and length: layers while too few rounds were timed, then seconds.

    Those of pairs that never ran are by what others took; all are as if the machine were as quick as in the beginning.
    """
    return self._counted if self._mean is None else np.exp(self._mean[:-1]).reshape(self._counted.shape)

  @property
  def doubt(self) -> np.ndarray:
    """Standard deviation [e, n] of the table's seconds, as a share of them; 0 while it is in layers."""
    if self._mean is None:
      return np.zeros_like(self._counted)
    return np.sqrt(np.diag(self._covariance)[:-1]).reshape(self._counted.shape)

  def probe(self) -> tuple[int, int] | None:
    """A draft and a length, both as indices, to take next for the sake of its seconds; None when enough is known."""
    if self._mean is not None:
      return None
    self._asked = self._asked or self._untold()  # all in turns
    return self._asked.pop(0)

  def _untold(self) -> list[tuple[int, int]]:
    return [pair for pair, seconds in self._first.items() if len(seconds) < _PROBES]

  def renew(self) -> None:
    """From now on new programs run, for other rows or caches: they are cold, and what others took is a guess."""
    self._ran.clear()
    if self._mean is not None:
      self._covariance += np.diag(np.append(np.full(self._counted.size, _UNEVEN**2), 1.0))

  def observe(self, draft: int, length: int, seconds: float) -> None:
    """What a round of this pair, both as indices, took; a clock that stood still tells nothing."""
    if not 0 < seconds < math.inf:
      return
    pair = draft, length
    self._ran[pair] += 1
    if self._ran[pair] <= _COLD:
      return
    if self._mean is not None:
      self._follow(np.ravel_multi_index(pair, self._counted.shape), np.log(seconds))
    elif pair in self._first:
      self._first[pair].append(seconds)
      if not self._untold():
        self._start()

  def _start(self) -> None:
    """From the seconds of the first pairs to those of all."""
    pairs = tuple(np.array(list(self._first)).T)
    seconds = np.array([np.median(each) for each in self._first.values()])
    # Relative errors count: a long round must not decide alone. The parts are not negative.
    weights, _ = nnls(self._parts[pairs] / seconds[:, None], np.ones(len(seconds)))
    table, variance = self._parts @ weights, np.full(self._counted.shape, _UNEVEN**2)
    table[pairs], variance[pairs] = seconds, _NOISE**2 / _PROBES
    self._mean = np.append(np.log(table).ravel(), 0.0)
    self._covariance = np.diag(np.append(variance.ravel(), len(self._first) * _PROBES * _DRIFT**2 / 3))

  def _follow(self, pair: int, log_seconds: float) -> None:
    """One round more: a step of the filter. What was seen is a pair's share and the machine's, and noise."""
    mean, covariance = self._mean, self._covariance
    covariance[-1, -1] += _DRIFT**2
    joint = covariance[:, pair] + covariance[:, -1]
    variance = joint[pair] + joint[-1] + _NOISE**2
    most = _OUTLIER * np.sqrt(variance)
    mean += joint / variance * np.clip(log_seconds - mean[pair] - mean[-1], -most, most)
    covariance -= np.outer(joint, joint) / variance

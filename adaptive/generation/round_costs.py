"""What a round of self-speculative decoding costs, for every draft and length: in layers, or in measured seconds.

DEL counts the layers that run one after the other, as if checking many tokens took as long as running one. On an
accelerator that is nearly so. On a CPU it is not, and nowhere is a drafted token's head free. Seconds of a few rounds
tell what a layer costs for a token that is drafted, for a pass that checks, and for every token in that pass.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import nnls

_PROBES = 3  # turns in which each pair is tried, at least
_ROUNDS = 30  # of all pairs together at least: for some 15 after a program was loaded a CPU takes a fifth longer


class RoundCosts:
  """Cost of a round, by draft and length.

  Args:
    layers: that each draft runs. full: layers of the model. lengths: that a round may draft.
    overhead: of a drafted token beside its layers, in layers, while no seconds are known.
  """

  def __init__(self, layers: Sequence[int], full: int, lengths: Sequence[int], overhead: float):
    below, tokens = np.array(layers, np.float64)[:, None], np.array(lengths, np.float64)[None]
    self._counted = tokens * (below + overhead) + full  # DEL, eq. 4: d l + L
    above = full - below + 0 * tokens
    # A drafted token's layers, which the last of them runs too; its head; a pass over the layers above; their tokens.
    self._parts = np.stack([(tokens + 1) * below, tokens + 0 * below, above, above * (tokens + 1)], axis=-1)
    self._seconds: dict[tuple[int, int], float] = {}
    self._beside: tuple[int, int] | None = None
    self._now = math.nan  # seconds that the pair beside took last
    self._ratios: dict[tuple[int, int], list[float]] = {}  # to `_now`
    shape = self._counted.shape
    # No draft; a middling one, short; and it, the cheapest and the dearest as long as the model's layers take. What a
    # round costs is a sum of four parts.
    fits, middle = (tokens * below <= full) | (tokens == tokens.min()), shape[0] // 2
    long = [(draft, int(np.flatnonzero(fits[draft])[-1])) for draft in (0, middle, shape[0] - 1)]
    pairs = dict.fromkeys(((0, 0), (middle, 0 if long[1][1] == 1 else min(1, shape[1] - 1)), *long))
    self._untried: list[tuple[int, int]] = []
    self._before: tuple[int, int] | None = None
    self.try_out(pairs)

  @property
  def timed(self) -> set[tuple[int, int]]:
    """Pairs whose own seconds are known."""
    return set(self._seconds)

  def try_out(self, pairs: Iterable[tuple[int, int]], beside: tuple[int, int] | None = None) -> None:
    """Has these pairs timed, in turns.

    Each comes twice in a row, for a program that follows another begins in cold memory, and only one that follows
    itself takes as long as it will.

    Args:
      beside: a pair whose seconds are known, which takes turns with them: the median of their ratios to it counts,
        since seconds of another minute may be those of a slower machine. Without it the least seconds count.
    """
    self._ratios, self._beside = {}, beside
    twice = [pair for pair in (*([beside] if beside else []), *pairs) for _ in range(2)]
    self._untried += twice * max(_PROBES, math.ceil(_ROUNDS / len(twice)))

  def begin(self) -> None:
    """Other work comes before the next round: a pass over prompts, with caches of its own."""
    self._before = None

  def probe(self) -> tuple[int, int] | None:
    """A draft and a length, both as indices, to take next for the sake of its seconds; None when enough is known."""
    return self._untried.pop(0) if self._untried else None

  def observe(self, draft: int, length: int, seconds: float) -> None:
    """What a round of this pair, both as indices, took by itself, with nothing before it still under way."""
    pair = draft, length
    warm, self._before = self._before == pair, pair
    if not warm:
      return
    if self._beside is None:
      self._seconds[pair] = min(seconds, self._seconds.get(pair, seconds))
    elif pair == self._beside:
      self._now = seconds
    else:
      ratios = self._ratios.setdefault(pair, [])
      ratios.append(seconds / self._now)
      self._seconds[pair] = statistics.median(ratios) * self._seconds[self._beside]

  @property
  def table(self) -> np.ndarray:
    """Costs [e, l]: seconds, those of untried pairs from those of the tried ones; layers while no round was timed."""
    if not self._seconds:
      return self._counted
    pairs, seconds = tuple(np.array(list(self._seconds)).T), np.array(list(self._seconds.values()))
    # Relative errors count: a long round must not decide alone. The parts are not negative.
    weights, _ = nnls(self._parts[pairs] / seconds[:, None], np.ones(len(seconds)))
    table = self._parts @ weights
    table[pairs] = seconds
    return table

"""Which draft a round of self-speculative decoding takes, and how many tokens of it: always the same, or the best yet.

DEL (Zarch et al., arXiv 2504.05598) keeps, for every exit, how often its token was the model's, from passes that are
made anyway, and takes the exit and the length with the most expected tokens per layer that runs one after the other,
or, since layers are not what a user waits for, per second (`adaptive.generation.round_costs`).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from adaptive.config import require
from adaptive.generation.round_costs import RoundCosts

_BETTER = 1.03  # another draft or length must promise so much more than the last: each is a program to compile


@dataclasses.dataclass(frozen=True)
class Fixed:
  """LayerSkip: one draft, one length.

  Attributes:
    draft: its place in the ladder. tokens: of a round.
  """

  draft: int
  tokens: int

  def __post_init__(self):
    require(self.tokens >= 1, f"draft_tokens={self.tokens} must be at least 1")

  @property
  def most(self) -> int:
    return self.tokens

  @property
  def stops(self) -> bool:
    """Whether a round may draft fewer tokens."""
    return False

  @property
  def drafts(self) -> tuple[int, ...]:
    return (self.draft,)

  def choose(self) -> tuple[int, int, float]:
    """Draft, tokens, and the probability below which it stops."""
    return self.draft, self.tokens, 0.0

  def observe(self, metrics: Mapping[str, tuple], taken: tuple[int, int] | None, seconds: float | None) -> None:
    """Nothing is learned."""


class Chooser:
  """DEL: the draft and the length that promise most, from how often each draft was right of late.

  Args:
    layers: that each draft runs, in the order of the ladder. full: layers of the model.
    lengths: of which a round takes one; each with each draft is a program.
    overhead: what drafting a token costs beside the draft's layers, in layers: embedding, head, choice of a token. The
      paper counts none.
    decay: of what was counted, in each round (omega in the paper).
    stop_when_unsure: whether a draft ends early when it is less sure than midway between right and wrong ones, as in
      the paper; it pays where drafted tokens are dear.
    measured: whether rounds are judged by the seconds they take rather than by layers. What is chosen then depends on
      the machine, and so does what is sampled; greedy decoding has one output.
  """

  def __init__(
    self,
    layers: Sequence[int],
    full: int,
    lengths: Sequence[int] = (1, 2, 4, 6, 8, 12, 16),
    overhead: float = 1.0,
    decay: float = 0.95,
    stop_when_unsure: bool = False,
    measured: bool = False,
  ):
    require(len(layers) > 0, "there is no draft to choose from")
    self._lengths, self._measured, self._last = np.array(lengths), measured, None
    self._costs = RoundCosts(layers, full, lengths, overhead)
    self._decay, self.stops = decay, stop_when_unsure
    self._agreed, self._seen = np.zeros((2, len(layers)))
    self._sure = {"sure_if_right": np.zeros(2), "sure_if_wrong": np.zeros(2)}

  @property
  def most(self) -> int:
    return int(self._lengths.max())

  @property
  def drafts(self) -> tuple[int, ...]:
    return tuple(range(len(self._seen)))

  @property
  def rates(self) -> np.ndarray:
    """How often each draft's token is the model's, [e]; a half where nothing is known."""
    return (self._agreed + 0.5) / (self._seen + 1.0)

  def choose(self) -> tuple[int, int, float]:
    """Draft, tokens, and the probability below which it stops."""
    pair = self._costs.probe() if self._measured else None
    if pair is None:
      gain = expected_tokens(self.rates[:, None], self._lengths[None]) / self._costs.table
      pair = np.unravel_index(np.argmax(gain), gain.shape)
      if self._measured and self._last is not None and gain[pair] < _BETTER * gain[self._last]:
        pair = self._last
      self._last = pair
    draft, length = pair
    return int(draft), int(self._lengths[length]), self._doubt()

  def _doubt(self) -> float:
    right, wrong = self._sure.values()
    if not self.stops or right[1] == 0 or wrong[1] == 0:
      return 0.0
    return float((right[0] / right[1] + wrong[0] / wrong[1]) / 2)

  def observe(self, metrics: Mapping[str, tuple], taken: tuple[int, int] | None, seconds: float | None) -> None:
    """What a round, or the prompts, showed.

    Args:
      taken: draft and tokens of the round; None for prompts. seconds: that it took; None where nobody knows.
    """
    found = np.array([metrics[f"agrees/{draft}"] for draft in self.drafts], np.float64)
    self._agreed = self._decay * self._agreed + found[:, 0]
    self._seen = self._decay * self._seen + found[:, 1]
    for name, kept in self._sure.items():
      if name in metrics:
        self._sure[name] = self._decay * kept + np.array(metrics[name], np.float64)
    if self._measured and taken is not None and seconds is not None:
      draft, tokens = taken
      self._costs.observe(draft, int(np.flatnonzero(self._lengths == tokens)[0]), seconds)


def expected_tokens(rate: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Of a round that drafts so many, each right with this probability: (1 - a^(d + 1)) / (1 - a), DEL, eq. 4.

  One more is right after the last accepted.
  """
  rate = np.minimum(rate, 1 - 1e-9)
  return (1 - rate ** (tokens + 1)) / (1 - rate)

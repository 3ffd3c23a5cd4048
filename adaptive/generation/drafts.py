"""Which draft a round of self-speculative decoding takes, and how many tokens of it: always the same, or the best yet.

DEL (Zarch et al., arXiv 2504.05598) keeps, for every exit, how often its token was the model's, from passes that are
made anyway, and takes the exit and the length with the most expected tokens per layer that runs one after the other.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from adaptive.config import require


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

  def observe(self, metrics: Mapping[str, tuple]) -> None:
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
  """

  def __init__(
    self,
    layers: Sequence[int],
    full: int,
    lengths: Sequence[int] = (1, 2, 4, 6, 8, 12, 16),
    overhead: float = 1.0,
    decay: float = 0.95,
    stop_when_unsure: bool = False,
  ):
    require(len(layers) > 0, "there is no draft to choose from")
    self._layers, self._full, self._lengths = np.array(layers) + overhead, full, np.array(lengths)
    self._decay, self.stops = decay, stop_when_unsure
    self._agreed, self._seen = np.zeros((2, len(layers)))
    self._sure = {"sure_if_right": np.zeros(2), "sure_if_wrong": np.zeros(2)}

  @property
  def most(self) -> int:
    return int(self._lengths.max())

  @property
  def drafts(self) -> tuple[int, ...]:
    return tuple(range(len(self._layers)))

  @property
  def rates(self) -> np.ndarray:
    """How often each draft's token is the model's, [e]; a half where nothing is known."""
    return (self._agreed + 0.5) / (self._seen + 1.0)

  def choose(self) -> tuple[int, int, float]:
    """Draft, tokens, and the probability below which it stops."""
    gain = tokens_per_layer(self.rates[:, None], self._lengths[None], self._layers[:, None], self._full)
    draft, length = np.unravel_index(np.argmax(gain), gain.shape)
    return int(draft), int(self._lengths[length]), self._doubt()

  def _doubt(self) -> float:
    right, wrong = self._sure.values()
    if not self.stops or right[1] == 0 or wrong[1] == 0:
      return 0.0
    return float((right[0] / right[1] + wrong[0] / wrong[1]) / 2)

  def observe(self, metrics: Mapping[str, tuple]) -> None:
    """What a round, or the prompts, showed."""
    found = np.array([metrics[f"agrees/{draft}"] for draft in self.drafts], np.float64)
    self._agreed = self._decay * self._agreed + found[:, 0]
    self._seen = self._decay * self._seen + found[:, 1]
    for name, kept in self._sure.items():
      if name in metrics:
        self._sure[name] = self._decay * kept + np.array(metrics[name], np.float64)


def tokens_per_layer(rate: np.ndarray, tokens: np.ndarray, layers: np.ndarray, full: int) -> np.ndarray:
  """TPL of DEL (eq. 4): expected tokens of a round over the layers that it runs one after the other.

  (1 - a^(d + 1)) / (1 - a) tokens, since one more is right after the last accepted; d l + L layers.
  """
  rate = np.minimum(rate, 1 - 1e-9)
  return (1 - rate ** (tokens + 1)) / (1 - rate) / (tokens * layers + full)

"""Which draft a round of self-speculative decoding takes, and how many tokens of it: always the same, or the best yet.

DEL (Zarch et al., arXiv 2504.05598) keeps, for every exit, how often its token was the model's, from passes that are
made anyway, and takes the exit and the length with the most expected tokens per layer that runs one after the other,
or, since layers are not what a user waits for, per second (`adaptive.generation.round_costs`).

Departures: a round may draft nothing, and no more than 16 tokens; another draft or length must be a little better, and
one whose seconds are little known gets a chance before it is, beside the best in turns; agreement is counted now and
then, since heads on all exits are not free, and the less often the longer the choice has stayed the same; in between,
what the drafts that run show moves the odds of all; and drafting does not stop early at a token that the draft is
unsure of, since a round is one program, whose check would be as long as ever.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adaptive.config import require
from adaptive.generation.round_costs import RoundCosts

_HOPE = 0.5  # standard deviations by which a pair may be quicker than it seems: what is new gets a chance
_RIVAL = 0.95  # share of the best pair's promise that a second must have to be run beside it
_NEW, _AGAIN = 16, 16  # rounds after a change in which a rival has every other one; later it has one of so many
MOST = 32  # tokens that a round drafts
_BETTER = 1.03  # another draft or length must promise so much more than the last: each is a program to compile


class Choice(NamedTuple):
  """Of a round.

  Attributes:
    draft: its place in the ladder. tokens: how many it proposes; 0 is a step without a draft.
    look: whether to count how often every draft agrees with the model.
  """

  draft: int
  tokens: int
  look: bool = False


@dataclasses.dataclass(frozen=True)
class Fixed:
  """LayerSkip: one draft, one length.

  Attributes:
    draft: its place in the ladder. tokens: of a round.
  """

  draft: int
  tokens: int

  def __post_init__(self):
    # A round is one program, in which every drafted token has its layers.
    require(1 <= self.tokens <= MOST, f"draft_tokens={self.tokens} must lie in 1 .. {MOST}")

  @property
  def most(self) -> int:
    return self.tokens

  @property
  def learns(self) -> bool:
    return False

  @property
  def drafts(self) -> tuple[int, ...]:
    return (self.draft,)

  def begin(self) -> None:
    """Nothing is remembered."""

  def renew(self) -> None:
    """Nothing is known of programs."""

  def choose(self) -> Choice:
    return Choice(self.draft, self.tokens)

  def observe(self, metrics: Mapping[str, tuple], taken: Choice | None, seconds: float | None = None) -> None:
    """Nothing is learned."""


class Chooser:
  """DEL: the draft and the length that promise most, from how often each draft was right of late.

  Args:
    layers: that each draft runs, in the order of the ladder. full: layers of the model.
    lengths: of which a round takes one, increasing. Each with each draft is a program to compile, as long as its
      layers: pairs whose drafted tokens run more than twice the model's layers, which promise little, are never taken.
    overhead: what drafting a token costs beside the draft's layers, in layers: embedding, head, choice of a token. The
      paper counts none.
    decay: of what was counted of a draft, each time that it is counted anew (omega in the paper).
    looks: after how many rounds the agreement of all drafts is counted anew, at first and at most: twice as many each
      time, as long as the choice stays the same. The first rounds, for their seconds, and a rival's do not count.
    measured: whether rounds are judged by the seconds they take rather than by layers. What is chosen then depends on
      the machine, and so does what is sampled; greedy decoding has one output. Seconds are of one number of rows and
      one length of caches: with others a chooser goes on from what it knows, and is less sure of it.
  """

  learns = True

  def __init__(
    self,
    layers: Sequence[int],
    full: int,
    lengths: Sequence[int] = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16),
    overhead: float = 1.0,
    decay: float = 0.95,
    looks: tuple[int, int] = (4, 128),
    measured: bool = False,
  ):
    require(len(layers) > 0, "there is no draft to choose from")
    self._lengths, self._decay, self._looks, self._measured = np.array(lengths), decay, looks, measured
    self._costs = RoundCosts(layers, full, lengths, overhead)
    self._short = self._lengths[None] * np.array(layers)[:, None] <= 2 * full
    self._short[1:, self._lengths == 0] = False  # without tokens, one draft is as good as another
    self._rounds: collections.Counter[tuple[int, int]] = collections.Counter()  # of pairs, as indices
    self._compiled: set[tuple[int, int]] = set()  # of these, with the programs at hand
    self.trials = 0  # first rounds, which were taken for the sake of their seconds
    self._start_looking()
    self._forget()

  @property
  def most(self) -> int:
    return int(self._lengths.max())

  @property
  def drafts(self) -> tuple[int, ...]:
    return tuple(range(len(self._agreed)))

  @property
  def rates(self) -> np.ndarray:
    """How often each draft's token is the model's, [e]; a half where nothing is known.

    How drafts compare is what they did where all were looked at. That may be long ago, in text that was easier or
    harder: the odds of all are moved by what those that ran showed of late. Where it was easy, those of a draft that
    did not run are moved half as far as of one that alone did, for what was easy for one need not be for another; where
    it was hard, all alike, or a draft that nobody has seen there would be the next to be taken, and so on in turns.
    """
    accepted, expected, number = self._taken.sum(axis=1)
    odds = lambda share: share / (1 - share)
    moved = odds((accepted + 0.5) / (number + 1)) / odds((expected + 0.5) / (number + 1))
    far = 0.5 + 0.5 * self._taken[2] / max(number, 1.0) if moved > 1 else 1.0
    now = moved**far * odds(self._joint)
    return now / (1 + now)

  @property
  def _joint(self) -> np.ndarray:
    """How often each draft was right where all were looked at, [e]."""
    return (self._agreed + 0.5) / (self._seen + 1.0)

  @property
  def usual(self) -> tuple[Choice, int, int] | None:
    """What most rounds took but the `trials`, how many did, and of how many; None before the first."""
    for (draft, length), number in self._rounds.most_common(1):
      return Choice(draft, int(self._lengths[length])), number, self._rounds.total()
    return None

  def _forget(self) -> None:
    self._agreed, self._seen = np.zeros(self._short.shape[0]), 0.0
    self._taken = np.zeros((3, len(self._agreed)))  # of each draft, where taken: accepted, to be expected, looked at

  def begin(self) -> None:
    """New prompts. What earlier ones showed must not change what is sampled; where nothing is sampled, it helps."""
    if not self._measured:
      self._forget()
      self._start_looking()

  def renew(self) -> None:
    """Rounds have new programs from now on, for other numbers of rows or slots."""
    self._compiled.clear()
    self._costs.renew()

  def _start_looking(self) -> None:
    self._last, self._same, self._wait, self._left = None, 0, self._looks[0], self._looks[0]

  def choose(self) -> Choice:
    """The next round's."""
    if self._measured and (probe := self._costs.probe()) is not None:
      self.trials += 1
      return Choice(probe[0], int(self._lengths[probe[1]]))
    gain = self._gain()
    best = self._best(gain)
    if best != self._last:
      self._last, self._same, self._wait, self._left = best, 0, self._looks[0], min(self._left, self._looks[0])
    self._same += 1
    if self._measured and (rival := self._rival(gain)) is not None:
      return self._choice(*rival)
    self._left -= 1
    if self._left:
      return self._choice(*best)
    self._wait = self._left = min(2 * self._wait, self._looks[1])
    return self._choice(*best)._replace(look=True)

  def _rival(self, gain: np.ndarray) -> tuple[int, int] | None:
    """Now and then the best other pair that these programs took, if it promises nearly as much.

    A machine's slow minutes are not a pair's if both had them.
    """
    if self._same % (2 if self._same <= _NEW else _AGAIN):
      return None
    near = [pair for pair in self._compiled if pair != self._last and gain[pair] > _RIVAL * gain[self._last]]
    return max(near, key=lambda pair: gain[pair], default=None)

  def _choice(self, draft: int, length: int) -> Choice:
    self._compiled.add((draft, length))
    self._rounds[draft, length] += 1
    return Choice(draft, int(self._lengths[length]))

  def _best(self, gain: np.ndarray) -> tuple[int, int]:
    """Draft and length, as indices."""
    best = _argmax(gain)
    stay = self._last is not None and gain[best] < _BETTER * gain[self._last]
    return self._last if stay else best

  def _gain(self) -> np.ndarray:
    """Tokens for their cost, as it may be, [e, l]; 0 for pairs that are never taken."""
    costs = self._costs.table * np.exp(-_HOPE * self._costs.doubt)
    return expected_tokens(self.rates[:, None], self._lengths[None]) / costs * self._short

  def observe(self, metrics: Mapping[str, tuple], taken: Choice | None, seconds: float | None = None) -> None:
    """What a round, or the prompts, showed.

    Args:
      metrics: `agrees`, of all drafts, where they were counted; `right`, of the one that was taken.
      taken: of the round; None for prompts.
      seconds: that the round took; None where nobody knows.
    """
    if self._measured and seconds is not None and taken is not None and not taken.look:  # all heads take time
      self._costs.observe(taken.draft, int(np.flatnonzero(self._lengths == taken.tokens)[0]), seconds)
    if "agrees" in metrics:
      agreed, seen = metrics["agrees"]
      self._agreed, self._seen = self._decay * self._agreed + agreed, self._decay * self._seen + seen
    if taken is not None and taken.tokens:
      accepted, seen = metrics["right"]
      self._taken *= self._decay
      self._taken[:, taken.draft] += accepted, self._joint[taken.draft] * seen, seen


def _argmax(table: np.ndarray) -> tuple[int, int]:
  draft, length = np.unravel_index(np.argmax(table), table.shape)
  return int(draft), int(length)


def expected_tokens(rate: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Of a round that drafts so many, each right with this probability: (1 - a^(d + 1)) / (1 - a), DEL, eq. 4.

  One more is right after the last accepted.
  """
  rate = np.minimum(rate, 1 - 1e-9)
  return (1 - rate ** (tokens + 1)) / (1 - rate)

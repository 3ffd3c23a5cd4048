"""Questions as rows in which what several options begin with, the prompt first of all, stands once.

So an option costs the tokens that no earlier one has, and the head is asked only where a token of an option is
predicted, once for all options that have it there.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from adaptive.config import require
from adaptive.data.pieces import Piece, continuation
from adaptive.data.questions import Question

MOST_OPTIONS = 31  # sets of options are the bits of an int32
STRIDE = 8  # tokens are filled up to its multiples, predictions to halves of that: each shape is compiled once


class Tree(NamedTuple):
  """One question.

  Sets of options are bit masks: bit o says whether option o is in it.

  Attributes:
    inputs, positions, options: of each token, int32 [t], and which options read it; none reads what is only filling.
    source, target, scored: of each prediction that is scored, int32 [p]: index of the token that makes it, the token
      predicted, and for which options; for none where it is only filling.
    sizes: tokens that are scored of each option, int [o].
  """

  inputs: np.ndarray
  positions: np.ndarray
  options: np.ndarray
  source: np.ndarray
  target: np.ndarray
  scored: np.ndarray
  sizes: np.ndarray

  @property
  def shape(self) -> tuple[int, int]:
    """Of the program that scores it."""
    return len(self.inputs), len(self.source)


def plant(question: Question, encode: Callable[[str], Sequence[int]], prefix: Sequence[int], max_len: int) -> Tree:
  """The question's row, every option tokenised together with the prompt.

  Args:
    prefix: tokens that stand before every prompt, and are not scored.

  Raises:
    ConfigError: an option with its prompt is longer than `max_len` tokens; more than 31 options; nothing that they
      share stands before the first tokens that are scored.
  """
  texts = question.options or (question.answer_text,)
  require(len(texts) <= MOST_OPTIONS, f"question {question.id!r} has {len(texts)} options, more than {MOST_OPTIONS}")
  pieces = [continuation(encode, prefix, question.prompt, text) for text in texts]
  longest = max(len(piece.tokens) for piece in pieces)
  require(longest <= max_len + 1, f"question {question.id!r} has {longest} tokens, more than max_len={max_len}")
  first = {int(piece.tokens[0]) for piece in pieces}
  require(len(first) == 1, "a question's options share no token with its prompt: the model needs one before every text")
  return _tree(pieces)


def _tree(pieces: Sequence[Piece]) -> Tree:
  tokens: dict[tuple[int, int], list[int]] = {}  # (index of the token before, token): token, position, options
  predictions: dict[tuple[int, int], list[int]] = {}  # (index of the source, target): source, target, options
  index: dict[tuple[int, int], int] = {}
  for option, piece in enumerate(pieces):
    row, before = [int(token) for token in piece.tokens], -1
    for place, token in enumerate(row):
      key = (before, token)
      if place >= piece.given:
        predictions.setdefault(key, [before, token, 0])[-1] |= 1 << option
      if place + 1 < len(row):  # nothing is predicted from an option's last token
        tokens.setdefault(key, [token, place, 0])[-1] |= 1 << option
        before = index.setdefault(key, len(index))
  columns = _columns(tokens.values(), STRIDE)
  sizes = np.array([len(piece.tokens) - piece.given for piece in pieces])
  return Tree(*columns, *_columns(predictions.values(), len(columns[0]) // 2), sizes)


def _columns(rows: Iterable[Sequence[int]], stride: int) -> list[np.ndarray]:
  rows = list(rows)
  filling = [(0, 0, 0)] * (-len(rows) % stride)
  return list(np.array([*rows, *filling], np.int32).T)

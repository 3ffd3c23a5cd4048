"""Questions as rows in which the prompt stands once, and every option after it sees the prompt and itself.

So an option costs its own tokens, and the head is asked only where a token of an option is predicted.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from adaptive.config import require
from adaptive.data.pieces import Piece, continuation
from adaptive.data.questions import Question

STRIDE = 16  # tokens are filled up to its multiples, predictions to halves of that: each shape is compiled once


class Tree(NamedTuple):
  """One question.

  Attributes:
    inputs, positions, branch: of each token, int32 [t]; branch 0 is the prompt, o + 1 option o, -1 is filling.
    source, target, option: of each prediction that is scored, int32 [p]: index of the token that makes it, the token
      predicted, and whose it is; -1 is padding.
    options: how many there are.
  """

  inputs: np.ndarray
  positions: np.ndarray
  branch: np.ndarray
  source: np.ndarray
  target: np.ndarray
  option: np.ndarray
  options: int

  @property
  def shape(self) -> tuple[int, int]:
    """Of the program that scores it."""
    return len(self.inputs), len(self.source)


def plant(question: Question, encode: Callable[[str], Sequence[int]], prefix: Sequence[int], max_len: int) -> Tree:
  """The question's row, every option tokenised together with the prompt.

  Args:
    prefix: tokens that stand before every prompt, and are not scored.

  Raises:
    ConfigError: an option with its prompt is longer than `max_len` tokens.
  """
  texts = question.options or (question.answer_text,)
  pieces = [continuation(encode, prefix, question.prompt, text) for text in texts]
  longest = max(len(piece.tokens) for piece in pieces)
  require(longest <= max_len + 1, f"question {question.id!r} has {longest} tokens, more than max_len={max_len}")
  return _tree(pieces)


def _tree(pieces: Sequence[Piece]) -> Tree:
  rows = [list(map(int, piece.tokens)) for piece in pieces]
  # Where an option merges with the prompt's last token, the prompt that all share is shorter.
  same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows))
  shared = min([len(list(same)), *(piece.given for piece in pieces)])
  require(shared > 0, "a question's options share no token with its prompt: the model needs one before every text")
  tokens = [(token, place, 0) for place, token in enumerate(rows[0][:shared])]
  predictions = []
  for option, (row, piece) in enumerate(zip(rows, pieces)):
    start = len(tokens) - shared  # the row's place p is the tree's p + start, from the branch on
    tokens += [(row[place], place, option + 1) for place in range(shared, len(row) - 1)]
    for place in range(piece.given, len(row)):
      source = place - 1 if place - 1 < shared else place - 1 + start
      predictions.append((source, row[place], option))
  columns = _columns(tokens, STRIDE)
  return Tree(*columns, *_columns(predictions, len(columns[0]) // 2), len(rows))


def _columns(rows: Sequence[tuple[int, ...]], stride: int) -> list[np.ndarray]:
  filling = [(0, 0, -1)] * (-len(rows) % stride)
  return list(np.array([*rows, *filling], np.int32).T)

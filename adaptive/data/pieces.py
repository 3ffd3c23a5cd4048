"""A text after its context, as tokens: cut in one way wherever an answer is learned, searched for or scored."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
  """Tokens of which some are given, and the others are scored.

  Attributes:
    tokens: ids. given: how many of them, from the first on, are not scored; at least one.
  """

  tokens: Sequence[int]
  given: int


def continuation(
  encode: Callable[[str], Sequence[int]], prefix: Sequence[int], context: str, text: str, max_len: int | None = None
) -> Piece:
  """A text after its context, as one piece.

  Both are tokenised together, as they would be written, and split where the context's own tokens end. Blanks at the
  context's end count to the text, where tokenizers of words put them.

  Args:
    prefix: tokens that stand before every context; where neither has one, the first of the text is given.
    max_len: predictions that a row has room for; what is too long loses its beginning. None: any number.
  """
  blanks = len(context) - len(context.rstrip())
  if blanks and context.strip():
    context, text = context[:-blanks], context[-blanks:] + text
  before = [*prefix, *encode(context)] if context else [*prefix]
  tokens = [*prefix, *encode(context + text)]
  number = max(len(tokens) - len(before), 1)
  kept = tokens if max_len is None else tokens[-(max_len + 1) :]
  return Piece(kept, max(len(kept) - number, 1))

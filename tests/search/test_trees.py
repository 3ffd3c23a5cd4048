"""Questions as trees: against the rows that each option would be by itself."""

import re

import numpy as np
import pytest

from adaptive.config import ConfigError
from adaptive.data.pieces import continuation
from adaptive.data.questions import Question
from adaptive.search import trees

PREFIX = (99,)


def letters(text):
  return [ord(letter) - ord("a") for letter in text.replace(" ", "")]


def merging(text):
  """Letters, of which "bc" and "bcd" are tokens of their own."""
  return [{"bc": 50, "bcd": 51}.get(part) or ord(part) - ord("a") for part in re.findall("bcd|bc|.", text)]


def planted(prompt, *options, encode=letters, prefix=PREFIX, max_len=40):
  answer = 0 if len(options) > 1 else options[0]
  question = Question("q", prompt, options if len(options) > 1 else (), answer)
  return trees.plant(question, encode, prefix, max_len)


def seen_by(tree, token):
  """Tokens that one sees, itself among them, in order of their positions; and those positions."""
  branch = tree.branch[token]
  seen = [i for i in range(token + 1) if tree.branch[i] in (0, branch)]
  return tree.inputs[seen].tolist(), tree.positions[seen].tolist()


def check(tree, prompt, options, encode, prefix=PREFIX):
  """Every scored token of every option is predicted once, by who has read all that stands before it, and no more."""
  pieces = [continuation(encode, prefix, prompt, option) for option in options]
  wanted = [
    (list(piece.tokens[:place]), piece.tokens[place], which)
    for which, piece in enumerate(pieces)
    for place in range(piece.given, len(piece.tokens))
  ]
  real = tree.option >= 0
  found = []
  for source, target, option in zip(tree.source[real], tree.target[real], tree.option[real]):
    tokens, positions = seen_by(tree, source)
    assert positions == [*range(len(tokens))]
    found.append((tokens, target, option))
  assert found == wanted
  assert tree.options == len(options)
  assert not real[np.argmin(real) :].any() or real.all()  # padding comes last


def test_a_tree_worked_out_by_hand():
  tree = planted("ab", "cd", "efg", prefix=())
  size, number = 2 + 1 + 2, 5
  assert tree.shape == (16, 8)
  assert tree.inputs[:size].tolist() == [0, 1, 2, 4, 5]  # no option's last token: nothing is predicted from there
  assert tree.positions[:size].tolist() == [0, 1, 2, 2, 3]
  assert tree.branch.tolist() == [0, 0, 1, 2, 2] + [-1] * 11
  assert tree.source[:number].tolist() == [1, 2, 1, 3, 4]
  assert tree.target[:number].tolist() == [2, 3, 4, 5, 6]
  assert tree.option.tolist() == [0, 0, 1, 1, 1, -1, -1, -1]
  assert all(column.dtype == np.int32 for column in tree[:6])


@pytest.mark.parametrize(
  ("prompt", "options"),
  [
    ("ab", ["c", "d"]),
    ("abcabc", ["a", "aaaaaaaaa", "ab"]),  # one is the beginning of another
    ("a", ["bcdefghij" * 2, "klm", "n", "opq", "rstu"]),
    ("ab", ["same", "same"]),
    ("ab ", ["c", "d"]),
    ("ab", ["c"]),
    ("ab", ["cdefgh" * 4]),
  ],
)
@pytest.mark.parametrize("prefix", [(), PREFIX, (99, 98)])
def test_every_option_is_read_as_if_it_were_alone(prompt, options, prefix):
  tree = planted(prompt, *options, prefix=prefix)
  check(tree, prompt, options, letters, prefix)


def test_the_prompt_stands_there_once():
  tree = planted("abcdefgh", *["xy"] * 4)
  assert np.sum(tree.branch == 0) == 9
  assert np.sum(tree.branch > 0) == 4
  assert np.sum(tree.branch == -1) == 16 - 13


def test_an_option_that_merges_with_the_prompt_s_last_token():
  """The prompt that all share ends before it, and the others bring their own copy of what is cut off."""
  options = ["c", "x", "cd", "cx"]
  tree = planted("ab", *options, encode=merging)
  check(tree, "ab", options, merging)
  assert tree.inputs[tree.branch == 0].tolist() == [99, 0]
  assert tree.inputs[tree.branch == 2].tolist() == [1]  # the b that is one no more after c
  assert tree.target[tree.option >= 0].tolist() == [50, 23, 51, 23]
  check(planted("ab", "c", encode=merging), "ab", ["c"], merging)


def test_sizes_are_few():
  shapes = {planted("a" * size, "b" * options, "c").shape for size in range(1, 14) for options in range(1, 12)}
  assert shapes == {(16, 8), (16, 16), (32, 16)}


def test_a_question_that_is_too_long_is_refused():
  fits = planted("abc", "de", "f", max_len=5)
  assert fits.options == 2
  with pytest.raises(ConfigError, match="question 'q' has 6 tokens, more than max_len=4"):
    planted("abc", "de", "f", max_len=4)


def test_a_model_that_is_given_no_token_is_refused():
  with pytest.raises(ConfigError, match="share no token with its prompt"):
    planted("b", "c", "x", encode=merging, prefix=())

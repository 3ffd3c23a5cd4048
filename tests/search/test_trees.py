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
  options = tree.options[token]
  seen = [i for i in range(token + 1) if tree.options[i] & options == options]
  return tree.inputs[seen].tolist(), tree.positions[seen].tolist()


def check(tree, prompt, options, encode, prefix=PREFIX):
  """Every scored token of every option is predicted once, by who has read all that stands before it, and no more."""
  pieces = [continuation(encode, prefix, prompt, option) for option in options]
  wanted = [
    (list(piece.tokens[:place]), piece.tokens[place], which)
    for which, piece in enumerate(pieces)
    for place in range(piece.given, len(piece.tokens))
  ]
  real = tree.scored != 0
  found = []
  for source, target, scored in zip(tree.source[real], tree.target[real], tree.scored[real]):
    tokens, positions = seen_by(tree, source)
    assert positions == [*range(len(tokens))]
    found += [(tokens, target, which) for which in range(len(options)) if scored >> which & 1]
  assert sorted(found) == sorted(wanted)
  beginnings = {(*piece.tokens[:place],) for piece in pieces for place in range(1, len(piece.tokens))}
  assert np.sum(tree.options != 0) == len(beginnings)  # none stands there twice
  assert np.sum(real) == len({(*tokens, target) for tokens, target, _ in wanted})
  assert tree.sizes.tolist() == [len(piece.tokens) - piece.given for piece in pieces]
  for used in (real, tree.options != 0):
    assert not used[np.argmin(used) :].any() or used.all()  # padding comes last


def test_a_tree_worked_out_by_hand():
  tree = planted("ab", "cd", "efg", prefix=())
  size, number = 2 + 1 + 2, 5
  assert tree.shape == (8, 8)
  assert tree.inputs[:size].tolist() == [0, 1, 2, 4, 5]  # no option's last token: nothing is predicted from there
  assert tree.positions[:size].tolist() == [0, 1, 2, 2, 3]
  assert tree.options.tolist() == [3, 3, 1, 2, 2] + [0] * 3
  assert tree.source[:number].tolist() == [1, 2, 1, 3, 4]
  assert tree.target[:number].tolist() == [2, 3, 4, 5, 6]
  assert tree.scored.tolist() == [1, 1, 2, 2, 2, 0, 0, 0]
  assert all(column.dtype == np.int32 for column in tree[:6])


@pytest.mark.parametrize(
  ("prompt", "options"),
  [
    ("ab", ["c", "d"]),
    ("abcabc", ["a", "aaaaaaaaa", "ab"]),  # one is the beginning of another
    ("a", ["bcdefghij" * 2, "klm", "n", "opq", "rstu"]),
    ("ab", ["same", "same"]),
    ("ab", ["some words of many", "some words of few", "some more", "no word"]),
    ("ab", list("cdefghijklmnopqrstuvwxyzcdefghi")),
    ("ab ", ["c", "d"]),
    ("ab", ["c"]),
    ("ab", ["cdefgh" * 4]),
  ],
)
@pytest.mark.parametrize("prefix", [(), PREFIX, (99, 98)])
def test_every_option_is_read_as_if_it_were_alone(prompt, options, prefix):
  tree = planted(prompt, *options, prefix=prefix)
  check(tree, prompt, options, letters, prefix)


def test_what_options_begin_with_stands_there_once():
  tree = planted("ab", "cdef", "cdg", "cdef", "hi", prefix=())
  assert tree.inputs[:6].tolist() == [0, 1, 2, 3, 4, 7]  # a b c d e h
  assert tree.options.tolist() == [15, 15, 7, 7, 5, 8] + [0] * 2
  assert tree.source.tolist() == [1, 2, 3, 4, 3, 1, 5, 0]
  assert tree.target.tolist() == [2, 3, 4, 5, 6, 7, 8, 0]
  assert tree.scored.tolist() == [7, 7, 5, 5, 2, 8, 8, 0]
  assert tree.sizes.tolist() == [4, 3, 4, 2]


def test_an_option_that_merges_with_the_prompt_s_last_token():
  """The prompt that all share ends before it, and the others bring their own copy of what is cut off."""
  options = ["c", "x", "cd", "cx"]
  tree = planted("ab", *options, encode=merging)
  check(tree, "ab", options, merging)
  assert tree.inputs[tree.options == 15].tolist() == [99, 0]
  assert tree.inputs[tree.options == 2].tolist() == [1]  # the b that is one no more after c
  assert tree.target[tree.scored != 0].tolist() == [50, 23, 51, 23]
  check(planted("ab", "c", encode=merging), "ab", ["c"], merging)


def test_sizes_are_few():
  shapes = {planted("a" * size, "b" * options, "c").shape for size in range(1, 14) for options in range(1, 12)}
  assert shapes == {(8, 4), (8, 8), (16, 8), (16, 16), (24, 12)}


def test_a_question_that_is_too_long_is_refused():
  fits = planted("abc", "de", "f", max_len=5)
  assert len(fits.sizes) == 2
  with pytest.raises(ConfigError, match="question 'q' has 6 tokens, more than max_len=4"):
    planted("abc", "de", "f", max_len=4)


def test_too_many_options_are_refused():
  with pytest.raises(ConfigError, match="question 'q' has 32 options, more than 31"):
    planted("a", *["b"] * 32)


def test_a_model_that_is_given_no_token_is_refused():
  with pytest.raises(ConfigError, match="share no token with its prompt"):
    planted("b", "c", "x", encode=merging, prefix=())

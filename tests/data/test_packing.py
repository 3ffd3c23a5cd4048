"""Packing against a slow, obvious reference."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptive.data import packing, tokenizers
from adaptive.data.sources import Document

FIELDS = ("inputs", "targets", "segment_ids", "positions")


class SpelledTokenizer:
  """A text of digits separated by spaces is its own list of ids; bos and eos differ."""

  def __init__(self, vocab_size=12, bos=10, eos=11):
    self.vocab_size, self.bos, self.eos = vocab_size, bos, eos

  def encode(self, text):
    return np.array([int(word) for word in text.split()], np.int32)


def reference_rows(token_lists, bos, eos, seq_len):
  """Rows as lists of (input, target, segment, position), made one prediction at a time."""
  rows = [[]]
  segment = 0
  for tokens in token_lists:
    segment, position = segment + 1, 0
    whole = [bos, *tokens, eos]
    for i in range(len(whole) - 1):
      if len(rows[-1]) == seq_len:
        rows.append([])
        segment, position = 1, 0
      rows[-1].append((whole[i], whole[i + 1], segment, position))
      position += 1
    if len(rows[-1]) == seq_len:
      rows.append([])
      segment = 0
  if not rows[-1]:
    rows.pop()
  return [row + [(0, 0, 0, 0)] * (seq_len - len(row)) for row in rows]


def make(token_lists, seq_len, tokenizer=None):
  documents = [Document(str(i), " ".join(map(str, tokens))) for i, tokens in enumerate(token_lists)]
  return packing.pack(documents, tokenizer or SpelledTokenizer(), seq_len)


TOKEN_LISTS = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=8)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(TOKEN_LISTS, st.integers(2, 9))
def test_rows_equal_the_reference(token_lists, seq_len):
  packed = make(token_lists, seq_len)
  expected = reference_rows(token_lists, 10, 11, seq_len)
  assert len(packed) == len(expected)
  for row, want in zip(packed, expected):
    assert [*zip(*(row[name].tolist() for name in FIELDS))] == want
    assert all(row[name].dtype == np.int32 and row[name].shape == (seq_len,) for name in FIELDS)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(TOKEN_LISTS, st.integers(2, 9))
def test_every_prediction_appears_exactly_once_and_none_crosses_documents(token_lists, seq_len):
  # Ids that occur once in the whole corpus: a pair then tells which prediction it is.
  unique, used = [], 0
  for tokens in token_lists:
    unique.append(list(range(used, used + len(tokens))))
    used += len(tokens)
  bos, eos = used, used + 1
  packed = make(unique, seq_len, SpelledTokenizer(used + 2, bos, eos))
  wanted = collections.Counter()
  for tokens in unique:
    wanted.update(zip([bos, *tokens], [*tokens, eos]))
  found = collections.Counter()
  for row in packed:
    real = row["segment_ids"] > 0
    found.update(zip(row["inputs"][real].tolist(), row["targets"][real].tolist()))
  assert found == wanted
  assert packed.num_predictions == found.total()


def test_only_the_end_of_the_last_row_is_padding():
  packed = make([[1, 2, 3], [], [4]], seq_len=4)
  padding = np.concatenate([row["segment_ids"] == 0 for row in packed])
  assert padding.tolist() == [False] * 7 + [True]


def test_positions_restart_in_each_segment_and_stay_below_seq_len():
  packed = make([[1] * 9, [2]], seq_len=4)
  assert [row["positions"].tolist() for row in packed] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]]
  assert [row["segment_ids"].tolist() for row in packed] == [[1] * 4, [1] * 4, [1, 1, 2, 2]]


def test_bytes_count_utf8_not_characters():
  packed = packing.pack([Document("a", "é"), Document("b", "xyz")], tokenizers.ByteTokenizer(), 4)
  assert packed.num_bytes == 5
  assert packed.num_predictions == 3 + 4
  assert packed.bytes_per_prediction == pytest.approx(5 / 7)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_stored_small_but_whole(vocab_size, dtype):
  packed = make([[vocab_size - 1]], 2, SpelledTokenizer(vocab_size, 0, 1))
  assert packed.tokens.dtype == dtype
  assert packed[0]["targets"].tolist() == [vocab_size - 1, 1]


@pytest.mark.parametrize("bad", [-1, 12])
def test_ids_outside_the_vocabulary_are_refused(bad):
  with pytest.raises(ValueError, match=r"'0': token ids .* lie outside 0 \.\. 11"):
    make([[1, bad]], 4)


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_outside_the_range_are_refused(index):
  with pytest.raises(IndexError, match="of 2"):
    make([[1, 2, 3, 4]], 4)[index]

"""Documents as rows of a fixed number of predictions, none lost and none padded but at the very end.

A document is [bos] tokens [eos], and a prediction is a pair (token i, token i + 1) of one document: n tokens make n + 1
predictions, and no document predicts another. The predictions of all documents, in order, are cut into rows of
`seq_len`. A document that crosses a row's end goes on in the next row as a new segment, whose positions start at 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tqdm

from adaptive.config import ConfigError
from adaptive.data.sources import Document
from adaptive.data.tokenizers import Tokenizer

FIELDS = ("inputs", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """A sequence of rows, each built when asked for.

  Attributes:
    tokens: every document with its bos and eos, one after the other; uint16 if the ids fit, else uint32.
    starts: int64 [documents + 1], the number of each document's first prediction, and the number of all predictions.
    seq_len: predictions in a row.
    num_bytes: UTF-8 bytes of the documents.
  """

  tokens: np.ndarray
  starts: np.ndarray
  seq_len: int
  num_bytes: int

  @property
  def num_predictions(self) -> int:
    """Predictions in all rows: every token but the documents' bos is predicted once."""
    return int(self.starts[-1])

  @property
  def bytes_per_prediction(self) -> float:
    """Turns a loss per prediction into one per byte, which compares across tokenizers."""
    return self.num_bytes / self.num_predictions

  def __len__(self) -> int:
    return -(-self.num_predictions // self.seq_len)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """One row: `inputs`, `targets`, `segment_ids` (1, 2, ... in the row; 0 is padding), `positions`; int32 [t] each.

    Padding, at the end of the last row only, is 0 in all four.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    start = index * self.seq_len
    stop = min(start + self.seq_len, self.num_predictions)
    first, last = np.searchsorted(self.starts, (start, stop - 1), side="right") - 1
    begins = np.maximum(self.starts[first : last + 1], start)
    segment = np.repeat(np.arange(len(begins)), np.diff(begins, append=stop))
    predictions = np.arange(start, stop)
    # A document has one token more than predictions, so each earlier document shifts the token's index by one.
    where = predictions + first + segment
    row = np.zeros((4, self.seq_len), np.int32)
    row[:, : stop - start] = (
      self.tokens[where],
      self.tokens[where + 1],
      segment + 1,
      predictions - begins[segment],
    )
    return dict(zip(FIELDS, row))

  def padding_row(self) -> dict[str, np.ndarray]:
    """A row without predictions, shaped like any other."""
    return dict(zip(FIELDS, np.zeros((4, self.seq_len), np.int32)))


def pack(documents: Sequence[Document], tokenizer: Tokenizer, seq_len: int) -> PackedRows:
  """Tokenises documents; shows progress when that takes long.

  Raises:
    ConfigError: the tokenizer gave an id outside its own vocabulary (on a device this would pass unseen).
  """
  parts, starts = [stored([], tokenizer)], np.zeros(len(documents) + 1, np.int64)
  for i, document in enumerate(tqdm.tqdm(documents, desc="tokenise", unit="document", delay=2.0, disable=None)):
    ids = np.concatenate(([tokenizer.bos], tokenizer.encode(document.text), [tokenizer.eos]))
    parts.append(stored(ids, tokenizer, document.name))
    starts[i + 1] = starts[i] + len(ids) - 1
  num_bytes = sum(len(document.text.encode("utf-8")) for document in documents)
  return PackedRows(np.concatenate(parts), starts, seq_len, num_bytes)


def stored(ids: Sequence[int], tokenizer: Tokenizer, name: str = "") -> np.ndarray:
  """Ids [t] of the named text in the smallest type that holds all of the tokenizer's; ConfigError for any other."""
  ids = np.asarray(ids, np.int64)
  if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
    found = f"{ids.min()} .. {ids.max()}"
    raise ConfigError(f"{name!r}: token ids {found} lie outside 0 .. {tokenizer.vocab_size - 1}")
  return ids.astype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

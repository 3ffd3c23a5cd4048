"""Questions as rows: one question with its right answer in each, of which the answer is scored.

A row is [prefix] prompt answer, cut into predictions (token i, token i + 1) like a document of `packing`, and padding.
The tokens are those that an evaluation of the question scores (`pieces.continuation`), so no eos follows the answer.
Where a search has labelled the questions, training rows hold its label too.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from absl import logging

from adaptive.config import DataConfig, require
from adaptive.data import labels, packing, sources
from adaptive.data.pieces import continuation
from adaptive.data.questions import Question, fingerprint, read_questions
from adaptive.data.sources import Document
from adaptive.data.tokenizers import Tokenizer, prefix_of

FIELDS = (*packing.FIELDS, "scored")
NUM_CLASSES = labels.MOST_VISITS + 1


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionRows:
  """A sequence of rows, each built when asked for: the interface of `packing.PackedRows`.

  Attributes:
    tokens: every question with its prefix and answer, one after the other; uint16 if the ids fit, else uint32.
    starts: int64 [questions + 1], where in them each question begins, and their number.
    given: int64 [questions], tokens of each that are not scored.
    seq_len: predictions in a row.
    num_bytes: UTF-8 bytes of the answers.
    visits: int32 [questions, num_layers], the questions' labels, or None.
  """

  tokens: np.ndarray
  starts: np.ndarray
  given: np.ndarray
  seq_len: int
  num_bytes: int
  visits: np.ndarray | None = None

  @property
  def num_predictions(self) -> int:
    """Predictions that are scored: every token of an answer once."""
    return int(len(self.tokens) - self.given.sum())

  @property
  def bytes_per_prediction(self) -> float:
    """Turns a loss per prediction into one per byte, which compares across tokenizers."""
    return self.num_bytes / self.num_predictions

  @functools.cached_property
  def label_counts(self) -> np.ndarray:
    """How many labels there are of each number of visits, over all questions and layers, int32 [3]."""
    return np.bincount(self.visits.ravel(), minlength=NUM_CLASSES).astype(np.int32)

  def __len__(self) -> int:
    return len(self.given)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """One row, padded with 0 at its end.

    Returns:
      `inputs`, `targets`, `segment_ids` (1; 0 is padding), `positions` and `scored` (1 where an answer's token is
      predicted), int32 [t] each; with labels also `visits` [num_layers], and `label_counts` [3], the same in every row.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    tokens = self.tokens[self.starts[index] : self.starts[index + 1]]
    size = len(tokens) - 1
    where = np.arange(size)
    row = np.zeros((len(FIELDS), self.seq_len), np.int32)
    row[:, :size] = tokens[:-1], tokens[1:], np.ones(size), where, where + 1 >= self.given[index]
    return dict(zip(FIELDS, row)) | self._label(index)

  def _label(self, index: int) -> dict[str, np.ndarray]:
    return {} if self.visits is None else {"visits": self.visits[index], "label_counts": self.label_counts}

  def padding_row(self) -> dict[str, np.ndarray]:
    """A row without predictions, shaped like any other."""
    return {name: np.zeros_like(values) for name, values in self[0].items()}


class Questions(NamedTuple):
  """Both splits; `description` and `fingerprint` as of `sources.Corpus`, the labels among what has its print."""

  train: QuestionRows
  validation: QuestionRows
  description: str
  fingerprint: str


def load(config: DataConfig, tokenizer: Tokenizer, num_layers: int | None = None) -> Questions:
  """The questions that a config names, as rows.

  Without a file of its own for validation, a question is held out by the hash of its id, as a file is by that of its
  name. Questions to learn from that have no label are left out where there are labels.

  Args:
    num_layers: of the model, which labels must fit; None does not look.

  Raises:
    ConfigError: files that cannot be read, no question for one of the splits, or a question longer than a row.
  """
  train, validation = _splits(config)
  visits, left_out = None, ""
  if config.labels:
    found = _visits(config, num_layers)
    labelled = [question for question in train if question.id in found]
    require(bool(labelled), f"data.labels={config.labels!r} has no label of a question of data.path={config.path!r}")
    left_out = f" ({len(train) - len(labelled)} without a label left out)"
    train, visits = labelled, np.array([found[question.id] for question in labelled], np.int32)
  return Questions(
    train=pack(train, tokenizer, config, visits),
    validation=pack(validation, tokenizer, config),
    description=f"questions {config.path}: {len(train)} to learn from{left_out}, {len(validation)} held out",
    fingerprint=sources.fingerprint(train=_documents(train, visits), validation=_documents(validation)),
  )


def _splits(config: DataConfig) -> tuple[list[Question], list[Question]]:
  questions = read_questions(config.path)
  if config.validation_path:
    return questions, read_questions(config.validation_path)
  held_out = [sources.held_out(os.fsencode(question.id), config.validation_fraction) for question in questions]
  train = [question for question, out in zip(questions, held_out) if not out]
  validation = [question for question, out in zip(questions, held_out) if out]
  require(
    bool(train and validation),
    f"data.path={config.path!r}: of {len(questions)} questions {len(validation)} are held out; name others to hold out "
    "as data.validation_path, or change data.validation_fraction",
  )
  return train, validation


def _visits(config: DataConfig, num_layers: int | None) -> Mapping[str, tuple[int, ...]]:
  """Labels by the ids of their questions."""
  header, found = labels.read_labels(config.labels)
  require(
    num_layers in (None, header.num_layers),
    f"data.labels={config.labels!r} are of a model of {header.num_layers} layers, not of model.num_layers={num_layers}",
  )
  if header.questions != fingerprint(config.path):
    message = "data.labels=%r are of the questions %s, data.path=%r is now %s: ids alone say whose a label is"
    logging.warning(message, config.labels, header.questions, config.path, fingerprint(config.path))
  return {label.id: label.visits for label in found}


def pack(
  questions: Sequence[Question], tokenizer: Tokenizer, config: DataConfig, visits: np.ndarray | None = None
) -> QuestionRows:
  """Tokenises questions, none of which is cut; shows progress when that takes long.

  Raises:
    ConfigError: some are longer than `config.seq_len` predictions, or the tokenizer gave an id outside its vocabulary.
  """
  encode, prefix = lambda text: tokenizer.encode(text).tolist(), prefix_of(tokenizer, config)
  bar = tqdm.tqdm(questions, desc="tokenise", unit="question", delay=2.0, disable=None)
  pieces = [continuation(encode, prefix, question.prompt, question.answer_text) for question in bar]
  sizes = np.array([len(piece.tokens) for piece in pieces], np.int64)
  too_long = int(np.sum(sizes - 1 > config.seq_len))
  require(
    not too_long,
    f"{too_long} of {len(questions)} questions are longer than data.seq_len={config.seq_len}: the longest, "
    f"{questions[int(sizes.argmax())].id!r}, has {sizes.max() - 1} tokens to predict",
  )
  parts = [packing.stored(piece.tokens, tokenizer, question.id) for piece, question in zip(pieces, questions)]
  return QuestionRows(
    tokens=np.concatenate(parts),
    starts=np.concatenate([[0], np.cumsum(sizes)]),
    given=np.array([piece.given for piece in pieces], np.int64),
    seq_len=config.seq_len,
    num_bytes=sum(len(question.answer_text.encode("utf-8")) for question in questions),
    visits=visits,
  )


def _documents(questions: Sequence[Question], visits: np.ndarray | None = None) -> list[Document]:
  """Questions and labels as texts, to take their fingerprint."""
  each = [None] * len(questions) if visits is None else visits.tolist()
  return [Document(q.id, json.dumps([dataclasses.asdict(q), label])) for q, label in zip(questions, each)]

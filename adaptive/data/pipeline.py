"""Rows to batches on the devices. The step number is the only state: every batch is a function of (seed, step)."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from adaptive import sharding
from adaptive.config import DataConfig, require
from adaptive.data import packing, question_rows, sources, tokenizers
from adaptive.data.packing import PackedRows
from adaptive.data.question_rows import QuestionRows

Batch = dict[str, jax.Array]
Rows = PackedRows | QuestionRows

_VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Both splits, ready to be indexed; `description` and `fingerprint` are the corpus's (see `sources.Corpus`).

  `tokens_fingerprint`, 16 hex digits, is of the tokens, which another tokenizer under the same name changes.
  """

  train: Rows
  validation: Rows
  tokenizer: tokenizers.Tokenizer
  description: str
  fingerprint: str
  tokens_fingerprint: str

  def position(self, batch: int, batch_size: int) -> dict[str, int | str]:
    """What a checkpoint says of the data: which they are, and where in them the next batch begins."""
    epoch, row = divmod(batch * batch_size, len(self.train))
    prints = {"fingerprint": self.fingerprint, "tokens": self.tokens_fingerprint}
    return prints | {"batch": batch, "epoch": epoch, "row_of_epoch": row}


def load(config: DataConfig, vocab_size: int, num_layers: int | None = None) -> Dataset:
  """Reads, tokenises and packs the data that a config names.

  Args:
    config: the data section of an experiment.
    vocab_size, num_layers: of the model; without a number of layers, labels may have any.

  Raises:
    ConfigError: anything about the data that cannot work (see `sources`, `tokenizers`, `question_rows`), fewer training
      rows than one batch, or a batch that the processes cannot share.
  """
  processes = jax.process_count()
  require(
    config.batch_size % processes == 0,
    f"data.batch_size={config.batch_size} is not divisible by the {processes} processes",
  )
  tokenizer = tokenizers.make_tokenizer(config)
  tokenizers.check_vocab(tokenizer, vocab_size)
  if config.source == "questions":
    train, validation, description, fingerprint = question_rows.load(config, tokenizer, num_layers)
  else:
    train, validation, description, fingerprint = _packed(config, tokenizer)
  require(
    len(train) >= config.batch_size,
    f"data.batch_size={config.batch_size} is more than the {len(train)} training rows of data.seq_len="
    f"{config.seq_len} tokens ({description})",
  )
  digest = hashlib.sha256(train.tokens)
  digest.update(validation.tokens)
  return Dataset(train, validation, tokenizer, description, fingerprint, digest.hexdigest()[:16])


def _packed(config: DataConfig, tokenizer: tokenizers.Tokenizer) -> tuple[Rows, Rows, str, str]:
  """Both splits of text, its description and its fingerprint."""
  corpus = sources.load_documents(config)
  train, validation = (packing.pack(split, tokenizer, config.seq_len) for split in (corpus.train, corpus.validation))
  return train, validation, corpus.description, corpus.fingerprint


def row_shapes(config: DataConfig, num_layers: int) -> dict[str, tuple[int, ...]]:
  """What a training row holds, by shape, without its data; all of it is int32."""
  if config.source != "questions":
    return dict.fromkeys(packing.FIELDS, (config.seq_len,))
  label = {"visits": (num_layers,), "label_counts": (question_rows.NUM_CLASSES,)} if config.labels else {}
  return dict.fromkeys(question_rows.FIELDS, (config.seq_len,)) | label


def batch_indices(num_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
  """Rows of the global batch of a step, int64 [b]; a pure function of its arguments.

  The steps walk through all rows in an order shuffled anew for each epoch. A batch may cross the border of two epochs,
  so no row is ever dropped.
  """
  return _shuffled(num_rows, seed, range(step * batch_size, (step + 1) * batch_size))


def _shuffled(num_rows: int, seed: int, places: range) -> np.ndarray:
  """Which rows stand at the given places of the endless shuffled order."""
  # Grain shuffles epoch e with seed + e; unmixed, a run with seed 1 would be one with seed 0, an epoch later.
  mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  order = grain.MapDataset.range(num_rows).shuffle(seed=mixed)
  return np.array([order[place] for place in places], np.int64)


def host_batch(rows: Rows, batch_size: int, seed: int, step: int, places: np.ndarray) -> dict[str, np.ndarray]:
  """One host's part of a step's batch, int32 [len(places), ...] each (see `__getitem__` of the rows).

  Args:
    places: which rows of the global batch the host holds, as `host_places` says. The batch itself does not depend on
      them, so it is the same for any number of hosts.
  """
  return _stack(rows, batch_indices(len(rows), batch_size, seed, step)[places])


def host_places(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a batch [b, ...] this process has to supply, ascending, int64.

  The mesh is asked rather than `jax.process_index`: on a TPU slice the rows of one host need not be contiguous, and
  hosts that hold parts of one tensor-parallel model need the same rows.
  """
  layout = sharding.batch_sharding(mesh)
  parts = mesh.size // layout.shard_shape((mesh.size,))[0]
  require(batch_size % parts == 0, f"a batch of {batch_size} rows is not divisible by {parts} data-parallel devices")
  held = layout.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in held]))


def _stack(rows: Rows, indices: np.ndarray) -> dict[str, np.ndarray]:
  """Rows by index as one array per field, int32 [b, ...]; index -1 stands for a row of padding."""
  chosen = [rows.padding_row() if index < 0 else rows[int(index)] for index in indices]
  return {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}


def train_batches(
  rows: Rows, batch_size: int, seed: int, start_step: int, stop_step: int, mesh: Mesh, prefetch: int = 2
) -> Iterator[Batch]:
  """Global batches, int32 [b, ...] each, of steps start_step .. stop_step - 1, made ahead by a thread.

  The thread starts with the first `next` and ends with the iterator, also when that is closed or dropped early. What
  goes wrong in it is raised by `next`.

  Args:
    prefetch: batches that may lie ready on the devices.
  """
  places = host_places(mesh, batch_size)

  def make(step: int) -> Batch:
    return sharding.global_batch(host_batch(rows, batch_size, seed, step, places), mesh)

  # One thread: batches then reach the devices in the order of the steps.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
  steps = grain.MapDataset.range(start_step, stop_step).map(make).to_iter_dataset(options)
  with contextlib.closing(iter(steps)) as batches:
    yield from batches


def validation_batches(rows: Rows, num_rows: int, batch_size: int, mesh: Mesh) -> Iterator[Batch]:
  """Global batches, int32 [b, ...] each, of the first num_rows rows (or all) of a fixed shuffle.

  The same rows in the same order at every call, for any seed of the run. The last batch is filled up with rows of
  padding (segment_ids 0), so that all batches have one shape.
  """
  places = host_places(mesh, batch_size)
  chosen = _shuffled(len(rows), _VALIDATION_SEED, range(min(num_rows, len(rows))))
  chosen = np.pad(chosen, (0, -len(chosen) % batch_size), constant_values=-1)
  for batch in chosen.reshape(-1, batch_size):
    yield sharding.global_batch(_stack(rows, batch[places]), mesh)

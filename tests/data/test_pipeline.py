"""The law of the batches, and their way to the devices."""

import gc
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from adaptive import sharding
from adaptive.config import ConfigError, DataConfig, MeshConfig
from adaptive.data import packing, pipeline, sources
from adaptive.data.pipeline import batch_indices, host_batch, train_batches, validation_batches
from adaptive.data.sources import Document
from adaptive.data.tokenizers import ByteTokenizer

FIELDS = ("inputs", "targets", "segment_ids", "positions")


def make_rows(num_predictions, seq_len=4):
  """Rows whose inputs all differ: 95 printable characters, cut short."""
  text = "".join(map(chr, range(32, 127)))[: num_predictions - 1]
  return packing.pack([Document("a", text)], ByteTokenizer(), seq_len)


@pytest.fixture(scope="module")
def rows():
  return make_rows(90)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(fsdp=2, tensor=2 if len(jax.devices()) % 4 == 0 else 1))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation_of_all_rows(num_rows, batch_size, seed):
  steps = -(-2 * num_rows // batch_size)
  order = np.concatenate([batch_indices(num_rows, batch_size, seed, step) for step in range(steps)])
  for epoch in (order[:num_rows], order[num_rows : 2 * num_rows]):
    assert sorted(epoch.tolist()) == list(range(num_rows))


def test_order_differs_between_epochs_and_seeds():
  epochs = {(seed, e): tuple(batch_indices(50, 50, seed, e).tolist()) for seed in range(3) for e in range(3)}
  # Not even a later epoch of another seed is the same.
  assert len(set(epochs.values())) == len(epochs)
  assert tuple(range(50)) not in epochs.values()


def test_batch_is_a_function_of_the_step():
  forwards = [batch_indices(23, 7, 5, step).tolist() for step in range(12)]
  backwards = [batch_indices(23, 7, 5, step).tolist() for step in reversed(range(12))]
  assert forwards == backwards[::-1]
  # The order of one seed is part of what a checkpoint means: a change would break resuming.
  assert batch_indices(5, 9, 0, 0).tolist() == [2, 3, 1, 0, 4, 3, 2, 4, 1]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_same_batch(rows, hosts):
  places = np.split(np.arange(8), hosts)
  for step in range(4):
    parts = [host_batch(rows, 8, 3, step, p) for p in places]
    whole = [rows[int(i)] for i in batch_indices(len(rows), 8, 3, step)]
    for name in FIELDS:
      assert all(part[name].shape == (8 // hosts, 4) and part[name].dtype == np.int32 for part in parts)
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), [row[name] for row in whole])


def run_two_processes():
  """What `two_processes.py` prints in each of two processes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  here = pathlib.Path(__file__).parent
  env = {**os.environ, "PYTHONPATH": str(here.parents[1])}
  env.pop("XLA_FLAGS", None)
  command = [sys.executable, str(here / "two_processes.py"), port]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
  processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
  try:
    outputs = [process.communicate(timeout=100) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outputs):
    assert process.returncode == 0, errors
  return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_two_processes_see_the_batches_of_one():
  everything = run_two_processes()
  # Without tensor parallelism the two hold alternate quarters; with it, both hold all rows.
  assert [result["places"] for result in everything] == [
    [[0, 1, 4, 5], list(range(8))],
    [[2, 3, 6, 7], list(range(8))],
  ]
  rows = make_rows(96)
  chosen = pipeline._shuffled(len(rows), 0, range(10))
  wanted = {
    "train": [np.stack([rows[int(i)]["inputs"] for i in batch_indices(len(rows), 8, 0, step)]) for step in (1, 2)],
    "validation": np.pad([rows[int(i)]["inputs"] for i in chosen], ((0, 6), (0, 0))).reshape(2, 8, 4),
  }
  for (name, batches), tensor in itertools.product(wanted.items(), (1, 2)):
    for i, batch in enumerate(batches):
      found = [shard for result in everything for shard in result[f"{name}{tensor}"][i]]
      assert len(found) == 4
      for start, data in found:
        np.testing.assert_array_equal(data, batch[start or 0 :][: len(data)])


def test_train_batches_are_global_arrays_of_the_right_rows(rows, mesh):
  batches = list(train_batches(rows, 8, 3, 0, 7, mesh))
  assert len(batches) == 7
  for step, batch in enumerate(batches):
    want = host_batch(rows, 8, 3, step, np.arange(8))
    assert set(batch) == set(FIELDS)
    for name, array in batch.items():
      assert isinstance(array, jax.Array)
      assert array.sharding == sharding.batch_sharding(mesh)
      np.testing.assert_array_equal(array, want[name])


def test_start_in_mid_epoch_equals_a_straight_run(rows, mesh):
  straight = list(train_batches(rows, 8, 3, 0, 9, mesh))
  resumed = list(train_batches(rows, 8, 3, 5, 9, mesh, prefetch=4))
  assert len(resumed) == 4
  for a, b in zip(straight[5:], resumed):
    assert all(np.array_equal(a[name], b[name]) for name in FIELDS)
  assert list(train_batches(rows, 8, 3, 9, 9, mesh)) == []


class FailingRows:
  """Rows of which the n-th to be read cannot be."""

  def __init__(self, rows, fail_at):
    self.rows, self.left, self.thread = rows, fail_at, None

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    self.left -= 1
    self.thread = threading.current_thread()
    if self.left < 0:
      raise RuntimeError("disk on fire")
    return self.rows[index]


def test_batches_are_made_by_another_thread_whose_errors_arrive(rows, mesh):
  failing = FailingRows(rows, 20)
  batches = train_batches(failing, 8, 0, 0, 9, mesh)
  next(batches), next(batches)
  with pytest.raises(RuntimeError, match="disk on fire"):
    next(batches)
  assert failing.thread is not threading.main_thread()


def prefetch_threads():
  return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


@pytest.mark.parametrize("stop", ["exhausted", "closed", "dropped", "failed"])
def test_the_thread_ends_with_the_iterator(rows, mesh, stop):
  batches = train_batches(FailingRows(rows, 8) if stop == "failed" else rows, 8, 0, 0, 6, mesh)
  next(batches)
  assert prefetch_threads()
  if stop == "exhausted":
    list(batches)
  elif stop == "closed":
    batches.close()
  elif stop == "failed":
    with pytest.raises(RuntimeError):
      next(batches)
  del batches
  gc.collect()
  deadline = time.monotonic() + 10
  while prefetch_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not prefetch_threads()


def test_validation_is_a_fixed_choice_of_rows(rows, mesh):
  first, again = list(validation_batches(rows, 10, 8, mesh)), list(validation_batches(rows, 10, 8, mesh))
  assert len(first) == 2
  for a, b in zip(first, again):
    assert all(a[name].shape == (8, 4) and np.array_equal(a[name], b[name]) for name in FIELDS)
  real = np.concatenate([batch["inputs"][batch["segment_ids"][:, 0] > 0] for batch in first])
  assert len(np.unique(real, axis=0)) == 10
  assert not np.array_equal(real, [rows[i]["inputs"] for i in range(10)])
  assert not np.any([first[1][name][2:] for name in FIELDS])
  # More rows are the same rows and further ones.
  more = np.concatenate([batch["inputs"] for batch in validation_batches(rows, 16, 8, mesh)])
  np.testing.assert_array_equal(more[:10], real)


def test_validation_takes_all_rows_where_there_are_fewer(rows, mesh):
  batches = list(validation_batches(rows, 1000, 8, mesh))
  assert len(batches) == 3
  real = np.concatenate([batch["inputs"][batch["segment_ids"][:, 0] > 0] for batch in batches])
  assert sorted(real.tolist()) == sorted(row["inputs"].tolist() for row in rows)


@pytest.mark.parametrize(
  "make", [lambda r, m: train_batches(r, 3, 0, 0, 1, m), lambda r, m: validation_batches(r, 9, 3, m)]
)
def test_batch_that_the_devices_cannot_share_is_refused(rows, mesh, make):
  with pytest.raises(ConfigError, match="a batch of 3 rows is not divisible by"):
    next(make(rows, mesh))


def test_load_the_default_data():
  dataset = pipeline.load(DataConfig(), 320)
  assert len(dataset.train) > 1000
  assert dataset.train.bytes_per_prediction == pytest.approx(1, abs=1e-3)
  assert dataset.validation.num_bytes == sum(
    len(d.text.encode()) for d in sources.load_documents(DataConfig()).validation
  )
  row = dataset.validation[0]
  text = dataset.tokenizer.decode(row["inputs"])
  assert text.strip()
  assert dataset.description.startswith("standard library of Python")
  assert len(dataset.fingerprint) == 16


def test_load_refuses_what_cannot_work(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("line of text\n" * 40)
  config = DataConfig(source="files", path=str(tmp_path), seq_len=50, batch_size=16)
  messages = []

  def refuse(config, vocab_size=257):
    with pytest.raises(ConfigError) as caught:
      pipeline.load(config, vocab_size)
    messages.append(str(caught.value))
    assert "\n" not in messages[-1]
    return messages[-1]

  assert "data.batch_size=16 is more than the 10 training rows of data.seq_len=50" in refuse(config)
  assert "model.vocab_size=100" in refuse(config, 100)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  assert "data.batch_size=16 is not divisible by the 3 processes" in refuse(config)

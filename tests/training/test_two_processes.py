"""Two processes of four devices train like one of eight, and one goes on where two stopped.

The processes run `train_in_two.py`, which calls the loop; `tests/faults/test_processes.py` goes through `train.py`.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

from adaptive.training import loop

HERE = pathlib.Path(__file__).parent
STEPS = 4
FIELDS = {
  "training.steps": STEPS, "method.num_sampled": 1, "mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2,
  "training.checkpoint_every": 2, "evaluation.rows": 8,
}  # fmt: skip


def train_in_two(config: str, workdir: str) -> list[tuple[str, str, int]]:
  """What each of the processes printed, on stdout and stderr, and its exit code."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
  started = [
    subprocess.Popen(
      [sys.executable, HERE / "train_in_two.py", str(port), str(i), config, workdir],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    return [(*process.communicate(timeout=240), process.returncode) for process in started]
  finally:
    for process in started:
      process.kill()


def assert_close(lines, expected):
  assert [line.keys() for line in lines] == [line.keys() for line in expected]
  for line, other in zip(lines, expected):
    np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-5, err_msg=str(line["step"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The run, and the folder that holds it as trained by one process and by two, with what the two said on stderr."""
  folder = tmp_path_factory.mktemp("runs")
  run = tiny_run.assemble(tiny_run.corpus(folder / "corpus"), **FIELDS)
  (folder / "config.json").write_text(run.config_json)
  told = train_in_two(str(folder / "config.json"), str(folder / "two"))
  assert [code for _, _, code in told] == [0, 0], told
  loop.train(run, folder / "one")
  return run, folder, [err for _, err, _ in told]


@pytest.mark.slow
def test_two_processes_train_like_one(runs):
  run, folder, _ = runs
  lines = tiny_run.lines(folder / "one")
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
  assert_close(tiny_run.lines(folder / "two"), lines)
  there = tiny_run.checkpoint(run, folder / "two", STEPS)
  for path, values in tiny_run.checkpoint(run, folder / "one", STEPS).items():
    np.testing.assert_allclose(there[path], values, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_only_one_of_them_talks(runs):
  _, _, (first, second) = runs
  assert f"step {STEPS}/{STEPS}" in first
  assert "validation loss" in first
  assert "step" not in second


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(runs, tmp_path):
  """After step 2, as a kill before the next checkpoint would have left it."""
  run, folder, _ = runs
  shutil.copytree(folder / "two", tmp_path / "two")
  shutil.rmtree(tmp_path / "two" / "checkpoints" / str(STEPS))
  loop.train(run, tmp_path / "two")
  lines = tiny_run.lines(tmp_path / "two")
  assert lines[:2] == tiny_run.lines(folder / "two")[:2]
  assert_close(lines, tiny_run.lines(folder / "one"))

"""Two processes of four devices: one is killed, one is told to stop, and other numbers of processes go on."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import tiny_run
from places import Place, newest_checkpoint, wait_until

pytestmark = pytest.mark.faults

STEPS = 160
HEARTBEAT = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  made = Place(tmp_path_factory.mktemp("processes"))
  made.environment["JAX_NUM_CPU_DEVICES"] = "4"
  return made


def settings(steps=STEPS):
  return [
    f"--config.training.steps={steps}", "--config.training.checkpoint_every=20", "--config.mesh.data=-1",
    "--config.mesh.fsdp=4", "--config.method.num_sampled=1",
  ]  # fmt: skip


@contextlib.contextmanager
def two(place, workdir: pathlib.Path, *more):
  """The same command in two processes that know of each other."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = [f"--coordinator_address={address}", "--num_processes=2", f"--heartbeat_timeout={HEARTBEAT}"]
  command = [*place.train, f"--workdir={workdir}", *settings(), *flags, *more]
  with place.started(*command, "--process_id=0") as first, place.started(*command, "--process_id=1") as second:
    yield first, second


def ended(process: subprocess.Popen, seconds: float) -> str:
  _, err = process.communicate(timeout=seconds)
  return err


def assert_close(lines, expected):
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for line, other in zip(lines, expected):
    np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=2e-4, err_msg=str(line["step"]))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_an_error(place, tmp_path, victim):
  with two(place, tmp_path) as processes:
    wait_until(lambda: newest_checkpoint(tmp_path) > 0, processes[0])
    processes[victim].kill()
    killed = time.monotonic()
    err = ended(processes[1 - victim], 3 * HEARTBEAT + 30)
  print(f"ended {time.monotonic() - killed:.1f} s after the kill")
  assert processes[1 - victim].returncode not in (0, -signal.SIGKILL)
  assert "lost contact with the others" in err or "Terminating process" in err, err


def test_two_then_one_then_two(place, tmp_path):
  """The losses are those of a run that never stopped, up to the order in which floats are added."""
  with two(place, tmp_path / "moved") as processes:
    wait_until(lambda: newest_checkpoint(tmp_path / "moved") >= 40, processes[0])
    processes[1].kill()
    ended(processes[0], 3 * HEARTBEAT + 30)
  one = [*place.train, f"--workdir={tmp_path / 'moved'}", *settings()]
  before = newest_checkpoint(tmp_path / "moved")
  with place.started(*one) as process:
    wait_until(lambda: newest_checkpoint(tmp_path / "moved") >= before + 40, process)
    process.kill()
  with two(place, tmp_path / "moved") as processes:
    errors = [ended(process, 200) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  assert "resuming at step" in errors[0]
  place.run(*place.train, f"--workdir={tmp_path / 'straight'}", *settings())
  assert_close(tiny_run.lines(tmp_path / "moved"), tiny_run.lines(tmp_path / "straight"))


def test_a_signal_to_one_stops_both_at_the_same_step(place, tmp_path):
  with two(place, tmp_path) as processes:
    wait_until(lambda: newest_checkpoint(tmp_path) > 0, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    errors = [ended(process, 60) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  step = newest_checkpoint(tmp_path)
  assert 0 < step < STEPS
  assert tiny_run.lines(tmp_path)[-1]["step"] == step


def test_disagreeing_processes_are_told_at_once(place, tmp_path):
  """Different configs would hang in the first collective."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--heartbeat_timeout={HEARTBEAT}"]
  command = [*place.train, f"--workdir={tmp_path}", *settings(), *flags]
  with place.started(*command, "--process_id=0", "--config.seed=0") as first:  # noqa: SIM117
    with place.started(*command, "--process_id=1", "--config.seed=1") as second:
      errors = [ended(process, 100) for process in (first, second)]
  assert [process.returncode for process in (first, second)] == [2, 2], errors
  assert "the processes have different configs or data: that of process [1] is not process 0's" in errors[0]


def test_a_missing_process_is_waited_for_no_longer_than_told(place, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = [f"--coordinator_address=localhost:{port}", "--num_processes=2", "--process_id=1", "--join_timeout=5"]
  began = time.monotonic()
  with place.started(*place.train, f"--workdir={tmp_path}", *flags) as process:
    err = ended(process, 60)
  assert process.returncode != 0
  assert time.monotonic() - began < 40
  assert "cannot join the other processes" in err or "DEADLINE_EXCEEDED" in err, err


def test_copied_run_goes_on(place, tmp_path):
  """A workdir is a folder like any other."""
  short = settings(40)
  place.run(*place.train, f"--workdir={tmp_path / 'a'}", *short)
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  shutil.rmtree(tmp_path / "b" / "checkpoints" / "40")
  place.run(*place.train, f"--workdir={tmp_path / 'b'}", *short)
  assert tiny_run.lines(tmp_path / "b") == tiny_run.lines(tmp_path / "a")
  assert sorted(os.listdir(tmp_path / "b" / "checkpoints")) == ["20", "40"]

"""Runs that are told to stop, killed, or cannot write, as a user's shell or scheduler would do it."""

import os
import pathlib
import resource
import signal
import time

import pytest
import tiny_run
from places import Place, newest_checkpoint, wait_until

pytestmark = pytest.mark.slow

# Long enough for a signal to reach it while it trains.
LONG = ["--config.training.steps=3000", "--config.training.checkpoint_every=50"]
SECONDS = 10  # from the signal to the end of the process, promised in the README


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return Place(tmp_path_factory.mktemp("stopping"))


def train(place, workdir, *more):
  return [*place.train, f"--workdir={workdir}", *more]


def lines(workdir: pathlib.Path) -> int:
  file = workdir / "metrics.jsonl"
  return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_under_way_and_the_same_command_goes_on(place, tmp_path, number):
  short = ["--config.training.steps=400"]
  with place.started(*train(place, tmp_path / "stopped", *short)) as process:
    wait_until(lambda: lines(tmp_path / "stopped") > 20, process)
    process.send_signal(number)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - sent
  assert process.returncode == 0, err
  assert took < SECONDS
  step = newest_checkpoint(tmp_path / "stopped")
  assert 20 < step < 400
  assert f"{signal.Signals(number).name}: stopped and saved at step {step} of 400; the same command goes on" in out
  assert tiny_run.lines(tmp_path / "stopped")[-1]["step"] == step
  done = place.run(*train(place, tmp_path / "stopped", *short))
  assert f"resuming at step {step}" in done.stderr
  place.run(*train(place, tmp_path / "straight", *short))
  assert tiny_run.lines(tmp_path / "stopped") == tiny_run.lines(tmp_path / "straight")


def test_a_second_signal_leaves_at_once(place, tmp_path):
  with place.started(*train(place, tmp_path, *LONG)) as process:
    wait_until(lambda: lines(tmp_path) > 20, process)
    process.send_signal(signal.SIGSTOP)  # so that both are there before the first is dealt with
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    sent = time.monotonic()
    _, err = process.communicate(timeout=60)
  assert time.monotonic() - sent < SECONDS
  assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM), err
  assert "again: leaving at once" in err


def test_a_workdir_in_use_is_refused_until_its_process_is_gone(place, tmp_path):
  with place.started(*train(place, tmp_path, *LONG)) as process:
    wait_until(lambda: newest_checkpoint(tmp_path) > 0, process)
    with place.started(*train(place, tmp_path, *LONG)) as second:
      _, err = second.communicate(timeout=100)
    assert second.returncode == 2
    assert err.splitlines()[-1].startswith(f"error: {tmp_path} is in use by another run (process {process.pid} on ")
    process.kill()
    process.wait()
  steps = newest_checkpoint(tmp_path)
  with place.started(*train(place, tmp_path, *LONG)) as third:
    wait_until(lambda: newest_checkpoint(tmp_path) > steps, third)


def test_a_full_disk_is_one_line_and_leaves_older_checkpoints_alone(place, tmp_path):
  """No file may exceed 8 kB, while the parameters' is larger: to the writer that is what a full disk is."""
  with place.started(*train(place, tmp_path, *LONG)) as process:
    wait_until(lambda: newest_checkpoint(tmp_path) > 0, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
  kept = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
  (tmp_path / "metrics.jsonl").unlink()  # it would be the first that is too long
  assert max(map(len, kept.values())) > 8_000

  full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
  with place.started(*train(place, tmp_path, *LONG, "--config.training.log_every=1000"), before=full) as process:
    _, err = process.communicate(timeout=100)
  assert process.returncode == 2, err
  assert err.splitlines()[-1].startswith("error: cannot save checkpoint")
  assert "File too large" in err.splitlines()[-1]
  assert {p: p.read_bytes() for p in kept if p.exists()} == kept


def test_a_damaged_newest_checkpoint_is_gone_around(place, tmp_path):
  short = ["--config.training.steps=40", "--config.training.checkpoint_every=10"]
  place.run(*train(place, tmp_path, *short))
  before = tiny_run.lines(tmp_path)
  newest = tmp_path / "checkpoints" / "40"
  victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 3] ^= 4
  victim.write_bytes(data)
  evaluated = place.run("eval.py", f"--workdir={tmp_path}", "--nolatency")
  assert f"warning: checkpoint {newest} is not used: {victim.relative_to(newest)} does not hold" in evaluated.stderr
  assert "30 steps" in (tmp_path / "pareto.json").read_text()
  done = place.run(*train(place, tmp_path, *short))
  assert "set aside as 40.damaged" in done.stderr
  assert "resuming at step 30" in done.stderr
  assert tiny_run.lines(tmp_path) == before
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["30", "40", "40.damaged"]

"""A run that is killed twenty times, anywhere, ends with the bits of the run that never was."""

import pathlib
import random
import time

import numpy as np
import pytest
import tiny_run
from places import Place, newest_checkpoint, wait_until

from adaptive.training import run as runs

pytestmark = pytest.mark.faults

KILLS, STEPS = 20, 2000
SETTINGS = [
  f"--config.training.steps={STEPS}",
  "--config.training.checkpoint_every=10",
  "--config.training.grad_accum=2",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return Place(tmp_path_factory.mktemp("kills"))


def saving(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint lies half written."""
  folder = workdir / "checkpoints"
  return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def unsealed(workdir: pathlib.Path) -> bool:
  """Whether a checkpoint has its final name and no manifest yet."""
  folder = workdir / "checkpoints"
  return folder.is_dir() and any(p.name.isdecimal() and not (p / "sha256.json").exists() for p in folder.iterdir())


def test_twenty_kills_change_nothing(place, tmp_path):
  """Every third kill falls into a save, every third between a save and its manifest, the others anywhere."""
  command = [*place.train, f"--workdir={tmp_path / 'killed'}", *SETTINGS]
  workdir, rng, torn = tmp_path / "killed", random.Random(0), 0
  for kill in range(KILLS):
    reached = newest_checkpoint(workdir)
    moment = (saving, unsealed, lambda _: time.sleep(rng.uniform(0, 0.5)) or True)[kill % 3]
    with place.started(*command) as process:
      wait_until(lambda reached=reached: newest_checkpoint(workdir) > reached, process)
      wait_until(lambda moment=moment: moment(workdir), process)
      process.kill()
      process.wait()
    torn += saving(workdir) or unsealed(workdir)
    assert newest_checkpoint(workdir) < STEPS, "the run ended before it could be killed"
    print(f"kill {kill + 1}: at step {newest_checkpoint(workdir)}, {torn} in the midst of a save", flush=True)
  assert torn >= 5
  place.run(*command)
  place.run(*place.train, f"--workdir={tmp_path / 'straight'}", *SETTINGS)

  assert tiny_run.lines(workdir) == tiny_run.lines(tmp_path / "straight")
  made = runs.load_run(tmp_path / "straight")
  one, other = (tiny_run.checkpoint(made, folder, STEPS) for folder in (tmp_path / "straight", workdir))
  assert one.keys() == other.keys()
  for path in one:
    np.testing.assert_array_equal(other[path], one[path], err_msg=path, strict=True)

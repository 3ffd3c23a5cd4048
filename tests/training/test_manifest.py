"""Every kind of damage to a checkpoint is noticed, named, and gone around."""

import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.training import manifest
from adaptive.training.checkpoint import Checkpointer, CheckpointError


def state(step):
  return {"params": {"w": jax.random.normal(jax.random.key(step), (64, 64))}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with the checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp("saved") / "checkpoints"
  with Checkpointer(folder, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), {"step": step})
  return folder


@pytest.fixture
def copied(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def largest(folder):
  return max(files(folder), key=lambda p: p.stat().st_size)


def flip_one_bit(folder):
  data = bytearray(largest(folder).read_bytes())
  data[len(data) // 2] ^= 1
  largest(folder).write_bytes(data)


DAMAGES = {  # name: (what happens to the folder of step 2, what is said of it)
  "bit rot": (flip_one_bit, "does not hold the bytes that were written"),
  "truncated": (lambda f: largest(f).write_bytes(largest(f).read_bytes()[:-7]), "bytes, .* were written"),
  "empty file": (lambda f: largest(f).write_bytes(b""), "has 0 bytes"),
  "missing file": (lambda f: largest(f).unlink(), "is missing"),
  "half copied": (lambda f: [shutil.rmtree(f / "state"), (f / "sha256.json").unlink()], "was not finished"),
  "no manifest": (lambda f: (f / "sha256.json").unlink(), "was not finished"),
  "torn manifest": (lambda f: (f / "sha256.json").write_text('{"a'), "cannot be read"),
  "empty manifest": (lambda f: (f / "sha256.json").write_text("{}"), "lists no files"),
  "foreign folder": (lambda f: [shutil.rmtree(f), f.mkdir(), (f / "thesis").write_text("")], "was not finished"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_newest_is_named_set_aside_and_the_one_before_is_used(name, copied, capfd):
  damage, said = DAMAGES[name]
  damage(copied / "2")
  with Checkpointer(copied, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 1
    found = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, state(1)))
    np.testing.assert_array_equal(found["params"]["w"], state(1)["params"]["w"])
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning: checkpoint" in line]
    assert len(lines) == 1
    assert f"{copied}/2 is not used: " in lines[0]
    assert re.search(said, lines[0])
    assert (copied / ("2.unfinished" if "not finished" in said else "2.damaged")).is_dir()
    checkpoints.save(2, state(2), {"step": 2})  # the run comes to this step again
  with Checkpointer(copied, keep=None) as reader:
    assert reader.latest_step() == 2


def test_every_single_file_is_watched(copied):
  """One flipped bit in any of them."""
  for path in files(copied / "2"):
    if path.name == manifest.MANIFEST or not path.stat().st_size:
      continue
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    found = manifest.problem(copied / "2")
    assert found is not None
    assert found.startswith(path.relative_to(copied / "2").as_posix())
    path.write_bytes(good)
  assert manifest.problem(copied / "2") is None


def test_the_reading_can_be_shared(copied):
  flip_one_bit(copied / "2")
  found = [manifest.problem(copied / "2", part, 3) for part in range(3)]
  assert len([f for f in found if f]) == 1


def test_a_reader_renames_nothing_and_goes_around(copied, capfd):
  flip_one_bit(copied / "2")
  before = sorted(p.name for p in copied.iterdir())
  with Checkpointer(copied, keep=None) as reader:
    assert reader.latest_step() == 1
    with pytest.raises(CheckpointError, match=r"2 is damaged: state/.* does not hold the bytes"):
      reader.restore(2, state(2))
  assert sorted(p.name for p in copied.iterdir()) == before
  assert "2 is not used: " in capfd.readouterr().err


def test_only_damaged_ones_are_no_reason_to_begin_anew(copied):
  for step in ("1", "2"):
    flip_one_bit(copied / step)
  for _ in range(2):  # the second time they have their new names
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good and the run would begin anew; mend one"):
      Checkpointer(copied, keep=2)
  assert sorted(p.name for p in copied.iterdir()) == ["1.damaged", "2.damaged"]
  (copied / "1.damaged").rename(copied / "1")
  flip_one_bit(copied / "1")  # mended
  with Checkpointer(copied, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 1


def test_a_run_killed_before_its_first_checkpoint_was_finished_begins_anew(copied):
  shutil.rmtree(copied / "2")
  (copied / "1" / manifest.MANIFEST).unlink()
  with Checkpointer(copied, keep=2) as checkpoints:
    assert checkpoints.latest_step() is None
  assert sorted(p.name for p in copied.iterdir()) == ["1.unfinished"]


def test_two_without_a_manifest_are_no_kill_s_work(copied):
  """A copy made without the files, perhaps; beginning anew would throw the run away."""
  for step in ("1", "2"):
    (copied / step / manifest.MANIFEST).unlink()
  with pytest.raises(CheckpointError, match="is good and the run would begin anew"):
    Checkpointer(copied, keep=2)


def test_other_names_in_the_folder_are_left_alone(copied):
  for name in ("007", "latest", "4 (copy)", "-3", "x_12"):
    (copied / name).mkdir()
  with Checkpointer(copied, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 2


def test_one_found_damaged_later_is_set_aside_then(copied):
  with Checkpointer(copied, keep=2) as checkpoints:
    checkpoints.save(3, state(3), {})
    checkpoints.wait()
    flip_one_bit(copied / "3")
    assert checkpoints.latest_step() == 2
    checkpoints.save(3, state(3), {})
    assert checkpoints.latest_step() == 3


def test_a_second_damaged_one_of_the_same_step_finds_a_name(copied):
  (copied / "2.damaged").mkdir()
  flip_one_bit(copied / "2")
  with Checkpointer(copied, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 1
  assert (copied / "2.damaged1" / "state").is_dir()


def test_a_copy_made_with_ordinary_tools_loads(copied, tmp_path):
  shutil.copytree(copied / "2", tmp_path / "elsewhere" / "2")
  with Checkpointer(tmp_path / "elsewhere", keep=None) as reader:
    np.testing.assert_array_equal(reader.restore(2, state(0))["params"]["w"], state(2)["params"]["w"])


def test_manifest_lists_all_files_with_their_hashes(saved):
  recorded = json.loads((saved / "2" / manifest.MANIFEST).read_text())
  assert set(recorded) == {p.relative_to(saved / "2").as_posix() for p in files(saved / "2")} - {manifest.MANIFEST}
  assert all(len(entry["sha256"]) == 64 for entry in recorded.values())


def test_the_best_is_kept_beside_the_newest(tmp_path):
  losses = {1: math.nan, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: None}
  with Checkpointer(tmp_path, keep=2, keep_best="validation/loss") as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, state(step), {"metrics": {"validation/loss": losses[step]} if losses[step] else {}})
  with Checkpointer(tmp_path, keep=2, keep_best="validation/loss") as checkpoints:  # another process
    for step in (5, 6):
      checkpoints.save(step, state(step), {"metrics": {"validation/loss": losses[step]} if losses[step] else {}})
    assert checkpoints.steps() == [2, 5, 6]


def test_the_best_accuracy_is_the_highest(tmp_path):
  with Checkpointer(tmp_path, keep=2, keep_best="validation/accuracy") as checkpoints:
    for step, accuracy in enumerate((0.1, 0.5, 0.2, 0.3, 0.4), 1):
      checkpoints.save(step, state(step), {"metrics": {"validation/accuracy": accuracy}})
    assert checkpoints.steps() == [2, 4, 5]

import contextlib
import logging
import resource

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive.training import manifest
from adaptive.training.checkpoint import Checkpointer, CheckpointError

SPLIT = P("data", "tensor")


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple


def mesh(*shape):
  devices = jax.devices()[: np.prod(shape)]
  return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(devices, spec=SPLIT, seed=0):
  """Matrices sharded by `spec`, the rest replicated. Seeded values."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    "embed": jax.random.normal(keys[0], (8, 4)),
    "layers": {"w": jax.random.normal(keys[1], (8, 8)).astype(jnp.bfloat16), "empty": {}},
  }
  state = State(jnp.int32(seed), params, optax.adamw(1e-3).init(params))
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(devices, spec if x.ndim == 2 else P())), state)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(("shape", "spec"), [((2, 4), P("tensor", "data")), ((8, 1), P("data")), ((1, 1), P())])
def test_restores_onto_another_mesh(tmp_path, shape, spec):
  state = make_state(mesh(4, 2))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(10, state, {"seed": 3})
  target = abstract(make_state(mesh(*shape), spec, seed=1))
  with Checkpointer(tmp_path, keep=None) as checkpoints:
    assert checkpoints.latest_step() == 10
    assert checkpoints.metadata(10) == {"seed": 3}
    restored = checkpoints.restore(10, target)
  assert_same(restored, state)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


def test_parameters_alone_can_be_read(tmp_path):
  state = make_state(mesh(4, 2))
  parts = {"params": state.params, "rest": {"step": state.step, "optimizer": state.opt_state}}
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, parts, {})
    assert_same(checkpoints.restore(1, abstract({"params": state.params})), {"params": state.params})


def test_random_keys_are_restored(tmp_path):
  key = jax.device_put(jax.random.key(3), NamedSharding(mesh(8, 1), P()))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, {"key": key}, {})
    assert jax.random.bits(checkpoints.restore(1, abstract({"key": key}))["key"]) == jax.random.bits(key)


def test_closing_makes_the_last_save_durable_and_readers_see_it(tmp_path):
  state = make_state(mesh(8, 1))
  with Checkpointer(tmp_path, keep=2) as writer, Checkpointer(tmp_path, keep=None) as reader:
    assert reader.latest_step() is None
    writer.save(1, state, {})
    writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]  # no temporary folder is left
    assert_same(reader.restore(1, abstract(state)), state)


def test_what_is_saved_survives_donation(tmp_path):
  """The next step may overwrite the state as soon as `save` returns."""
  sharding = NamedSharding(mesh(8, 1), P("data"))
  overwrite = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
  start = np.arange(2_000_000, dtype=np.float32).reshape(8, -1)
  with Checkpointer(tmp_path, keep=3) as checkpoints:
    for step in (1, 2, 3):
      state = {"w": jax.device_put(start, sharding) + step}
      target = abstract(state)
      checkpoints.save(step, state, {})
      jax.block_until_ready(overwrite(state["w"]))
    checkpoints.wait()
    for step in (1, 2, 3):
      np.testing.assert_array_equal(np.asarray(checkpoints.restore(step, target)["w"]), start + step)


def test_newest_are_kept(tmp_path):
  state = make_state(mesh(8, 1))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step() is None
    for step in (5, 10, 15):
      checkpoints.save(step, state, {"step": step})
      assert checkpoints.latest_step() == step
    checkpoints.save(15, state, {"step": "again"})
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.metadata(15) == {"step": 15}
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .*; it holds 10, 15$"):
      checkpoints.restore(5, abstract(state))
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "15"]


def test_half_written_checkpoint_is_ignored_and_swept_by_the_next_run(tmp_path):
  state = make_state(mesh(8, 1))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(5, state, {})
  orphan = tmp_path / "10.orbax-checkpoint-tmp"
  orphan.mkdir()
  with Checkpointer(tmp_path, keep=None) as reader:
    assert reader.latest_step() == 5
  assert orphan.exists()  # it may belong to a training that runs right now
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 5
    checkpoints.save(10, state, {})
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "5"]


def test_reading_creates_nothing(tmp_path):
  with Checkpointer(tmp_path / "none", keep=None) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*none; it holds none"):
      checkpoints.metadata(3)
  assert not (tmp_path / "none").exists()


def _edited(target, edit):
  params = jax.tree.map(lambda x: x, target.params)
  edit(params)
  return target.replace(params=params)


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda p: p.update(embed=jax.ShapeDtypeStruct((16, 4), jnp.float32)),
     "params/embed is float32[8, 4] there and float32[16, 4] here"),
    (lambda p: p["layers"].update(w=jax.ShapeDtypeStruct((8, 8), jnp.float32)),
     "params/layers/w is bfloat16[8, 8] there and float32[8, 8] here"),
    (lambda p: p["layers"].pop("w"), "params/layers/w is bfloat16[8, 8] there and missing here"),
    (lambda p: p.update(head=jax.ShapeDtypeStruct((4,), jnp.float32)),
     "params/head is missing there and float32[4] here"),
  ],
)  # fmt: skip
def test_first_leaf_that_does_not_fit_is_named(tmp_path, edit, message):
  state = make_state(mesh(8, 1))
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(5, state, {})
    with pytest.raises(CheckpointError) as caught:
      checkpoints.restore(5, _edited(abstract(state), edit))
  assert str(caught.value) == f"checkpoint {tmp_path}/5 does not fit: {message}"


def test_unreadable_checkpoint_is_one_line(tmp_path):
  state = {"w": make_state(mesh(8, 1)).params["embed"]}  # one leaf: when the first fails, Orbax abandons the others
  with Checkpointer(tmp_path, keep=2) as checkpoints:
    checkpoints.save(5, state, {})
  (tmp_path / "5" / "state" / "manifest.ocdbt").write_bytes(b"")
  manifest.write(tmp_path / "5")  # as if it had been written so
  with Checkpointer(tmp_path, keep=None) as reader, pytest.raises(CheckpointError) as caught:
    reader.restore(5, abstract(state))
  assert str(caught.value).startswith(f"cannot read checkpoint {tmp_path}/5: ")
  assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match=r"^cannot use .*file/x for checkpoints: .*Not a directory"):
    Checkpointer(tmp_path / "file" / "x", keep=2)


@contextlib.contextmanager
def small_files(monkeypatch):
  """No file may exceed 4 kB: to the writer that is what a full disk is. Logging is off, for it writes to a file too.

  No fixture: pytest's own report may go to a file, and is written before a fixture ends.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with monkeypatch.context() as patch:
    patch.setattr(absl_logging.get_absl_logger(), "disabled", True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("next_call", ["wait", "save", "close"])
def test_failure_in_the_background_surfaces_at_the_next_call(tmp_path, monkeypatch, next_call):
  state = {"w": jax.random.normal(jax.random.key(0), (200, 200))}
  checkpoints = Checkpointer(tmp_path, keep=2)
  calls = {"wait": checkpoints.wait, "save": lambda: checkpoints.save(2, state, {}), "close": checkpoints.close}
  with small_files(monkeypatch):
    checkpoints.save(1, state, {})
    with pytest.raises(CheckpointError, match=r"^cannot save checkpoint.*File too large") as caught:
      calls[next_call]()
  assert "\n" not in str(caught.value)
  assert Checkpointer(tmp_path, keep=None).steps() == []


def test_error_of_the_caller_is_not_hidden_by_closing(tmp_path, monkeypatch):
  def train():
    with Checkpointer(tmp_path, keep=2) as checkpoints:
      checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (200, 200))}, {})
      raise ZeroDivisionError

  with small_files(monkeypatch), pytest.raises(ZeroDivisionError):
    train()


def test_orbax_is_quiet_but_warnings_and_other_libraries_are_not():
  logger = absl_logging.get_absl_logger()

  def passes(level, path):
    return bool(logger.filter(logging.LogRecord("absl", level, path, 1, "", (), None)))

  assert not passes(logging.INFO, "/site-packages/orbax/checkpoint/manager.py")
  assert passes(logging.WARNING, "/site-packages/orbax/checkpoint/manager.py")
  assert passes(logging.INFO, "/home/me/train.py")

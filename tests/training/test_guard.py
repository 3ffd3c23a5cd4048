"""Bad updates are found on the device, change nothing, and lead to what the config says."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from adaptive.config import ConfigError, GuardConfig, RunStopped
from adaptive.data import pipeline
from adaptive.training import guard, loop

SPIKES = GuardConfig(spike="skip", spike_window=16)


def judge_all(config, values):
  """Verdicts on a sequence of (loss, gradient norm)."""
  state, verdicts = guard.init(config), []
  step = jax.jit(lambda state, a, b: guard.judge(config, state, a, b))
  for loss, norm in values:
    verdict, state = step(state, jnp.float32(loss), jnp.float32(norm))
    verdicts.append(int(verdict))
  return verdicts, state


def noise(n, seed=0):
  values = np.random.default_rng(seed).normal((2.0, 0.5), (0.1, 0.1), (n, 2))
  return [tuple(pair) for pair in values]


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (1.0, np.inf), (-np.inf, np.nan)])
def test_what_is_not_finite_is_seen_at_once(bad):
  for config in (GuardConfig(), SPIKES):
    verdicts, state = judge_all(config, [bad, (1.0, 1.0), bad, bad])
    assert verdicts == [guard.NOT_FINITE, guard.FINE, guard.NOT_FINITE, guard.NOT_FINITE]
    assert (int(state.made), int(state.skipped), int(state.in_a_row)) == (1, 3, 2)


def test_spikes_against_the_slow_reference():
  values = noise(200)
  values[60], values[61], values[120], values[150] = (2.0, 500.0), (9.0, 0.5), (np.nan, 0.5), (-5.0, 0.0)
  expected, accepted = [], []
  for pair in values:
    recent = np.array(accepted[-16:], np.float32)
    if not np.isfinite(pair).all():
      expected.append(guard.NOT_FINITE)
    elif (
      len(recent) == 16
      and (np.array(pair) > recent.mean(0) + 6 * np.maximum(recent.std(0), 0.01 * np.abs(recent.mean(0)))).any()
    ):
      expected.append(guard.SPIKE)
    else:
      expected.append(guard.FINE)
      accepted.append(pair)
  assert judge_all(SPIKES, values)[0] == expected
  assert [i for i, verdict in enumerate(expected) if verdict] == [60, 61, 120]  # falling is no spike


def test_a_constant_loss_is_no_reason_for_alarm():
  values = [(1.0, 1.0)] * 20 + [(1.05, 1.0), (1.5, 1.0)]
  assert judge_all(SPIKES, values)[0] == [guard.FINE] * 21 + [guard.SPIKE]


def test_choose_takes_all_or_nothing():
  old, new = {"a": jnp.zeros(2), "b": jnp.int32(1)}, {"a": jnp.full(2, jnp.nan), "b": jnp.int32(2)}
  for verdict, expected in ((guard.FINE, new), (guard.NOT_FINITE, old), (guard.SPIKE, old)):
    found = guard.choose(jnp.int32(verdict), new, old)
    np.testing.assert_array_equal(found["a"], expected["a"])
    assert found["b"] == expected["b"]


def test_settings_that_cannot_be():
  for bad in (dict(limit=0), dict(spike_window=1), dict(spike_sigmas=0.0)):
    with pytest.raises(ConfigError, match=r"training\.guard\."):
      GuardConfig(**bad)


# Whole runs. Batch 3 holds a poison that makes the loss NaN, or very large.


class Poisoned:
  """A method whose loss is bad on some batches, told by a row that only they begin with."""

  def __init__(self, method, tokens, factor):
    self._method, self._tokens, self._factor, self._always = method, jnp.asarray(tokens), factor, False

  def __getattr__(self, name):
    return getattr(self._method, name)

  def loss(self, model, params, batch, choice, key, step):
    value, metrics = self._method.loss(model, params, batch, choice, key, step)
    hit = self._always or (batch["inputs"][0] == self._tokens).all()
    factor = jnp.where(hit, self._factor, 1.0)
    total, count = metrics["loss"]
    return value * factor, {**metrics, "loss": (total * factor, count)}


BAD_BATCH = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)  # rows that differ, so that one can be told from the others
  for i in range(8):
    (folder / f"{i}.txt").write_text("".join(rng.choice(list("abcdefgh \n"), 600)))
  return str(folder)


def assemble(data, factor=np.nan, **fields):
  run = tiny_run.assemble(data, "dense", **{"mesh.fsdp": 2, "training.checkpoint_every": 2, **fields})
  return dataclasses.replace(run, method=Poisoned(run.method, first_row(run, BAD_BATCH), factor))


def first_row(run, batch):
  return pipeline.host_batch(run.dataset.train, 16, 0, batch, np.arange(16))["inputs"][0]


@pytest.fixture(autouse=True)
def named(monkeypatch):
  monkeypatch.setattr("adaptive.training.run.Run.method_name", "dense")


def test_stop_is_the_default_and_tells_where(data, tmp_path):
  run = assemble(data)
  with pytest.raises(RunStopped) as caught:
    loop.train(run, tmp_path)
  message = str(caught.value)
  assert message.startswith("step 4: loss or gradient is not finite (loss nan, gradient norm nan); its 16 rows (")
  assert message.endswith(f"bad_batch_of_step_4.npz; the last good checkpoint is {tmp_path}/checkpoints/2")
  with np.load(tmp_path / "bad_batch_of_step_4.npz") as saved:
    np.testing.assert_array_equal(saved["inputs"][0], first_row(run, BAD_BATCH))
    assert len(saved["rows"]) == 16
  assert [line["step"] for line in tiny_run.lines(tmp_path)] == [1, 2, 3]


def test_skip_goes_on_counts_and_keeps_parameters_clean(data, tmp_path, capfd):
  run = assemble(data, **{"training.guard.nonfinite": "skip", "training.checkpoint_every": 1})
  loop.train(run, tmp_path)
  assert [line["step"] for line in tiny_run.lines(tmp_path) if "loss" in line] == list(range(1, 9))
  lines = {line["step"]: line for line in tiny_run.lines(tmp_path) if "loss" in line}
  assert [lines[step]["skipped_updates"] for step in range(1, 9)] == [0, 0, 0, 1, 1, 1, 1, 1]
  assert lines[4]["loss"] is None
  assert np.isfinite([lines[step]["loss"] for step in (1, 2, 3, 5, 6, 7, 8)]).all()
  assert "skipped: step 4: loss or gradient is not finite" in capfd.readouterr().err


def test_a_skipped_update_changes_neither_parameters_nor_moments(data, tmp_path):
  fields = {"training.guard.nonfinite": "skip", "training.checkpoint_every": 1, "training.keep_checkpoints": 10}
  run = assemble(data, **fields)
  loop.train(run, tmp_path)
  before, after = (tiny_run.checkpoint(run, tmp_path, step) for step in (BAD_BATCH, BAD_BATCH + 1))
  moved = {path for path in before if (before[path] != after[path]).any()}
  assert moved == {"['guard'].in_a_row", "['guard'].skipped", "['optimizer']['step']"}


def test_skips_in_a_row_end_the_run(data, tmp_path):
  run = assemble(data, **{"training.guard.nonfinite": "skip", "training.guard.limit": 1})
  loop.train(run, tmp_path / "one")
  run.method._always = True
  with pytest.raises(RunStopped, match="step 2: .*; more than 1 skips in a row; its 16 rows"):
    loop.train(run, tmp_path / "all")


def test_rollback_goes_on_after_the_bad_batch(data, tmp_path, capfd):
  """Updates 3.. read batches 4..: those of the steps gone back over, and the bad one, are left out."""
  run = assemble(data, **{"training.guard.nonfinite": "rollback"})
  loop.train(run, tmp_path / "a")
  assert "rolled back to step 2, leaving out batches 2 to 3" in capfd.readouterr().out
  lines = [line for line in tiny_run.lines(tmp_path / "a") if "loss" in line]
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert np.isfinite([line["loss"] for line in lines]).all()
  with loop.Checkpointer(tmp_path / "a" / "checkpoints", keep=None) as checkpoints:
    metadata = checkpoints.metadata(8)
  assert (metadata["batches_left_out"], metadata["rollbacks"], metadata["data"]["batch"]) == (2, 1, 10)


def test_the_old_state_is_gone_when_a_rollback_restores(data, tmp_path, monkeypatch):
  """Two states at once would be more than a device holds that one fills by half."""
  run, sizes, real = assemble(data, **{"training.guard.nonfinite": "rollback"}), [], loop._restore

  def restore(*args):
    sizes.append(sum(x.nbytes for x in jax.live_arrays()))
    return real(*args)

  monkeypatch.setattr(loop, "_restore", restore)
  loop.train(run, tmp_path)
  assert len(sizes) == 2
  assert sizes[1] <= sizes[0] + 1000


def test_too_many_rollbacks_end_the_run(data, tmp_path):
  run = assemble(data, **{"training.guard.nonfinite": "rollback", "training.guard.limit": 2})
  run.method._always = True
  with pytest.raises(RunStopped, match="; more than 2 rollbacks; .*there is no checkpoint yet"):
    loop.train(run, tmp_path)


def test_a_spike_is_treated_the_same_and_its_window_survives_a_resume(data, tmp_path, monkeypatch):
  fields = {"training.guard.spike": "skip", "training.guard.spike_window": 2, "training.guard.spike_sigmas": 1e3}
  run = assemble(data, factor=1e6, **fields)
  loop.train(run, tmp_path / "whole")
  lines = {line["step"]: line for line in tiny_run.lines(tmp_path / "whole") if "loss" in line}
  assert [lines[step]["skipped_updates"] for step in range(1, 9)] == [0, 0, 0, 1, 1, 1, 1, 1]

  real = loop.train_batches

  def until_the_bad_one(*args):
    yield from itertools.islice(real(*args), BAD_BATCH)
    raise InterruptedError

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_batches", until_the_bad_one)
    with pytest.raises(InterruptedError):
      loop.train(run, tmp_path / "resumed")
  loop.train(run, tmp_path / "resumed")
  assert tiny_run.lines(tmp_path / "resumed") == tiny_run.lines(tmp_path / "whole")

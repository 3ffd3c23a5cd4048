"""Calibration of a run's exits: what is collected is what the model does, and what is printed can be used."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
import tiny_run

from adaptive.config import ConfigError
from adaptive.depth.exits import Exiting
from adaptive.evaluation import calibration, thresholds
from adaptive.methods import METHODS
from adaptive.training import calibrate, loop, reports
from adaptive.training.calibrate import Goals

CONFIG, METHOD = tiny.model_config(), METHODS["early_exit"]


def in_a_gap(signal):
  """A threshold in the widest gap of the middle third: another program may round a signal otherwise."""
  rising = np.sort(signal[np.isfinite(signal)])
  middle = rising[len(rising) // 3 : -(len(rising) // 3)]
  widest = np.argmax(np.diff(middle))
  return float(np.float32((middle[widest] + middle[widest + 1]) / 2))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("signal", ["max_probability", "patience", "cosine", "stability"])
def test_thresholds_do_on_rows_what_was_collected_from_them(signal, decay):
  """The exits of a forward pass with all keys, and its cost, are those that the calibration foresees."""
  how = Exiting(signal=signal, kv="exact", decay=decay, decay_length=4, thresholds=())
  model = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3), exit=how))
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG, rows=4)
  seen = calibration.collect(model.exits, params, [batch], 12)
  limits = [in_a_gap(signal) for signal in seen.signals]
  plan = dataclasses.replace(how, per_exit=tuple(limits))
  model = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3), exit=plan))
  aux = METHOD.forward(model, params, batch, 2).aux
  left = thresholds.where_left(seen, limits)
  assert [float(aux[f"ran/{d}"][0]) for d in (1, 3, 4)] == [np.sum(left >= e) for e in range(3)]
  assert len(set(left)) > 1
  np.testing.assert_array_equal(seen.right[-1], True)
  assert len(np.unique(seen.rows)) == 4


@pytest.mark.parametrize("kv", ["project", "copy"])
@pytest.mark.parametrize(
  ("name", "settings", "signal"),
  [
    ("early_exit", dict(exits=(1, 3)), "max_probability"),
    ("ponder", dict(prelude=1, num_recursions=3), "learned"),
    ("recurrent_depth", dict(prelude=1, core=1, num_recursions=3), "stability"),
  ],
)
def test_costs_of_exits_are_those_of_the_method(name, settings, signal, kv):
  """Under `project` layers above cost their keys: a sub-model that always leaves at one exit costs as much."""
  method, how = METHODS[name], Exiting(thresholds=(0.5,), signal=signal, kv=kv)
  model = method.build(CONFIG, method.Config(**settings, exit=how))
  submodel = next(s for s in method.submodels(model) if "threshold" in s.name)
  found = calibration.flops_where_left(model.exits, 12, np.ones((1, 1), np.int32))
  for which, ran in enumerate(((1, 0, 0), (1, 1, 0), (1, 1, 1))):
    realised = {f"ran/{d}": (float(share), 1.0) for d, share in zip(model.exits.depths, ran)}
    assert method.cost(model, submodel, 12, realised).flops_per_token == pytest.approx(found([which]))
  full = method.cost(model, method.submodels(model)[-1], 12, {}).flops_per_token
  assert calibration.full_flops(model.exits, 12) == full


def collected(vocab_size=32, length=12, **settings):
  """A model with exits, parameters, rows, and what a calibration sees of them."""
  how = Exiting(thresholds=(), **settings)
  config = tiny.model_config(vocab_size=vocab_size)
  model = METHOD.build(config, METHOD.Config(exits=(1, 2, 3), exit=how))
  params, batch = tiny.random_params(model), tiny.packed_batch(config, rows=8, length=length)
  return model, params, batch, calibration.collect(model.exits, params, [batch], length)


def evaluated(model, params, batch, plan):
  """What the compiled forward pass of a plan ran, and its FLOPs as a share of the full model's."""
  how = dataclasses.replace(model.method.exit, per_exit=tuple(min(value, 1e9) for value in plan))
  model = METHOD.build(model.config, dataclasses.replace(model.method, exit=how))
  *_, planned, full = METHOD.submodels(model)
  index = np.int32(len(METHOD.submodels(model)) - 2)
  aux = jax.device_get(jax.jit(lambda index: METHOD.forward(model, params, batch, index).aux)(index))
  flops = [METHOD.cost(model, s, batch["inputs"].shape[1], aux).flops_per_token for s in (planned, full)]
  return aux, flops[0] / flops[1]


@pytest.mark.parametrize(
  ("vocab_size", "kv", "budget"), [(2048, "project", 0.95), (32, "exact", 0.6), (32, "recompute", 1.0)]
)
def test_a_plan_for_a_budget_costs_no_more_where_it_is_evaluated(vocab_size, kv, budget):
  """However dear heads are, and with the layers that are run for others later or again."""
  model, params, batch, seen = collected(vocab_size, kv=kv)
  found = thresholds.for_budget(seen, budget)
  _, share = evaluated(model, params, batch, found.thresholds)
  assert share <= budget
  assert share == pytest.approx(found.share, rel=1e-6)
  assert len(set(thresholds.where_left(seen, found.thresholds))) > 1


def test_a_budget_that_heads_alone_exceed_is_refused():
  *_, seen = collected(vocab_size=2048)
  with pytest.raises(ConfigError, match=r"a budget of 0.5 .* the cheapest thresholds found cost 0\.8"):
    thresholds.for_budget(seen, 0.5)


@pytest.mark.parametrize(("signal", "decay"), [("patience", 0.0), ("stability", 0.5)])
def test_all_leave_at_the_first_exit_even_where_its_signal_is_always_zero(signal, decay):
  model, params, batch, seen = collected(signal=signal, decay=decay, decay_length=4)
  least = seen.flops(np.zeros(seen.signals.shape[1], int)) / seen.full
  found = thresholds.for_budget(seen, least)
  aux, _ = evaluated(model, params, batch, found.thresholds)
  assert float(aux["layers"][0]) == float(aux["layers"][1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("calibrate")
  made = tiny_run.assemble(
    tiny_run.corpus(folder / "corpus", files=12),
    "early_exit",
    **{"data.validation_fraction": 0.6, "evaluation.rows": 4},
  )
  loop.train(made, folder / "run")
  return folder / "run"


def test_what_is_printed_can_be_evaluated(workdir, capsys):
  calibrate.calibrate(str(workdir), None, Goals((0.8,), (0.3,), 0.6), ["method.exit.signal=margin"], None)
  text = capsys.readouterr().out
  settings = re.findall(r"--set='([^']+)'", text)
  assert settings[0] == "method.exit.signal=margin"
  assert "--step=8 " in text
  family = reports.evaluate(str(workdir), None, str(workdir), settings, latency=False)
  assert [r.name for r in family.results if "plan" in r.name] == ["plan=1", "plan=2"]
  assert family.notes["changed"].startswith("method.exit.signal=margin; ")
  assert "confidence 0.6" in text


def test_a_goal_that_cannot_be_met_takes_no_other_with_it(workdir, capsys):
  calibrate.calibrate(str(workdir), None, Goals((0.001, 0.9), (), 0.9), [], None)
  text = capsys.readouterr().out
  assert "cannot be met" in text
  assert "budget 0.9" in text
  assert "per_exit=" in text
  with pytest.raises(ConfigError, match="no goal can be met"):
    calibrate.calibrate(str(workdir), None, Goals((0.001,), (), 0.9), [], None)


def test_a_plan_that_decay_would_turn_around_is_no_plan(capsys):
  """Of a signal that may be negative, such as saturation; a threshold just below 0 is none of these."""
  found = lambda limit: thresholds.Solution((0.5, limit), 1.0, 0.5, 0.9)
  assert calibrate._solved("goal", lambda: found(-0.2), Exiting(decay=0.1)) == ()
  assert re.search(r"needs the threshold -0.2, which method.exit.decay=0.1 would raise", capsys.readouterr().out)
  assert calibrate._solved("goal", lambda: found(-0.2), Exiting()) == (0.5, -0.2)
  assert calibrate._solved("goal", lambda: found(-1e-30), Exiting(decay=0.1)) == (0.5, -1e-30)


@pytest.mark.parametrize(
  ("goals", "rows", "message"),
  [
    (Goals((1.5,), (), 0.9), None, "a budget of 1.5"),
    (Goals((), (1.0,), 0.9), None, "an agreement of 1 must"),
    (Goals((), (0.9,), 1.0), None, "a confidence of 1 must"),
    (Goals((0.5,), (), 0.9), 0, "rows=0 must be at least 1"),
  ],
)
def test_goals_that_cannot_be_are_refused_before_anything_is_read(goals, rows, message):
  with pytest.raises(ConfigError, match=message):
    calibrate.calibrate("/nothing/here", None, goals, [], rows)


def test_what_is_printed_is_exact():
  """Through the text, float32 and a compiled comparison."""
  signals = np.array([0.1, 0.999999, 0.0, 1e-38, 1e-45, 3.0], np.float32)
  at, below = map(float, signals), map(thresholds.just_below, signals)
  read = [float(value) for value in calibrate._text([*at, *below, np.inf]).split(", ")]
  leaves = jax.jit(lambda signals, limits: signals > limits)
  limits = np.asarray(read, np.float32)
  assert not leaves(signals, limits[:6]).any()
  assert leaves(signals, limits[6:12]).all()
  assert not leaves(signals, limits[12]).any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("method.exit.signal", "not of the form"),
    ("method.exit.sginal=margin", "did you mean signal"),
    ("method.exits=(2,)", "method.exits is part of what was trained"),
    ("method.exit.signal=certainty", "method.exit.signal='certainty' is not one of"),
    ("nonsense.x=1", "unknown config field nonsense.x"),
    ("evaluation.rows={1}", "neither a number, nor a word"),
    ("method.exit.thresholds={[1]: 2}", "must be a tuple"),
    ("method.exit.thresholds=(1e999,)", "must be finite"),
  ],
)
def test_settings_that_cannot_be_changed_are_one_line(workdir, change, message):
  with pytest.raises(ConfigError, match=message):
    reports.evaluate(str(workdir), None, str(workdir), [change])


def test_results_with_other_settings_do_not_replace_the_run_s_own():
  assert reports.folder("runs/a") == "runs/a"
  changed = reports.folder("runs/a", ["method.exit.signal=margin", "data.path=/tmp/b c"])
  assert changed == "runs/a/method.exit.signal=margin_data.path=_tmp_b_c"
  plans = [reports.folder("runs/a", [f"method.exit.per_exit=({'0.123456789, ' * 10}{last})"]) for last in (1, 2)]
  assert plans[0] != plans[1]
  assert all(len(plan) == len("runs/a/") + 100 for plan in plans)


def test_a_run_without_exits_or_without_more_text_is_refused(workdir, tmp_path):
  with pytest.raises(ConfigError, match="no held-out rows are left"):
    calibrate.calibrate(str(workdir), None, Goals((0.5,), (), 0.9), ["evaluation.rows=100000"], None)
  dense = tiny_run.assemble(tiny_run.corpus(tmp_path / "corpus"), "dense")
  loop.train(dense, tmp_path / "dense")
  with pytest.raises(ConfigError, match="no early exits to calibrate"):
    calibrate.calibrate(str(tmp_path / "dense"), None, Goals((0.5,), (), 0.9), [], None)

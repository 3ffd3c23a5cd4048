"""Equal training FLOPs: steps from the analytic cost, runs that are there are not made again, a table and a picture."""

import csv

import pytest
import tiny_run
from caches import cache_in

from adaptive.config import ConfigError
from adaptive.evaluation import isoflop as results
from adaptive.evaluation.isoflop import Trained
from adaptive.training import isoflop
from adaptive.training.isoflop import Study

CONFIG = """
import tiny_run

VARIANTS = ("dense", "mixture_of_recursions")


def get_config(variant):
  return tiny_run.config({data!r}, variant)
"""
BUDGET = 1e9


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  folder = tmp_path_factory.mktemp("isoflop")
  (folder / "study.py").write_text(CONFIG.format(data=tiny_run.corpus(folder / "corpus")))
  with cache_in(folder / "cache"):
    yield Study(str(folder / "study.py"), str(folder / "runs"), (BUDGET,), (0,))


@pytest.fixture(scope="module")
def runs(study):
  return isoflop.compare(study)


def test_every_variant_trains_for_the_budget(study, runs):
  assert [run.variant for run in runs] == ["dense", "mixture_of_recursions"]
  for run in runs:
    made = tiny_run.assemble(str(isoflop.pathlib.Path(study.config).parent / "corpus"), run.variant)
    choice = made.method.sample(made.model, 0, 0)
    one = made.method.update_flops(made.model, choice, 32) * 16 * 32
    assert abs(run.steps * one - BUDGET) <= one / 2, "to the nearest step"
    assert run.tokens == run.steps * 16 * 32
  dense, mor = runs
  assert mor.steps > dense.steps
  assert mor.params < dense.params
  assert (dense.top_k_loss, mor.top_k_loss is not None) == (None, True)


def test_the_paper_s_accounting_counts_the_forward_pass_without_the_head(study):
  module = isoflop._read(study.config)
  steps = {}
  for accounting in ("update", "paper"):
    other = Study(study.config, study.workdir, (BUDGET,), (0,), (), accounting)
    steps[accounting] = isoflop._plan(module, other, BUDGET, "dense", 0)[1].training.steps
  made = tiny_run.assemble(str(isoflop.pathlib.Path(study.config).parent / "corpus"), "dense")
  forward = made.method.update_flops(made.model, (0,), 32) / 3
  head = 2 * 264 * 16
  assert steps["paper"] == round(BUDGET / ((forward - head) * 16 * 32))
  assert steps["paper"] > 3 * steps["update"]


def test_steps_that_differ_are_added_up(study):
  config = tiny_run.config(str(isoflop.pathlib.Path(study.config).parent / "corpus"), "recursive")
  config.method.train_fewer = True
  method, experiment = isoflop.parse_config(config)
  model = method.build(experiment.model, experiment.method)
  steps = isoflop._steps(study, method, experiment, BUDGET)
  spent = sum(method.update_flops(model, method.sample(model, 0, step), 32) * 16 * 32 for step in range(steps))
  assert abs(spent - BUDGET) < method.update_flops(model, (1,), 32) * 16 * 32
  assert {method.sample(model, 0, step) for step in range(steps)} == {(0,), (1,)}


@pytest.mark.parametrize(("text", "kind", "message"), [
  (["1", "x"], int, "--seeds=1,x must be whole numbers, separated by commas"),
  (["0.5"], int, "must be whole numbers"),
  (["1", "1.0"], float, "names a number twice"),
  (["inf"], float, "must be numbers, not negative"),
  (["-1"], int, "must be numbers, not negative"),
])  # fmt: skip
def test_flags_that_are_no_numbers(text, kind, message):
  with pytest.raises(ConfigError, match=message):
    isoflop.parse_numbers(text, "seeds", kind)


def test_finished_runs_are_read_and_another_config_is_refused(study, runs, monkeypatch, tmp_path):
  monkeypatch.setattr(isoflop.loop, "train", lambda *_: pytest.fail("trained again"))
  assert isoflop.compare(study) == runs
  changed = tmp_path / "study.py"
  changed.write_text(isoflop.pathlib.Path(study.config).read_text().replace("variant)", "variant, seed=5)", 2))
  changed.write_text(changed.read_text().replace("def get_config(variant, seed=5)", "def get_config(variant)"))
  changed.write_text(changed.read_text().replace("variant, seed=5)", 'variant, **{"training.optimizer.b2": 0.9})'))
  with pytest.raises(ConfigError, match=r"holds a run of another config: training.optimizer.b2: .* -> 0.9; choose"):
    isoflop.compare(Study(str(changed), study.workdir, (BUDGET,), (0,)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {}, "loss": 1.0}'])
def test_a_damaged_result_is_named(tmp_path, text):
  (tmp_path / "isoflop.json").write_text(text)
  with pytest.raises(ConfigError, match=r"cannot read .*isoflop.json: .*; delete it"):
    isoflop._read_result(tmp_path / "isoflop.json", {})


def test_results_are_written(study, runs):
  folder = isoflop.pathlib.Path(study.workdir)
  assert (folder / "isoflop.png").read_bytes().startswith(b"\x89PNG")
  rows = list(csv.DictReader((folder / "isoflop.csv").open(encoding="utf-8")))
  assert [float(row["loss"]) for row in rows] == [run.loss for run in runs]
  assert (folder / "isoflop.md").read_text().count("\n") == 4


def test_a_table_has_means_and_ranges():
  made = [Trained("a", seed, 1e12, 10, 100, 50, 1.0, loss, 1.0) for seed, loss in enumerate((1.0, 2.0))]
  other = Trained("b", 0, 1e12, 10, 100, 50, 1.0, 3.0)
  lines = results.markdown([*made, other]).splitlines()
  assert lines[2] == "| 1.00T | a | 50 | 10 | 100 | 1.5000 (1.0000 to 2.0000) | 1.0000 (1.0000 to 1.0000) |"
  assert lines[3] == "| 1.00T | b | 50 | 10 | 100 | 3.0000 | - |"


@pytest.mark.parametrize(("change", "message"), [
  (dict(budgets=(1e5,)), "pay for 0 steps of dense; choose a larger budget"),
  (dict(variants=("dence",)), "has no variant dence; it has dense, mixture_of_recursions"),
  (dict(config="/nowhere.py"), "there is no config file /nowhere.py"),
  (dict(config=__file__), "has no VARIANTS or no get_config"),
])  # fmt: skip
def test_what_cannot_be_is_refused(study, change, message):
  with pytest.raises(ConfigError, match=message):
    isoflop.compare(Study(**{**vars(study), **change}))

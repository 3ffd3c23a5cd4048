"""Runs on questions, from end to end: answers are learned and nothing else, labels travel along, and runs resume."""

import json
import os

import numpy as np
import pytest
import tiny_run
from caches import cache_in

from adaptive.config import ConfigError
from adaptive.data.labels import Header, Label, LabelWriter
from adaptive.evaluation import sweep
from adaptive.training import dry_run, loop

STEPS, CHECKPOINT = 8, 4
FIELDS = {
  "data.source": "questions", "data.seq_len": 16, "data.validation_fraction": 0.2, "training.grad_accum": 2,
  "training.optimizer.learning_rate": 5e-2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
  with cache_in(tmp_path_factory.mktemp("cache")):
    yield


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  """Prompts that nobody can predict, and one answer."""
  path, rng = tmp_path_factory.mktemp("data") / "questions.jsonl", np.random.default_rng(0)
  prompts = ["".join(chr(c) for c in rng.integers(33, 127, rng.integers(3, 9))) for _ in range(80)]
  lines = [{"id": f"q/{i}", "prompt": f"{prompt} ->", "answer": " yes"} for i, prompt in enumerate(prompts)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


@pytest.fixture(scope="module")
def labels(questions, tmp_path_factory):
  path = str(tmp_path_factory.mktemp("labels") / "labels.jsonl")
  with LabelWriter(path, Header(2, "model", questions, "all", 9, "answer", 0)) as writer:
    for i in range(70):
      writer.write(Label(f"q/{i}", 0.0, (1, i % 3), 1.0, 9, i))
  return path


def assemble(questions, method="dense", **fields):
  return tiny_run.assemble(questions, method, **{**FIELDS, **fields})


@pytest.fixture(scope="module")
def trained(questions, tmp_path_factory):
  run, workdir = assemble(questions), tmp_path_factory.mktemp("trained") / "run"
  loop.train(run, str(workdir))
  return run, workdir


def test_a_dense_model_learns_answers_and_nothing_else(trained):
  _, workdir = trained
  *training, validation = tiny_run.lines(workdir)
  assert training[0]["loss"] == pytest.approx(np.log(264), abs=0.1)
  assert validation["validation/loss"] < 2, "a prompt's bytes, of which there are 94, would cost more than 4"
  assert validation["validation/accuracy"] > 0.25


def test_it_is_evaluated_on_answers(trained):
  run, workdir = trained
  _, params = tiny_run.run.load_params(run, str(workdir))
  family = sweep.sweep(run.method, run.model, params, run.experiment, run.dataset, run.mesh, "run", {})
  rows = min(run.experiment.evaluation.rows, len(run.dataset.validation))
  assert family.notes["held out"] == f"{rows} rows, {rows * len(' yes')} tokens"
  assert run.dataset.fingerprint in family.notes["data"]
  (result,) = family.results
  assert result.loss == pytest.approx(tiny_run.lines(workdir)[-1]["validation/loss"], rel=1e-4)
  assert result.bits_per_byte == pytest.approx(result.loss / np.log(2))


def test_a_killed_run_goes_on_to_the_same_end(questions, trained, tmp_path, monkeypatch):
  run, whole = trained
  stopped, real = assemble(questions, **{"training.checkpoint_every": CHECKPOINT}), loop.train_batches

  def batches(*args):
    for i, batch in enumerate(real(*args)):
      if i == CHECKPOINT + 2:
        raise InterruptedError
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_batches", batches)
    with pytest.raises(InterruptedError):
      loop.train(stopped, str(tmp_path))
  assert os.listdir(tmp_path / "checkpoints") == [str(CHECKPOINT)]
  loop.train(stopped, str(tmp_path))
  one, other = (tiny_run.checkpoint(run, folder, STEPS) for folder in (whole, tmp_path))
  for path in one:
    np.testing.assert_array_equal(other[path], one[path], err_msg=path, strict=True)


@pytest.mark.parametrize("method", ["dense", "sorted_net"])
def test_labels_travel_with_the_rows_and_do_not_disturb(questions, labels, method, tmp_path):
  """A method that knows nothing of labels trains on the same rows; sorted_net hands each sub-model some of them."""
  run = assemble(questions, method, **{"data.labels": labels, "training.steps": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
  held_out = len(run.dataset.validation)
  assert "without a label left out" in run.dataset.description
  assert len(run.dataset.train) < 80 - held_out
  loop.train(run, str(tmp_path))
  assert np.isfinite(tiny_run.lines(tmp_path)[-1]["validation/loss"])
  assert dry_run.compile_train_step(run) is not None


def test_labels_of_another_model_are_refused(questions, labels):
  with pytest.raises(ConfigError, match="labels.jsonl' are of a model of 2 layers, not of model.num_layers=4"):
    assemble(questions, **{"data.labels": labels, "model.num_layers": 4})

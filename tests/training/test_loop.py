"""The loop from end to end on tiny runs; a stopped and resumed run must be the one that never stopped, bit for bit."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
import tiny_run
from caches import cache_in

from adaptive import config_dict
from adaptive.config import ConfigError
from adaptive.training import loop

STEPS, CHECKPOINT, KILLED = 8, 4, 6

VARIANTS = {
  "dense": ("dense", {"mesh.fsdp": 2}),
  "switch": ("sorted_net", {"method.num_sampled": 3, "method.accum_data": "shared"}),
  "static": ("sorted_net", {"method.executor": "static", "method.num_sampled": 1, "method.d_ff": ()}),
  "sandwich": ("sorted_net", {
    "method.scheme": "sandwich", "method.accum_data": "shared", "method.distill": 0.5,
    "training.optimizer.name": "muon",
  }),
  "routers": ("mixture_of_recursions", {
    "method.inference": "aux_router", "method.warmup_steps": 7, "method.warmup_stages": 2,
  }),
  "controller": ("mixture_of_recursions", {
    "method.routing": "token_choice", "method.balance": "loss_free", "method.capacity_scales": (),
    "training.grad_accum": 2, "mesh.data": 4, "mesh.fsdp": 2,
  }),
  "grad_accum": ("sorted_net", {"training.grad_accum": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
  """Three runs of a variant compile the same programs, as the runs of a user do, who has a cache too."""
  with cache_in(tmp_path_factory.mktemp("cache")):
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_run.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
  """(run, workdir) of a variant trained without a stop; made once."""
  made = {}

  def get(name):
    if name not in made:
      method, fields = VARIANTS[name]
      made[name] = tiny_run.assemble(data, method, **fields), tmp_path_factory.mktemp(name) / "straight"
      loop.train(*made[name])
    return made[name]

  return get


class Killed(Exception):  # noqa: N818 - stands for a signal
  pass


def train_until_killed(run, workdir, monkeypatch):
  """Dies when the batch of step KILLED is asked for: steps after the checkpoint are done, and written, in vain."""
  real = loop.train_batches

  def batches(*args):
    for i, batch in enumerate(real(*args)):
      if i == KILLED:
        raise Killed
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_batches", batches)
    with pytest.raises(Killed):
      loop.train(run, str(workdir))


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bit_exact(name, data, straight, tmp_path, monkeypatch):
  run, whole = straight(name)
  assert CHECKPOINT * 16 < len(run.dataset.train) < STEPS * 16, "the resumed part has to cross the border of an epoch"
  method, fields = VARIANTS[name]
  stopped = tiny_run.assemble(data, method, **fields, **{"training.checkpoint_every": CHECKPOINT})
  train_until_killed(stopped, tmp_path, monkeypatch)
  assert [line["step"] for line in tiny_run.lines(tmp_path)] == list(range(1, KILLED))
  assert os.listdir(tmp_path / "checkpoints") == [str(CHECKPOINT)]

  loop.train(stopped, str(tmp_path))
  assert tiny_run.lines(tmp_path) == tiny_run.lines(whole)
  one, other = (tiny_run.checkpoint(run, folder, STEPS) for folder in (whole, tmp_path))
  assert one.keys() == other.keys()
  for path in one:
    np.testing.assert_array_equal(other[path], one[path], err_msg=path, strict=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_learns_and_leaves_its_files(name, straight):
  _, workdir = straight(name)
  assert sorted(os.listdir(workdir)) == [".lock", "checkpoints", "config.json", "metrics.jsonl", "versions.json"]
  assert os.listdir(workdir / "checkpoints") == [str(STEPS)]
  lines = tiny_run.lines(workdir)
  assert [line["step"] for line in lines] == [*range(1, STEPS + 1), STEPS]
  training, validation = lines[:-1], lines[-1]
  assert training[0]["loss"] == pytest.approx(np.log(264), abs=0.05)
  assert training[-1]["loss"] < training[0]["loss"] - 1
  assert validation["validation/loss"] < training[0]["loss"] - 1
  assert validation["validation/loss"] in [v for k, v in validation.items() if k.startswith("validation/loss/")]
  assert all(np.isfinite(list(line.values())).all() for line in lines)


def test_metrics_of_each_sampled_sub_model(straight):
  run, workdir = straight("switch")
  names = [s.name for s in run.method.submodels(run.model)]
  for line in tiny_run.lines(workdir)[:-1]:
    sampled = {names[i] for i in run.method.sample(run.model, 0, line["step"] - 1)}
    found = {k.removeprefix("submodel_loss/"): v for k, v in line.items() if k.startswith("submodel_loss/")}
    assert found.keys() == sampled
    assert np.mean(list(found.values())) == pytest.approx(line["loss"], rel=1e-5)


def test_a_finished_run_started_again_changes_nothing(straight):
  run, workdir = straight("dense")

  def contents():
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(workdir.rglob("[!.]*")) if p.is_file()}

  before = contents()
  loop.train(run, workdir)
  assert contents() == before


def assert_close(lines, expected):
  assert [line.keys() for line in lines] == [line.keys() for line in expected]
  for line, other in zip(lines, expected):
    np.testing.assert_allclose(list(line.values()), list(other.values()), rtol=1e-5, err_msg=str(line["step"]))


def on_mesh(data, *mesh):
  """The run `switch`, which is one of 8 data-parallel devices, on another mesh."""
  method, fields = VARIANTS["switch"]
  return tiny_run.assemble(data, method, **fields, **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_losses_do_not_depend_on_the_mesh(mesh, data, straight, tmp_path):
  _, whole = straight("switch")
  loop.train(on_mesh(data, *mesh), tmp_path)
  assert_close(tiny_run.lines(tmp_path), tiny_run.lines(whole))


def test_a_run_goes_on_with_another_mesh(data, straight, tmp_path, monkeypatch):
  _, whole = straight("switch")
  method, fields = VARIANTS["switch"]
  first = tiny_run.assemble(data, method, **fields, **{"training.checkpoint_every": CHECKPOINT})
  train_until_killed(first, tmp_path, monkeypatch)
  loop.train(on_mesh(data, 1, 4, 2), tmp_path)
  moved = tiny_run.lines(tmp_path)
  assert moved[:CHECKPOINT] == tiny_run.lines(whole)[:CHECKPOINT]
  assert_close(moved, tiny_run.lines(whole))


def test_evaluations_checkpoints_and_log_lines_fall_due(data, straight, tmp_path):
  due = {"eval_every": 3, "checkpoint_every": 2, "keep_checkpoints": 3, "log_every": 5}
  due = {f"training.{name}": steps for name, steps in due.items()}
  loop.train(tiny_run.assemble(data, "dense", **VARIANTS["dense"][1], **due), tmp_path)
  lines = tiny_run.lines(tmp_path)
  assert [line["step"] for line in lines if "validation/loss" in line] == [3, 6, 8]
  assert [line["step"] for line in lines if "loss" in line] == [1, 5, 8]
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "6", "8"]
  # Looking does not change what is seen.
  _, whole = straight("dense")
  assert lines[-1] == tiny_run.lines(whole)[-1]


def test_other_data_under_the_same_name_is_refused(straight, tmp_path):
  """A run whose corpus changed between two starts would be neither the one run nor the other."""
  run, workdir = straight("dense")
  other = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, fingerprint="0123456789abcdef"))
  before = (workdir / "metrics.jsonl").read_bytes()
  with pytest.raises(ConfigError, match="was trained on other data: .*0123456789abcdef; choose another"):
    loop.train(other, workdir)
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_the_same_text_as_other_tokens_is_refused(straight):
  """Another tokenizer under the same name."""
  run, workdir = straight("dense")
  other = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, tokens_fingerprint="0"))
  with pytest.raises(ConfigError, match="was trained on the same text as other tokens; its tokenizer has changed"):
    loop.train(other, workdir)


def test_a_best_checkpoint_that_cannot_be_told_is_refused(data, tmp_path):
  due = {"training.eval_every": 2, "training.checkpoint_every": 4}
  run = tiny_run.assemble(data, "dense", **{"mesh.fsdp": 2, "training.keep_best": "validation/los", **due})
  with pytest.raises(
    ConfigError, match="keep_best='validation/los' is not one of validation/loss, validation/accuracy,"
  ):
    loop.train(run, tmp_path)
  with pytest.raises(ConfigError, match="keep_best needs an evaluation at every checkpoint"):
    tiny_run.assemble(data, "dense", **{**due, "training.keep_best": "validation/loss", "training.eval_every": 3})


def test_a_changed_config_is_kept_only_where_it_works(data, straight, tmp_path, capfd):
  shutil.copytree(straight("dense")[1], tmp_path / "run")
  fields = {"mesh.fsdp": 2}
  saved = (tmp_path / "run" / "config.json").read_text()

  def change(**settings):
    loop.train(tiny_run.assemble(data, "dense", **fields, **settings), tmp_path / "run", change_config=True)

  with pytest.raises(ConfigError, match=r"run is at step 8, past training\.steps=4"):
    change(**{"training.steps": 4})
  with pytest.raises(ConfigError, match=r"optimizer\.name: 'adamw' -> 'muon'; which cannot be changed within a run"):
    change(**{"training.optimizer.name": "muon"})
  with loop.in_use(tmp_path / "run"), pytest.raises(ConfigError, match="is in use"):
    change(**{"training.steps": 12})
  assert (tmp_path / "run" / "config.json").read_text() == saved
  change(**{"training.steps": 12, "training.guard.spike": "skip"})  # whose window the checkpoint lacks
  assert "changed: training.guard.spike: 'off' -> 'skip'\n" in capfd.readouterr().err
  assert tiny_run.lines(tmp_path / "run")[-1]["step"] == 12
  assert '"steps": 12' in (tmp_path / "run" / "config.json").read_text()


def test_a_checkpoint_says_what_it_is_of(straight):
  run, workdir = straight("switch")
  with loop.Checkpointer(workdir / "checkpoints", keep=None) as checkpoints:
    metadata = checkpoints.metadata(STEPS)
  assert metadata["step"] == STEPS
  epoch, row = divmod(STEPS * 16, len(run.dataset.train))
  found = metadata["data"]
  assert (found["batch"], found["epoch"], found["row_of_epoch"]) == (STEPS, epoch, row)
  assert found["fingerprint"] == run.dataset.fingerprint
  assert metadata["random"] == {"seed": 0, "implementation": "threefry2x32"}
  assert metadata["config"]["method"]["num_sampled"] == 3
  assert metadata["versions"]["jax"] == jax.__version__
  assert metadata["metrics"]["validation/loss"] == tiny_run.lines(workdir)[-1]["validation/loss"]


def test_a_run_is_evaluated_on_devices_that_could_not_have_trained_it(data, tmp_path):
  _, experiment = tiny_run.parse_config(
    tiny_run.config(data, **{"data.batch_size": 6, "evaluation.batch_size": 5, "mesh.tensor": 3})
  )
  (tmp_path / "config.json").write_text(config_dict.to_json(experiment, "sorted_net"))
  run = tiny_run.run.load_run(tmp_path, rows=7)
  assert dict(run.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert (run.experiment.evaluation.rows, run.experiment.evaluation.batch_size) == (7, 8)


def test_another_config_or_a_file_is_no_workdir(data, straight, tmp_path):
  _, workdir = straight("dense")
  method, fields = VARIANTS["dense"]
  with pytest.raises(
    ConfigError, match="holds another config: seed: 0 -> 1; choose another --workdir, or --change_config"
  ):
    loop.train(tiny_run.assemble(data, method, **fields, seed=1), workdir)
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot use .* as workdir"):
    loop.train(straight("dense")[0], tmp_path / "file")

"""A run that begins with the parameters of a trained model."""

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from caches import cache_in

from adaptive import recursion
from adaptive.config import ConfigError
from adaptive.methods import parse_config
from adaptive.training import loop, warm_start
from adaptive.training.run import load_params, load_plan, plan

DEPTH = {"model.num_layers": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Folder of the data, and a trained dense run in it."""
  folder = tmp_path_factory.mktemp("place")
  with cache_in(folder / "cache"):
    data = tiny_run.corpus(folder / "corpus")
    run = tiny_run.assemble(data, "dense", **DEPTH, **{"training.steps": 2})
    loop.train(run, str(folder / "dense"))
    yield data, str(folder / "dense"), load_params(run, str(folder / "dense"))[1]


def test_a_dense_model_begins_where_another_ended(place):
  data, workdir, trained = place
  run = tiny_run.assemble(data, "dense", **DEPTH, **{"training.init_from": workdir, "mesh.data": 4, "mesh.fsdp": 2})
  state = warm_start.initial_state(run)
  tiny.assert_trees_equal(jax.device_get(state.params), jax.device_get(trained))
  assert int(state.step) == 0
  where = [leaf.sharding for leaf in jax.tree.leaves(state.params)]
  assert any(not sharding.is_fully_replicated for sharding in where), "on the mesh of the new run"


@pytest.mark.parametrize("how", ["average", "upper"])
def test_a_recursive_model_begins_with_tied_layers_and_fresh_routers(place, how):
  data, workdir, trained = place
  settings = {**DEPTH, "training.init_from": workdir, "training.init_layers": how}
  run = tiny_run.assemble(data, "mixture_of_recursions", **settings)
  fresh = warm_start.initial_state(tiny_run.assemble(data, "mixture_of_recursions", **DEPTH)).params
  params = jax.device_get(warm_start.initial_state(run).params)
  tied = recursion.tie(run.model.sharing, trained["layers"], how)
  tiny.assert_trees_close(params["layers"], jax.device_get(tied), rtol=1e-6)
  tiny.assert_trees_equal(params["embedding"], jax.device_get(trained["embedding"]))
  tiny.assert_trees_equal(params["router"], jax.device_get(fresh["router"]))
  loss = lambda p: float(run.method.loss(run.model, p, batch, (0,), jax.random.key(0), 0)[0])
  batch = {name: np.stack([run.dataset.train[i][name] for i in range(4)]) for name in run.dataset.train[0]}
  assert np.isfinite(loss(params))


def test_the_command_trains_from_there(place, tmp_path):
  data, workdir, _ = place
  settings = {**DEPTH, "training.init_from": workdir, "training.steps": 2}
  loop.train(tiny_run.assemble(data, "recursive", **settings), str(tmp_path / "run"))
  lines = [line for line in tiny_run.lines(tmp_path / "run") if "loss" in line]
  cold = tiny_run.assemble(data, "recursive", **DEPTH, **{"training.steps": 2})
  loop.train(cold, str(tmp_path / "cold"))
  assert lines[0]["loss"] != next(line for line in tiny_run.lines(tmp_path / "cold") if "loss" in line)["loss"]


@pytest.mark.slow
def test_a_second_stage_begins_where_the_first_one_ended(place, tmp_path):
  """FiRST's: routers on a frozen model, then all; and the model that the first stage begins with stays as it is."""
  data, workdir, trained = place
  stage = lambda **settings: tiny_run.assemble(data, "first", **DEPTH, **{"training.steps": 2, **settings})
  one = stage(**{"training.init_from": workdir, "method.train": "routers"})
  loop.train(one, str(tmp_path / "one"))
  params = jax.device_get(load_params(one, str(tmp_path / "one"))[1])
  routers = params.pop("routers")
  tiny.assert_trees_equal(params, jax.device_get(trained))
  assert (routers["bias"] != 2.0).all()
  begun = warm_start.initial_state(stage(**{"training.init_from": str(tmp_path / "one")}))
  tiny.assert_trees_equal(jax.device_get(begun.params), {**params, "routers": routers})
  other = tiny_run.assemble(data, "recursive", **DEPTH, **{"training.init_from": str(tmp_path / "one")})
  with pytest.raises(ConfigError, match="holds a model of method 'first': it must be a dense one"):
    warm_start.initial_state(other)


@pytest.mark.slow
def test_a_stage_brings_what_the_one_before_did_without(place, tmp_path):
  """CALM's classifier, on early exits that were trained without one: they stay as they are. Not the other way round."""
  data, _, _ = place
  stage = lambda **settings: tiny_run.assemble(data, "early_exit", **{"training.steps": 2, **settings})
  one, alone = stage(), {"method.classifier": "alone", "training.init_from": str(tmp_path / "one")}
  loop.train(one, str(tmp_path / "one"))
  loop.train(stage(**alone), str(tmp_path / "two"))
  params = jax.device_get(load_params(stage(**alone), str(tmp_path / "two"))[1])
  assert (params.pop("classifier")["weight"] != 0).all()
  tiny.assert_trees_equal(params, jax.device_get(load_params(one, str(tmp_path / "one"))[1]))
  with pytest.raises(ConfigError, match="has other parameters than this run"):
    warm_start.initial_state(stage(**{"training.init_from": str(tmp_path / "two")}))


def test_what_a_run_keeps_as_it_is_must_have_been_trained(place):
  data, workdir, _ = place
  settings = {**DEPTH, "method.exits": (1,), "method.classifier": "alone", "training.init_from": workdir}
  run = tiny_run.assemble(data, "early_exit", **settings, **{"method.heads": "own"})
  with pytest.raises(ConfigError, match="has no exit_heads; this run does not train what it would lack"):
    warm_start.initial_state(run)
  warm_start.initial_state(tiny_run.assemble(data, "early_exit", **settings))


@pytest.mark.parametrize(
  ("method", "settings", "named"),
  [
    ("early_exit", {"method.heads": "own", "method.heads_only": True}, "method.heads_only"),
    ("early_exit", {"method.classifier": "alone"}, "method.classifier='alone'"),
    ("jei_dnn", {"method.heads": "own", "method.backbone": "frozen"}, "method.backbone='frozen'"),
    ("sec", {"method.backbone": "frozen"}, "method.backbone='frozen'"),
    ("first", {**DEPTH, "method.train": "routers"}, "method.train='routers'"),
  ],
)
def test_what_trains_only_what_it_adds_needs_a_trained_model(method, settings, named):
  made = lambda training=True, **more: plan(
    *parse_config(tiny_run.config("nowhere", method, **settings, **more)), training
  )
  with pytest.raises(ConfigError, match=f"{named} trains what is added to a trained model"):
    made()
  made(**{"training.init_from": "runs/dense"})
  made(training=False)  # as for an evaluation


@pytest.mark.slow
def test_it_goes_on_and_is_evaluated_without_that_model(place, tmp_path):
  data, workdir, trained = place
  settings = {**DEPTH, "method.heads": "own", "method.heads_only": True, "training.init_from": str(tmp_path / "dense")}
  (tmp_path / "dense").symlink_to(workdir)
  made = lambda steps: tiny_run.assemble(data, "early_exit", **settings, **{"training.steps": steps})
  loop.train(made(2), str(tmp_path / "heads"))
  (tmp_path / "dense").unlink()
  loop.train(made(3), str(tmp_path / "heads"), change_config=True)
  step, params = load_params(load_plan(str(tmp_path / "heads")), str(tmp_path / "heads"))
  heads = jax.device_get(params).pop("exit_heads")
  assert step == 3
  assert (heads["scale"] != 1).all()
  tiny.assert_trees_equal({name: part for name, part in params.items() if name != "exit_heads"}, trained)


def test_what_does_not_fit_is_refused_and_leaves_no_folder(place, tmp_path):
  data, workdir, _ = place
  run = tiny_run.assemble(data, "dense", **{"training.init_from": workdir})
  with pytest.raises(ConfigError, match="they must be equal"):
    loop.train(run, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()
  run = tiny_run.assemble(data, "dense", **{"training.init_from": workdir})
  with pytest.raises(ConfigError, match=r"has model.num_layers=4, this run 2: they must be equal"):
    warm_start.initial_state(run)
  run = tiny_run.assemble(data, "dense", **{"training.init_from": "/nowhere"})
  with pytest.raises(ConfigError, match="/nowhere"):
    warm_start.initial_state(run)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import OptimizerConfig
from adaptive.methods import METHODS
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.step import compile_step, make_step

MODEL = tiny.model_config(num_layers=2)
DEEPER = tiny.model_config(num_layers=3)  # for methods that never skip the first and the last layer
BATCH = tiny.packed_batch(MODEL, rows=8)
SETTINGS = {
  "dense": {},
  "sorted_net": dict(d_ff=(8, 24), accum_data="shared", executor="mask", scheme="all"),
  "early_exit": dict(exits=(1,), heads="own"),
  "jei_dnn": dict(exits=(1,), heads="own"),
  "layer_skip": dict(dropout=0.0, curriculum="none"),  # drops are drawn for each micro-batch
  "recursive": dict(num_recursions=2, sharing="cycle"),
  "unified_skip": dict(speedups=(1.5,), train="all", cosine_loss=0.5),
  # The budget's loss is of the mean over a batch, which micro-batches have to themselves.
  "first": dict(prompt_tokens=2, budget_loss=0.0),
  "mixture_of_depths": dict(capacity=0.5, router_loss=0.5),
  "dr_llm": dict(hidden=4, windows=2),
  "sec": dict(exits=(1,)),
  "ponder": dict(num_recursions=2),
  "recurrent_depth": dict(prelude=1, core=1, num_recursions=1),
  # The router's loss is a mean over candidates, of which micro-batches may have more or fewer for their tokens.
  "mixture_of_recursions": dict(num_recursions=2, sharing="cycle", router_loss=0.0),
}


def build(name="dense", optimizer="adamw", warmup=0):
  method = METHODS[name]
  model = method.build(MODEL, method.Config(**SETTINGS[name]))
  settings = OptimizerConfig(name=optimizer, warmup_steps=warmup, learning_rate=0.01)
  return method, model, optim.make_optimizer(settings, 10)


def run(mesh, steps=2):
  """State after some compiled steps of SortedNet, the metrics of the last, and the state before the first."""
  method, model, optimizer = build("sorted_net")
  first = state = states.create(model, optimizer, mesh, seed=0)
  step = compile_step(method, model, optimizer, mesh, 0, 1)
  with jax.set_mesh(mesh):
    batch = sharding.global_batch(BATCH, mesh)
    for _ in range(steps):
      state, metrics = step(state, batch, np.asarray(method.sample(model, 0, 0), np.int32))
  return state, metrics, first


def single():
  return sharding.make_mesh(dataclasses.replace(sharding.MeshConfig(), data=1), jax.devices()[:1])


ACCUMULATED = {
  **{name: (name, settings) for name, settings in SETTINGS.items()},
  "distilled": ("sorted_net", dict(**SETTINGS["sorted_net"], distill=0.5)),
  "multi_exit": ("sorted_net", dict(depths=(1, 2), scheme="multi_exit")),
  "act": ("ponder", dict(num_recursions=2, halting="act")),
}


def test_every_method_accumulates():
  assert {name for name, _ in ACCUMULATED.values()} == set(METHODS)


@pytest.mark.parametrize("case", ACCUMULATED)
def test_one_by_eight_rows_equals_eight_by_one(case):
  """Gradients, seen through one step of plain descent, with micro-batches of unequal numbers of tokens."""
  name, settings = ACCUMULATED[case]
  method = METHODS[name]
  model = method.build(DEEPER if name in ("first", "unified_skip") else MODEL, method.Config(**settings))
  tokens = np.sum(np.asarray(BATCH["segment_ids"]) > 0, axis=1)
  assert len(set(tokens.tolist())) > 1
  batch, counted = BATCH, tokens.sum()
  if name == "dr_llm":  # counts labels, of which all rows have as many
    batch = BATCH | tiny.labels(MODEL, BATCH)
    counted = batch["visits"].size
  descent = optim.optax.sgd(1.0)
  params = tiny.random_params(model)
  start = states.fresh(params, descent)
  choice = method.sample(model, 0, 0)
  choice = choice if method.static_choice(model) else jnp.asarray(choice)

  def update(parts):
    step = make_step(method, model, descent, 0, parts)
    return jax.jit(lambda state, batch: step(state, batch, choice))(start, batch)

  results = [update(parts) for parts in (1, 8)]
  moved = [jax.tree.map(lambda a, b: a - b, state.params, params) for state, _ in results]
  tiny.assert_trees_close(moved[1], moved[0], rtol=1e-6, atol=1e-6)
  metrics = [m for _, m in results]
  tiny.assert_trees_close(metrics[1], metrics[0], rtol=1e-6)
  assert float(metrics[0]["loss"][1]) == counted * len(choice)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_computing_in_half_precision_keeps_the_state_s_dtypes_and_learns(optimizer):
  """Compute in bfloat16, parameters and second moment in float32, first moment in bfloat16."""
  method = METHODS["sorted_net"]
  model = method.build(dataclasses.replace(MODEL, dtype="bfloat16"), method.Config(**SETTINGS["sorted_net"]))
  settings = OptimizerConfig(
    name=optimizer, warmup_steps=0, learning_rate=0.01, muon_learning_rate=0.01, mu_dtype="bfloat16"
  )
  adam = optim.make_optimizer(settings, 10)
  params = tiny.random_params(MODEL)
  state = first = states.fresh(params, adam)
  step, losses = jax.jit(make_step(method, model, adam, 0, 2)), []
  assert "bf16" in step.lower(state, BATCH, jnp.arange(2)).as_text()
  for _ in range(8):
    state, metrics = step(state, BATCH, jnp.arange(2))
    losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype.name, tree)
  assert dtypes(state) == dtypes(first)
  assert set(jax.tree.leaves(dtypes(state.params))) == {"float32"}
  assert set(jax.tree.leaves(dtypes(state.opt_state))) == {"float32", "bfloat16", "int32"}
  assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def on_eight():
  return run(tiny.mesh(2, 2, 2))


def test_eight_devices_learn_what_one_learns(on_eight):
  one, found = (jax.device_get(ran[:2]) for ran in (run(single()), on_eight))
  tiny.assert_trees_close(found[1], one[1], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(found[0].params), jax.tree.leaves(one[0].params)):
    np.testing.assert_allclose(a, b, atol=1e-4)  # Adam's first steps divide gradients by themselves
  assert found[0].step == one[0].step == 2
  assert float(one[1]["grad_norm"][0]) > 0


def test_the_state_is_donated(on_eight):
  state, _, first = on_eight
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, first.opt_state)))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_step_leaves_the_state_in_its_shards(on_eight):
  _, model, optimizer = build("sorted_net")
  expected = states.shardings(model, optimizer, tiny.mesh(2, 2, 2)).params
  assert jax.tree.map(lambda x: x.sharding, on_eight[0].params) == expected


def test_a_state_depends_on_its_seed_but_not_on_its_mesh():
  _, model, optimizer = build()
  make = lambda mesh, seed: jax.device_get(states.create(model, optimizer, mesh, seed).params)
  alone = make(single(), 3)
  tiny.assert_trees_equal(make(tiny.mesh(2, 2, 2), 3), alone)
  other = make(single(), 4)
  assert not np.array_equal(other["embedding"]["table"], alone["embedding"]["table"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_lie_with_their_parameters(optimizer):
  _, model, optimizer = build(optimizer=optimizer)
  abstract = states.abstract(model, optimizer, tiny.mesh(2, 2, 2))
  places = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(abstract.params)}
  moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim > 1]
  assert len(moments) >= len(jax.tree.leaves(abstract.params))
  for leaf in moments:
    assert leaf.sharding == places[leaf.shape]
  assert any(not leaf.sharding.is_fully_replicated for leaf in moments)


def test_an_abstract_state_is_that_which_is_created():
  _, model, optimizer = build(optimizer="muon")
  mesh = tiny.mesh(2, 2, 2)
  created, abstract = states.create(model, optimizer, mesh, 0), states.abstract(model, optimizer, mesh)
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
  assert describe(created) == describe(abstract)

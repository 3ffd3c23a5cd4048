"""SortedNet inside the training step: what is compiled, what is held in memory, what a step changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import MeshConfig, OptimizerConfig
from adaptive.methods import dense
from adaptive.methods.width import sorted_net
from adaptive.methods.width.sorted_net import Config
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.step import compile_step, make_step

MODEL = tiny.model_config(num_layers=2)
FAMILY = Config(depths=(1, 2), d_ff=(8, 24), num_sampled=2)
BATCH = tiny.packed_batch(MODEL, rows=4)


def optimizer(**changes):
  return optim.make_optimizer(OptimizerConfig(warmup_steps=0, decay_fraction=0.0, **changes), 10)


@pytest.mark.parametrize(("executor", "family", "choices"), [
  ("switch", FAMILY, 6),
  ("mask", FAMILY, 6),
  ("static", Config(d_ff=(8, 16, 24), num_sampled=2), 3),
], ids=["switch", "mask", "static"])  # fmt: skip
def test_the_step_compiles_once_or_once_for_every_set_of_sub_models(executor, family, choices):
  model, mesh = sorted_net.build(MODEL, dataclasses.replace(family, executor=executor)), one_device()
  drawn = [sorted_net.sample(model, 0, step) for step in range(40)]
  assert len(set(drawn)) == choices
  update = optimizer()
  step, state = compile_step(sorted_net, model, update, mesh, 0, 1), states.create(model, update, mesh, 0)
  with jax.set_mesh(mesh):
    batch = sharding.global_batch(BATCH, mesh)
    for choice in drawn:
      state, _ = step(state, batch, choice if executor == "static" else np.asarray(choice, np.int32))
  assert step._cache_size() == (choices if executor == "static" else 1)
  assert int(state.step) == len(drawn)


def one_device():
  return sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.mark.parametrize(("executor", "name"), [("switch", "adamw"), ("switch", "muon"), ("static", "adamw")])
def test_a_step_of_the_full_sub_model_alone_is_a_step_of_the_dense_model(executor, name):
  """Parameters and moments; one sub-model of a family, so that the loop over sub-models and the branches are there."""
  nested = sorted_net.build(MODEL, dataclasses.replace(FAMILY, num_sampled=1, executor=executor))
  update, params = optimizer(name=name), tiny.random_params(MODEL)
  start = states.fresh(params, update)

  def after(method, model, choice):
    step = make_step(method, model, update, 0, 1)
    if method is sorted_net and sorted_net.static_choice(model):
      return jax.jit(lambda state, batch: step(state, batch, choice))(start, BATCH)[0]
    return jax.jit(step)(start, BATCH, np.array(choice, np.int32))[0]

  found, expected = after(sorted_net, nested, (3,)), after(dense, dense.build(MODEL, dense.Config()), (0,))
  tiny.assert_trees_close(found.opt_state, expected.opt_state, rtol=1e-5)
  tiny.assert_trees_close(found.params, expected.params, rtol=1e-5, atol=1e-6)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected.params, params)
  assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("inactive", ["keep", "freeze"])
def test_a_whole_step_moves_or_freezes_what_it_did_not_draw(inactive):
  model = sorted_net.build(MODEL, dataclasses.replace(FAMILY, accum_data="shared", executor="switch"))
  update, params = optimizer(name="muon", inactive=inactive), tiny.random_params(MODEL)
  step = jax.jit(make_step(sorted_net, model, update, 0, 1))
  first, _ = step(states.fresh(params, update), BATCH, np.array([0, 3], np.int32))
  second, _ = step(first, BATCH, np.array([0, 1], np.int32))
  undrawn = jax.tree.map(lambda before, after: np.asarray(before != after)[1], *layers_of(first, second))
  moved = [leaf.any() for leaf in jax.tree.leaves(undrawn)]
  assert all(moved) if inactive == "keep" else not any(moved)


def layers_of(*several):
  """Layer matrices of states, whose second layer is in no sub-model of depth 1."""
  return ({**state.params["layers"]["attention"], **state.params["layers"]["mlp"]} for state in several)


def test_eight_exits_need_hardly_more_memory_than_one():
  """With a large vocabulary, the logits of one exit are most of it."""
  config = tiny.model_config(num_layers=8, vocab_size=8192, d_model=16)
  params, batch = tiny.random_params(config), tiny.one_document(config, 2, 64)

  def memory(depths):
    model = sorted_net.build(config, Config(depths=depths, scheme="multi_exit"))
    choice = sorted_net.sample(model, 0, 0)
    gradient = jax.grad(lambda params: sorted_net.loss(model, params, batch, choice, None, 0)[0])
    return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

  one = memory((8,))
  assert one > 4 * 2 * 64 * config.vocab_size, "the logits of an exit, at least"
  assert memory(tuple(range(1, 9))) < 1.3 * one

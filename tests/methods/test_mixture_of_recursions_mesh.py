"""Mixture-of-Recursions on meshes: one device's loss and gradient, and no activation sent because of routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import model as models
from adaptive.training import hlo

CONFIG = tiny.model_config(num_layers=3, num_heads=4, d_ff=16, vocab_size=16)
BATCH = tiny.packed_batch(CONFIG, rows=8)
# No token twice in a row: equal tokens at the start of two documents have equal scores, and rounding would decide.
BATCH["inputs"] = jnp.asarray(
  np.random.default_rng(1).permuted(np.tile(np.arange(16, dtype=np.int32), (8, 1)), axis=1)[:, :12]
)
BOUNDED = dict(routing="token_choice", gate="softmax", alpha=1.0, capacities=(1.0, 0.6, 0.3))
SETTINGS = {
  "expert": dict(router_loss=0.1, z_loss=0.01),
  "expert, shared": dict(kv_cache="shared"),
  "expert, hybrid": dict(kv_cache="hybrid", capacity_chunk=4, inference="aux_router"),
  "bounded": BOUNDED,
  "bounded, shared": dict(BOUNDED, kv_cache="shared", balance="loss_free"),
  "bounded, hybrid": dict(BOUNDED, kv_cache="hybrid", z_loss=0.01),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)
ROWS_ONLY = (8, 1, 1)


@functools.cache
def made(name):
  model = mor.build(CONFIG, mor.Config(sharing="cycle", **SETTINGS[name]))
  return model, tiny.random_params(model, seed=1)


def training(model):
  return lambda params, batch: models.training_logits(model, params, batch, None, jax.random.key(0), jnp.int32(0))[0]


def gradient(model):
  return jax.value_and_grad(lambda params, batch: mor.loss(model, params, batch, (0,), jax.random.key(0), 0)[0])


@functools.cache
def compiled(name, shape):
  """The loss and gradient of a mesh, the gradients lying as the parameters do, and its arguments."""
  model, params = made(name)
  mesh = tiny.mesh(*shape)
  with jax.set_mesh(mesh):
    params, batch = tiny.spread(model, params, BATCH, mesh)
    where = (None, jax.tree.map(lambda x: x.sharding, params))
    return jax.jit(gradient(model), out_shardings=where).lower(params, batch).compile(), (params, batch)


@functools.cache
def alone(name):
  model, params = made(name)
  return jax.jit(gradient(model))(params, BATCH)


@pytest.mark.parametrize(("name", "shape"), [
  ("expert, hybrid", ROWS_ONLY), ("expert, hybrid", (2, 2, 2)), ("bounded, hybrid", ROWS_ONLY),
], ids=str)  # fmt: skip
def test_loss_and_gradient_are_those_of_one_device(name, shape):
  program, arguments = compiled(name, shape)
  tiny.assert_trees_close(program(*arguments), alone(name), rtol=1e-5)


@every_setting
def test_the_forward_passes_send_nothing_when_rows_are_spread(name):
  model, params = made(name)
  mesh = tiny.mesh(*ROWS_ONLY)
  with jax.set_mesh(mesh):
    arguments = tiny.spread(model, params, BATCH, mesh)
    rows = arguments[1]["inputs"].sharding
    last = len(mor.submodels(model)) - 1
    # At inference keys and values are masked and not gathered, so one rule stands for all.
    causal = [lambda p, b: mor.forward(model, p, b, last).logits] if name in ("expert, hybrid", "bounded") else []
    for forward in (training(model), *causal):
      program = jax.jit(forward, out_shardings=rows).lower(*arguments).compile()
      assert hlo.collectives(program.as_text()).totals == {}


@pytest.mark.parametrize("name", ["expert, hybrid", "bounded, hybrid"])
def test_the_backward_pass_sends_gradients_of_parameters_and_no_more(name):
  program, (params, _) = compiled(name, ROWS_ONLY)
  found = hlo.collectives(program.as_text())
  assert {c.kind for c in found.totals} == {"all-reduce"}
  assert found.unknown_loops == 0
  # What is used several times sends each part of its gradient: layers in three recursions, the table at both ends.
  uses = {"layers": 3, "embedding": 2}
  size = sum(uses.get(name, 1) * leaf.nbytes for name, part in params.items() for leaf in jax.tree.leaves(part))
  assert 0.3 * size < found.bytes <= size + 4 * 40, "the losses' sums and counts beside the gradients"
  assert BATCH["inputs"].size * CONFIG.d_model * 4 > 160, "activations would be noticed"


def test_a_gather_with_row_numbers_would_be_noticed():
  """The control: what `routing.take` would be without batching dimensions."""
  mesh = tiny.mesh(*ROWS_ONLY)
  where = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
  x, index = jnp.ones((8, 12, 16)), jnp.zeros((8, 4), jnp.int32)
  take = lambda x, i: x[jnp.arange(8)[:, None], i]
  program = jax.jit(take, in_shardings=(where, where), out_shardings=where).lower(x, index).compile()
  assert hlo.collectives(program.as_text()).bytes > 0
  top = jax.jit(lambda s: jax.lax.top_k(s, 4)[1], in_shardings=where, out_shardings=where)
  assert hlo.collectives(top.lower(np.ones((8, 12), np.float32)).compile().as_text()).bytes > 0

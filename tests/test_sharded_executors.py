"""Sub-models on a mesh: the same results, and no data moved that the full model would not move."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny

from adaptive import executors, losses
from adaptive import subnet as subnets

CONFIG = tiny.model_config(vocab_size=32, d_model=16, num_heads=8, num_kv_heads=4, head_dim=4, d_ff=32, ff_groups=4)
PARAMS = tiny.random_params(CONFIG)
BATCH = tiny.packed_batch(CONFIG, rows=8)
FULL = subnets.prefix(CONFIG)
NARROW = subnets.prefix(CONFIG, 2, 1, 8)
CUTS = {
  "all": NARROW,
  "depth": subnets.prefix(CONFIG, depth=2),
  "q_per_kv": subnets.prefix(CONFIG, q_per_kv=1),
  "d_ff": subnets.prefix(CONFIG, d_ff=8),
}
FAMILY = (*CUTS.values(), FULL)
TABLE = executors.choices(CONFIG, FAMILY)
MOVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def loss_of(logits):
  return losses.mean(losses.cross_entropy(logits, BATCH["targets"], BATCH["segment_ids"] > 0))


def static(subnet):
  return jax.value_and_grad(lambda params, batch: loss_of(executors.static(CONFIG, params, batch, subnet)))


def switch(table):
  return jax.value_and_grad(lambda params, batch, i: loss_of(executors.switch(CONFIG, params, batch, table, i)))


def compiled(fn, mesh, *args):
  """The program for a mesh, its gradients lying as the parameters do, and its arguments."""
  with jax.set_mesh(mesh):
    params, batch = tiny.spread(CONFIG, PARAMS, BATCH, mesh)
    where = (None, jax.tree.map(lambda x: x.sharding, params))
    return jax.jit(fn, out_shardings=where).lower(params, batch, *args).compile(), (params, batch, *args)


def moves(program) -> collections.Counter:
  """How many instructions of a program move data between devices, by kind."""
  text = program.as_text()
  return collections.Counter({kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in MOVES})


@functools.cache
def moves_of_static(shape, subnet):
  return moves(compiled(static(subnet), tiny.mesh(*shape))[0])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 2, 2)], ids=str)
def test_a_sub_model_moves_no_more_than_the_full_one(shape, cut):
  full, found = moves_of_static(shape, FULL), moves_of_static(shape, CUTS[cut])
  assert full["all-reduce"] > 0
  for kind in ("collective-permute", "all-gather", "all-to-all"):
    assert found[kind] <= full[kind], kind


def test_switch_gathers_and_permutes_no_activations_on_a_tensor_mesh():
  mesh = tiny.mesh(2, 1, 4)
  full = moves(compiled(switch(executors.choices(CONFIG, [FULL])), mesh, jnp.int32(0))[0])
  found = moves(compiled(switch(TABLE), mesh, jnp.int32(0))[0])
  assert full["all-reduce"] > 0
  for kind in ("collective-permute", "all-gather", "all-to-all"):
    assert found[kind] <= full[kind], kind


def test_a_contiguous_prefix_of_a_sharded_axis_would_be_noticed():
  """The control: with one group the feed-forward axis itself would be sharded, and its prefix would move."""
  mesh = tiny.mesh(2, 1, 4)
  x, w = jnp.ones((8, 16)), jnp.ones((16, 32))
  where = [jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data", None), (None, "tensor"))]
  narrow = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w[:, :8]) ** 2))
  program = jax.jit(narrow, in_shardings=where[::-1], out_shardings=where[1]).lower(w, x).compile()
  assert sum(moves(program)[kind] for kind in ("collective-permute", "all-gather", "all-to-all")) > 0


def test_switch_has_the_loss_and_gradient_of_one_device():
  program, args = compiled(switch(TABLE), tiny.mesh(2, 2, 2), jnp.int32(0))
  alone = jax.jit(switch(TABLE))
  for index in range(len(FAMILY)):
    tiny.assert_trees_close(program(*args[:2], jnp.int32(index)), alone(PARAMS, BATCH, jnp.int32(index)), rtol=1e-5)

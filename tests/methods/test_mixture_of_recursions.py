"""Mixture-of-Recursions' training pass against the slow one: logits, choices, router losses and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_recursions
import slow_rows
import tiny

from adaptive import routing
from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import model as models
from adaptive.methods.depth.mixture_of_recursions import token_choice
from adaptive.methods.depth.mixture_of_recursions.config import capacity_tokens

THIRDS = (1.0, 2 / 3, 1 / 3)
EXPERT = dict(capacities=THIRDS, z_loss=0.1, router_loss=0.5)
TOKEN = dict(routing="token_choice", gate="softmax", alpha=1.0, balance_loss=0.5, z_loss=0.1)
SETTINGS = {
  "expert": dict(EXPERT, layers=8),
  "expert, shared, additive": dict(EXPERT, kv_cache="shared", router="wide_mlp", gating="additive"),
  "expert, hybrid, chunks": dict(
    EXPERT, kv_cache="hybrid", sharing="cycle", layers=6, capacity_chunk=4, capacities=(1.0, 0.6, 0.3), gate="tanh",
    backbone=dict(qk_norm=True, qkv_bias=True),
  ),
  "expert, aux_router": dict(
    EXPERT, sharing="cycle", layers=4, num_recursions=2, capacities=(0.7, 0.5), router="mlp", temperature=2.0,
    inference="aux_router",
  ),
  "token": dict(TOKEN),
  "token, shared, every": dict(
    TOKEN, sharing="cycle", layers=3, kv_cache="shared", gate="sigmoid", composition="every", balance="loss_free",
    router="mlp", alpha=0.6, temperature=0.2,
  ),
  "token, hybrid, every": dict(TOKEN, kv_cache="hybrid", composition="every", sharing="cycle", layers=6),
  "bounded": dict(TOKEN, capacities=(1.0, 0.6, 0.2)),
  "bounded, shared": dict(
    TOKEN, sharing="cycle", layers=3, kv_cache="shared", gate="sigmoid", composition="every", balance="loss_free",
    router="mlp", alpha=0.6, temperature=0.2, capacities=(1.0, 0.5, 0.25),
  ),
  "bounded, hybrid": dict(
    TOKEN, capacities=(1.0, 0.5), kv_cache="hybrid", layers=4, num_recursions=2, balance="loss_free"
  ),
}  # fmt: skip


SIZE = dict(num_heads=4, d_ff=16, vocab_size=16)
SMALLEST = dict(num_heads=2, num_kv_heads=1, d_model=8, d_ff=8, ff_groups=1, vocab_size=16)


def build(layers=5, size=SIZE, backbone=None, **settings):
  config = tiny.model_config(num_layers=layers, **size, **(backbone or {}))
  return mor.build(config, mor.Config(**settings))


def random_params(model, seed=1):
  """With routers that spread what they read over all depths, and a bias that changes some choices."""
  params = tiny.random_params(model, seed)
  if "bias" in params.get("router", {}):
    params["router"]["bias"] = jnp.linspace(-0.05, 0.05, model.method.num_recursions)
  return params


def batch_of(model, rows=2):
  return tiny.packed_batch(model.config, rows=rows, length=12)


def weights_of(model, batch):
  """Of each logit in the loss; none at padding."""
  shape = (*batch["inputs"].shape, model.config.vocab_size)
  weights = np.sin(np.arange(np.prod(shape))).reshape(shape)
  return np.where(np.asarray(batch["segment_ids"])[..., None] > 0, weights, 0)


@functools.cache
def trained(name, smallest=False):
  """(logits, router losses, gradients) of the method, what it chose, and the arguments."""
  model = build(size=SMALLEST if smallest else SIZE, **SETTINGS[name])
  params, batch, chosen = random_params(model), batch_of(model, rows=1 if smallest else 2), []
  weights = weights_of(model, batch)

  def total(params):
    logits, losses, _ = models.training_logits(model, params, batch, None, jax.random.key(0), jnp.int32(0))
    return jnp.sum(jnp.asarray(weights, jnp.float32) * logits) + losses, (logits, losses)

  with pytest.MonkeyPatch.context() as patch:
    spy(patch, routing, "top", chosen, lambda _, index: index)
    spy(patch, token_choice, "compose", chosen, lambda arguments, _: arguments[1].depth)
    grads, (logits, losses) = jax.jit(jax.grad(total, has_aux=True))(params)
    jax.effects_barrier()
  return (logits, losses, grads), chosen, (model, params, batch)


def spy(patch, module, name, found, part):
  """Collects a part of what a function is given and returns, whenever the program runs it."""
  function = getattr(module, name)

  def call(*args):
    result = function(*args)
    jax.debug.callback(lambda value: found.append(np.asarray(value)), part(args, result), ordered=True)
    return result

  patch.setattr(module, name, call)


def positions_of(model, found, batch):
  """What was collected, as lists of positions by row and recursion."""
  rows, recursions, length = len(batch["inputs"]), range(model.method.num_recursions), batch["inputs"].shape[1]
  if not model.method.expert_choice:
    (depth,), real = found, np.asarray(batch["segment_ids"]) > 0
    return [[np.flatnonzero(real[row] & (depth[row] >= r)).tolist() for r in recursions] for row in range(rows)]
  places = [np.broadcast_to(np.arange(length), (rows, length))] * (len(recursions) - len(found)) + found
  positions = [[range(length)] for _ in range(rows)]
  for row in range(rows):
    for among in places:
      positions[row].append([positions[row][-1][place] for place in among[row]])
  return [lists[1:] for lists in positions]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_training_pass_is_the_slow_one(name):
  (logits, losses, grads), found, (model, params, batch) = trained(name)
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.complex128), params)
  slow_logits, slow_losses, chosen = slow_recursions.run(model, exact, batch)
  assert positions_of(model, found, batch) == chosen
  real = np.asarray(batch["segment_ids"]) > 0
  tiny.assert_trees_close(np.asarray(logits)[real], slow_logits[real].real, rtol=1e-5)
  np.testing.assert_allclose(losses, slow_losses.real, rtol=1e-5)
  check_gradients(model, exact, batch, grads)


def test_choices_differ_between_rows_and_are_not_the_first_tokens():
  """The control of all above."""
  for name in SETTINGS:
    _, found, (model, _, batch) = trained(name)
    chosen = positions_of(model, found, batch)
    varied = [a != b and list(range(len(a))) != a for a, b in zip(*chosen)]
    assert any(varied), name
    if name.startswith("bounded"):
      bounds = capacity_tokens(model.method, 12)[1:]
      assert [max(map(len, lists)) for lists in list(zip(*chosen))[1:]] == list(bounds), "the bound is met"


def check_gradients(model, params, batch, grads):
  """Along a random direction of each parameter."""
  rng = np.random.default_rng(7)
  for number, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
    along = rng.normal(size=grad.shape)
    expected = slow_slope(model, params, batch, number, along)
    slope, size = np.sum(np.asarray(grad, np.float64) * along), np.linalg.norm(grad)
    assert abs(slope - expected) <= 1e-5 * size + 1e-6, (jax.tree_util.keystr(path), slope, expected)


def slow_slope(model, params, batch, number, along):
  """How the slow loss grows when one of the parameters' leaves moves along a direction."""

  def total(params):
    logits, losses, _ = slow_recursions.run(model, params, batch)
    return np.sum(weights_of(model, batch) * logits) + losses

  return slow_rows.slope(total, params, number, along)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_entry_of_every_gradient_is_the_slow_one(name):
  (_, _, grads), found, (model, params, batch) = trained(name, smallest=True)
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.complex128), params)
  assert positions_of(model, found, batch) == slow_recursions.run(model, exact, batch)[2]
  for number, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
    entries = np.eye(grad.size).reshape(-1, *grad.shape)
    expected = np.array([slow_slope(model, exact, batch, number, entry) for entry in entries])
    bound = 1e-5 * np.abs(expected).max() + 1e-6
    np.testing.assert_allclose(np.ravel(grad), expected, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))

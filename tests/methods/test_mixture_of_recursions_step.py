"""Mixture-of-Recursions inside updates: the controller of the balance, the auxiliary router, and numerical settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.config import OptimizerConfig
from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import token_choice
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.step import make_step

CONFIG = tiny.model_config(num_layers=2, num_heads=2, num_kv_heads=1, d_ff=16, vocab_size=16)
TOKEN = dict(routing="token_choice", gate="softmax", alpha=1.0)


def build(config=CONFIG, **settings):
  settings = {"num_recursions": 2, "sharing": "cycle", **settings}
  return mor.build(dataclasses.replace(config, num_layers=settings["num_recursions"]), mor.Config(**settings))


def loss(model, params, batch, step=0):
  return mor.loss(model, params, batch, (0,), jax.random.key(0), jnp.int32(step))


def gradient(model):
  return jax.jit(jax.grad(functools.partial(loss, model), has_aux=True))


@pytest.mark.parametrize(("settings", "accum"), [
  (dict(name="adamw"), 1), (dict(name="muon", inactive="freeze"), 2),
], ids=str)  # fmt: skip
def test_the_bias_moves_against_the_load_of_the_whole_update_and_by_nothing_else(settings, accum):
  model = build(**TOKEN, num_recursions=3, balance="loss_free", balance_rate=0.01)
  update = optim.make_optimizer(OptimizerConfig(warmup_steps=0, decay_fraction=0.0, weight_decay=0.5, **settings), 10)
  params, batch = tiny.random_params(model, seed=1), tiny.packed_batch(CONFIG, rows=4)
  params["router"]["bias"] = jnp.asarray([0.2, -0.1, 0.05])
  step = jax.jit(make_step(mor, model, update, 0, accum))
  state = states.fresh(params, update)
  choice = np.array(mor.sample(model, 0, 0), np.int32)
  for _ in range(3):
    x = model.apply({"params": state.params}, batch, method="embed")[0]
    depth = np.asarray(token_choice.route(model, state.params, x, 3).depth)[np.asarray(batch["segment_ids"]) > 0]
    loads = np.bincount(depth, minlength=3)
    assert len(set(loads)) > 1
    before = np.asarray(state.params["router"]["bias"])
    state, metrics = step(state, batch, choice)
    np.testing.assert_array_equal([metrics[f"load/{i + 1}"][0] for i in range(3)], loads)
    expected = before + 0.01 * np.sign(np.mean(loads) - loads)
    np.testing.assert_allclose(state.params["router"]["bias"], expected, rtol=0, atol=1e-7)
  assert np.abs(state.params["router"]["weight"] - params["router"]["weight"]).max() > 1e-3


def test_a_bias_far_from_balance_comes_to_even_loads():
  """The controller alone, on the scores of a fixed router."""
  model = build(**TOKEN, num_recursions=3, balance="loss_free", balance_rate=0.005)
  params, real = tiny.random_params(model, seed=1), jnp.ones((4, 50), bool)
  params["router"]["bias"] = jnp.asarray([0.9, 0.0, 0.0])
  x = jax.random.normal(jax.random.key(0), (4, 50, CONFIG.d_model))

  def one(params, _):
    _, metrics = token_choice.balance(model, token_choice.route(model, params, x, 3), real)
    return mor.control(model, params, metrics), jnp.stack([metrics[f"load/{i + 1}"][0] for i in range(3)])

  _, loads = jax.jit(lambda params: jax.lax.scan(one, params, length=300))(params)
  assert loads[0, 0] > 150
  assert np.ptp(loads[-20:].mean(0)) < 10


def test_without_loss_free_balancing_control_changes_nothing():
  model = build(**TOKEN)
  params = tiny.random_params(model)
  assert mor.control(model, params, {}) is params
  assert "bias" not in params["router"]


def test_all_tokens_go_all_the_way_during_the_balance_warm_up():
  model, batch = build(**TOKEN, num_recursions=3, balance_warmup_steps=2), tiny.packed_batch(CONFIG)
  params = tiny.random_params(model, seed=1)
  find = jax.jit(lambda step: loss(model, params, batch, step)[1])
  found = [find(step) for step in range(3)]
  forced = build(**TOKEN, num_recursions=3, balance="loss_free")
  deep = {**params, "router": {**params["router"], "bias": jnp.array([0.0, 0.0, 1.0])}}  # sends all tokens to the end
  all_the_way = loss(forced, deep, batch, 5)[1]["loss"]
  np.testing.assert_allclose(found[0]["loss"], all_the_way, rtol=1e-5)
  assert float(found[0]["loss"][0]) == float(found[1]["loss"][0]) != float(found[2]["loss"][0])
  # Balancing follows what the router wants: it would else push away from the depth that all are given.
  assert all(float(found[0][f"load/{i}"][0]) == float(found[2][f"load/{i}"][0]) > 0 for i in (1, 2, 3))


AUX = dict(inference="aux_router", capacities=(1.0, 0.5))


def test_the_auxiliary_router_learns_and_teaches_nothing():
  batch = tiny.packed_batch(CONFIG)
  model, without = build(**AUX), build(capacities=AUX["capacities"], router_loss=0.0)
  params = tiny.random_params(model, seed=1)
  grads, _ = gradient(model)(params, batch)
  assert np.all(np.abs(grads["aux_router"]["weight"]).max(axis=(1, 2)) > 1e-4)
  main = {name: part for name, part in params.items() if name != "aux_router"}
  alone, _ = gradient(without)(main, batch)
  tiny.assert_trees_close({n: g for n, g in grads.items() if n != "aux_router"}, alone, rtol=1e-5)


def first_moves(factors):
  """How far one update moves each part, and the parts before and after it."""
  model = build(**AUX)
  config = OptimizerConfig(warmup_steps=0, decay_fraction=0.0, weight_decay=0.1 if factors else 0.0, eps=1e-20)
  update = optim.make_optimizer(config, 10, mor.learning_rates(model) if factors is None else factors)
  params, batch = tiny.random_params(model, seed=1), tiny.packed_batch(CONFIG)
  state, _ = jax.jit(make_step(mor, model, update, 0, 1))(states.fresh(params, update), batch, np.array([1], np.int32))
  far = {
    part: [float(np.median(np.abs(x))) for x in jax.tree.leaves(jax.tree.map(jnp.subtract, state.params[part], before))]
    for part, before in params.items()
  }
  return far, params, state.params


def test_the_auxiliary_router_moves_ten_times_as_far():
  """Adam's first update is the learning rate times the sign of the gradient."""
  assert mor.learning_rates(build(**AUX)) == {"aux_router": 10.0}
  assert mor.learning_rates(build()) == {}
  far, _, _ = first_moves(None)
  np.testing.assert_allclose(far["aux_router"], 3e-2, rtol=1e-3)
  np.testing.assert_allclose([*far["router"], *far["layers"]], 3e-3, rtol=1e-3)


def test_a_factor_of_zero_freezes():
  _, before, after = first_moves({"layers": 0.0, "aux_router": 10.0})
  tiny.assert_trees_equal(after["layers"], before["layers"])
  assert np.any(after["router"]["weight"] != before["router"]["weight"])


@pytest.mark.parametrize("kv_cache", ["recursion_wise", "shared", "hybrid"])
def test_the_configured_attention_runs_in_every_recursion(monkeypatch, kv_cache):
  asked, plain = [], jax.nn.dot_product_attention

  def attention(*args, implementation, **kwargs):
    asked.append(implementation)
    return plain(*args, implementation="xla", **kwargs)

  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  model = build(dataclasses.replace(CONFIG, attention="cudnn"), kv_cache=kv_cache)
  params = tiny.random_params(model)
  asked.clear()
  jax.eval_shape(functools.partial(loss, model), params, tiny.packed_batch(CONFIG))
  assert asked == ["cudnn", "cudnn"]


@pytest.mark.parametrize(("settings", "remat"), [
  (dict(kv_cache="hybrid"), "dots"), (dict(TOKEN, capacities=(1.0, 0.5), composition="every"), "full"),
], ids=str)  # fmt: skip
def test_recomputing_in_the_backward_pass_changes_nothing(settings, remat):
  plain, again = build(**settings), build(**settings, remat_recursions=True)
  both = build(dataclasses.replace(CONFIG, remat=remat), **settings, remat_recursions=True)
  params, batch = tiny.random_params(plain, seed=1), tiny.packed_batch(CONFIG)
  expected, _ = gradient(plain)(params, batch)
  tiny.assert_trees_close(gradient(both)(params, batch)[0], expected, rtol=1e-5)
  program = lambda model: str(jax.make_jaxpr(jax.grad(lambda p: loss(model, p, batch)[0]))(params))
  assert [program(model).count("prevent_cse=") for model in (plain, again)] == [0, 2], "one for each recursion"


@pytest.mark.parametrize("settings", [
  dict(kv_cache="hybrid"), dict(TOKEN, capacities=(1.0, 0.5), kv_cache="shared", composition="every"),
], ids=str)  # fmt: skip
def test_parameters_in_bfloat16_take_a_step(settings):
  """Routers too: their scores are computed in float32 all the same."""
  model = build(dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"), **settings)
  params, batch = tiny.random_params(model, seed=2), tiny.packed_batch(CONFIG)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
  assert params["layers"]["mlp"]["up"].dtype == jnp.bfloat16
  (value, _), grads = jax.jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))(params, batch)
  exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  np.testing.assert_allclose(value, jax.jit(functools.partial(loss, build(**settings)))(exact, batch)[0], rtol=0.05)
  assert jax.tree.map(lambda leaf: leaf.dtype, grads) == jax.tree.map(lambda leaf: leaf.dtype, params)
  assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("settings", [
  dict(kv_cache="hybrid"), dict(TOKEN, capacities=(1.0, 0.5), kv_cache="shared", composition="every"),
], ids=str)  # fmt: skip
def test_bfloat16_is_finite_and_close(settings):
  batch = tiny.packed_batch(CONFIG)
  exact, half = build(**settings), build(dataclasses.replace(CONFIG, dtype="bfloat16"), **settings)
  params = tiny.random_params(exact, seed=2)
  expected = float(jax.jit(functools.partial(loss, exact))(params, batch)[0])
  (value, metrics), grads = jax.jit(jax.value_and_grad(functools.partial(loss, half), has_aux=True))(params, batch)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((grads, metrics)))
  assert expected != float(value)
  np.testing.assert_allclose(value, expected, rtol=0.05)


@pytest.mark.parametrize("settings", [
  dict(kv_cache="recursion_wise", z_loss=0.1, capacity_chunk=4, inference="aux_router"),
  dict(TOKEN, capacities=(1.0, 0.5), kv_cache="hybrid"),
], ids=str)  # fmt: skip
def test_gradients_are_finite_where_rows_are_padding_but_for_one_token(settings):
  model, batch = build(**settings), tiny.packed_batch(CONFIG)
  lone = jnp.asarray(np.arange(12) == 0, jnp.int32)
  batch["segment_ids"] = jnp.stack([lone, jnp.zeros_like(lone)])
  grads, metrics = gradient(model)(tiny.random_params(model, seed=1), batch)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, metrics)))
  assert float(metrics["loss"][1]) == 1
  assert np.abs(grads["layers"]["mlp"]["down"]).max() > 0

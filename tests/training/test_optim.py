import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adaptive import methods
from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError, OptimizerConfig
from adaptive.training import optim
from adaptive.training import state as states

CONFIG = tiny.model_config(qkv_bias=True, qk_norm=True, tied_embeddings=False)
PARAMS = tiny.random_params(CONFIG)
SETTLED = dict(warmup_steps=0, decay_fraction=0.0, clip_norm=0.0)


def rates(steps, count, **changes):
  rate = optim.schedule(OptimizerConfig(**changes), steps, 2.0)
  return [float(rate(step)) for step in count]


def test_wsd_rises_stays_and_falls():
  found = rates(100, [0, 5, 10, 50, 70, 85, 100], warmup_steps=10, decay_fraction=0.3, final_fraction=0.1)
  np.testing.assert_allclose(found, [0, 1, 2, 2, 2, 1.1, 0.2], rtol=1e-5)


def test_cosine_rises_and_falls_half_way_in_the_middle():
  found = rates(110, [0, 5, 10, 60, 110], schedule="cosine", warmup_steps=10, final_fraction=0.1)
  np.testing.assert_allclose(found, [0, 1, 2, 1.1, 0.2], rtol=1e-5)


def test_wsd_without_warm_up_or_decay_is_constant():
  assert rates(10, [0, 5, 10], **{k: SETTLED[k] for k in ("warmup_steps", "decay_fraction")}) == [2.0] * 3


@pytest.mark.parametrize("changes", [dict(warmup_steps=100), dict(warmup_steps=80, decay_fraction=0.3)], ids=str)
def test_a_schedule_longer_than_the_run_is_refused(changes):
  with pytest.raises(ConfigError, match="training.steps=100"):
    rates(100, [], **changes)


def moved(**changes):
  """Names of the parameters that an update without gradient moves: those that decay."""
  optimizer = optim.make_optimizer(OptimizerConfig(**{**SETTLED, "weight_decay": 0.5, **changes}), 10)
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(PARAMS), PARAMS))()
  return {
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(update)
  }


MATRICES = {f"layers.attention.{n}" for n in ("query", "key", "value", "out")} | {
  f"layers.mlp.{n}" for n in ("gate", "up", "down")
}


def test_weight_decay_moves_matrices_only():
  assert moved() == MATRICES | {"embedding.head"}
  assert moved(weight_decay=0.0) == set()


def test_muon_decays_its_matrices():
  assert moved(name="muon") - {"embedding.head"} == MATRICES


def test_muon_takes_the_matrices_inside_the_layers_as_reads_times_writes():
  views = {}

  def view(path, leaf, dims):
    if dims is None:
      return
    assert sorted((*dims.reduction_axis, *dims.output_axis)) == list(range(1, leaf.ndim)), "all but the layer axis"
    size = lambda axes: int(np.prod([leaf.shape[a] for a in axes]))
    views[path[-1].key] = (size(dims.reduction_axis), size(dims.output_axis))

  jax.tree_util.tree_map_with_path(view, PARAMS, optim.muon_dimensions(PARAMS))
  d, n, k, h, f = 16, 6, 2, 4, 24
  assert views == {
    "query": (d, n * h), "key": (d, k * h), "value": (d, k * h), "out": (n * h, d),
    "gate": (d, f), "up": (d, f), "down": (f, d),
  }  # fmt: skip


def as_matrix(name, leaf):
  """One layer's update as [reads, writes]."""
  return leaf.reshape(-1, leaf.shape[-1]) if name in ("out", "down") else leaf.reshape(leaf.shape[0], -1)


def test_muon_updates_are_nearly_orthogonal_matrices_of_each_layer():
  optimizer = optim.make_optimizer(OptimizerConfig(name="muon", **SETTLED), 10)
  grads = tiny.random_params(CONFIG, seed=1)
  updates, _ = jax.jit(lambda: optimizer.update(grads, optimizer.init(PARAMS), PARAMS))()

  def spread(leaf, name):
    values = np.linalg.svd(as_matrix(name, np.asarray(leaf[1])), compute_uv=False)
    return values.max() / values.min()

  for room, names in (("attention", ("query", "key", "value", "out")), ("mlp", ("gate", "up", "down"))):
    for name in names:
      # Five Newton-Schulz steps leave singular values between 0.7 and 1.2 unless they began near zero.
      assert spread(updates["layers"][room][name], name) < 2.0 < spread(grads["layers"][room][name], name), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_on_eight_devices_is_that_of_one(name):
  optimizer, mesh = optim.make_optimizer(OptimizerConfig(name=name, **SETTLED), 10), tiny.mesh(2, 2, 2)
  grads = tiny.random_params(CONFIG, seed=1)
  step = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
  expected = step(grads, PARAMS)
  with jax.set_mesh(mesh):
    where = states.shardings(Transformer(CONFIG), optimizer, mesh).params
    found = jax.jit(step, out_shardings=where)(jax.device_put(grads, where), jax.device_put(PARAMS, where))
  tiny.assert_trees_close(found, expected, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
  grads = {"w": jnp.array([3.0, 4.0]) * 1e3}
  for clip, same in ((1.0, False), (0.0, True)):
    settings = {**SETTLED, "clip_norm": clip, "weight_decay": 0.0, "eps": 1.0}
    optimizer = optim.make_optimizer(OptimizerConfig(**settings), 10)
    update = optimizer.update(grads, optimizer.init(grads), grads)[0]["w"]
    reference = optax.adamw(3e-3, b1=0.9, b2=0.95, eps=1.0, weight_decay=0.0)
    small = jax.tree.map(lambda g, c=clip: g / (5e3 if c else 1.0), grads)
    np.testing.assert_allclose(update, reference.update(small, reference.init(small), small)[0]["w"], rtol=1e-4)
    assert np.isclose(float(jnp.abs(update).max()), 3e-3, rtol=0.01) == same


def moments(state, name):
  """Dtypes of all first (`mu`) or second (`nu`) moments of an optimizer's state."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {leaf.dtype.name for path, leaf in leaves if getattr(path[-1], "name", "") == name or f".{name}[" in key(path)}


def key(path):
  return jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("mu_dtype", "found"), [("", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_first_moment_is_kept_in_the_asked_dtype_and_the_second_is_not(name, mu_dtype, found):
  optimizer = optim.make_optimizer(OptimizerConfig(name=name, **SETTLED, mu_dtype=mu_dtype), 10)
  state = jax.eval_shape(optimizer.init, PARAMS)
  updates, after = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
  for one in (state, after):
    assert moments(one, "mu") == {found}
    assert moments(one, "nu") == {"float32"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_with_a_rounded_first_moment_is_close_to_that_without(name):
  grads = [tiny.random_params(CONFIG, seed=seed) for seed in (1, 2)]

  def after(mu_dtype):
    optimizer = optim.make_optimizer(OptimizerConfig(name=name, **SETTLED, mu_dtype=mu_dtype), 10)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    for grad in grads:
      updates, state = update(grad, state, PARAMS)
    return updates

  exact, rounded = after(""), after("bfloat16")
  tiny.assert_trees_close(rounded, exact, rtol=0.03)
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded)))


def test_another_dtype_of_the_first_moment_is_refused():
  config = {"training": {"optimizer": {"mu_dtype": "float16"}}, "method": {"name": "dense"}}
  with pytest.raises(ConfigError, match="mu_dtype='float16' is not one of '', 'float32', 'bfloat16'"):
    methods.parse_config(config)


INSIDE = tiny.inside(CONFIG, PARAMS, subnets.prefix(CONFIG, 2, 1, 8))


def after_small_steps(name, inactive):
  """(parameters, optimizer state) after a step of the full model, and after three more of a small sub-model."""
  settings = {**SETTLED, "clip_norm": 1.0, "inactive": inactive}
  optimizer = optim.make_optimizer(OptimizerConfig(name=name, **settings), 10)
  full = tiny.random_params(CONFIG, seed=1)
  small = jax.tree.map(lambda g, keep: jnp.where(keep, g, 0), full, INSIDE)

  @jax.jit
  def step(grads, params, state):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  first = later = step(full, PARAMS, optimizer.init(PARAMS))
  for _ in range(3):
    later = step(small, *later)
  return first, later


def shares_moved(first, later):
  """For every parameter and moment with an undrawn part: shares of it that moved, (drawn, undrawn)."""
  drawn = {jax.tree_util.keystr(p): keep for p, keep in jax.tree_util.tree_leaves_with_path(INSIDE) if not keep.all()}
  found = {}
  for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(later)):
    name = jax.tree_util.keystr(path)
    for keep in (keep for suffix, keep in drawn.items() if name.endswith(suffix)):
      moved = np.asarray(before) != np.asarray(after)
      found[name] = (moved[keep].mean(), moved[~keep].mean())
  assert len(drawn) == len(jax.tree.leaves(PARAMS["layers"]))
  return found


@pytest.mark.parametrize(("name", "copies"), [("adamw", 3), ("muon", 2)])
def test_undrawn_parameters_and_moments_freeze_only_when_asked(name, copies):
  kept, frozen = (shares_moved(*after_small_steps(name, inactive)) for inactive in ("keep", "freeze"))
  assert len(kept) == len(frozen) >= copies * len(jax.tree.leaves(PARAMS["layers"])), "parameters and all moments"
  assert min(undrawn for _, undrawn in kept.values()) > 0.9
  assert min(drawn for drawn, _ in frozen.values()) > 0.9
  assert {undrawn for _, undrawn in frozen.values()} == {0.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_freezing_changes_nothing_where_every_gradient_counts(name):
  grads = tiny.random_params(CONFIG, seed=1)

  def run(inactive):
    optimizer = optim.make_optimizer(OptimizerConfig(name=name, inactive=inactive, **SETTLED), 10)
    return jax.jit(lambda: optimizer.update(grads, optimizer.init(PARAMS), PARAMS))()

  tiny.assert_trees_equal(run("freeze"), run("keep"))


def test_a_frozen_optimizer_has_its_moments_where_the_parameters_lie():
  mesh = tiny.mesh(2, 2, 2)
  make = lambda inactive: optim.make_optimizer(OptimizerConfig(name="muon", inactive=inactive, **SETTLED), 10)
  keep, freeze = (states.abstract(Transformer(CONFIG), make(inactive), mesh) for inactive in ("keep", "freeze"))
  assert jax.tree.map(lambda x: x.sharding, keep) == jax.tree.map(lambda x: x.sharding, freeze)

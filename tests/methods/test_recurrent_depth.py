"""Recurrent depth: passes against token-by-token NumPy, the truncated gradient, and what is drawn."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer as plain
import pytest
import slow_passes
import tiny
from scipy import special

from adaptive import losses
from adaptive.backbone.transformer import Block, Transformer
from adaptive.config import ConfigError
from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS
from adaptive.methods.depth import recurrent_depth

METHOD = METHODS["recurrent_depth"]
PASSES, PRELUDE, CORE = 4, 1, 2
CONFIG = tiny.model_config(num_layers=PRELUDE + PASSES * CORE, qk_norm=True)
THRESHOLDS = {"stability": 0.75, "saturation": 0.3, "cosine": 0.5}


@functools.cache
def built(signal="stability", kv="project", **settings):
  """Model, parameters, and the forward pass of a sub-model by its name."""
  how = Exiting(signal=signal, thresholds=(THRESHOLDS.get(signal, 0.5), 1.0), kv=kv)
  config = METHOD.Config(prelude=PRELUDE, core=CORE, num_recursions=PASSES, exit=how, **settings)
  model = METHOD.build(CONFIG, config)
  params = tiny.random_params(model)
  names = [submodel.name for submodel in METHOD.submodels(model)]
  run = jax.jit(lambda index, batch: METHOD.forward(model, params, batch, index))
  return model, params, lambda name, batch: run(np.int32(names.index(name)), batch)


def enter(params, s, e):
  """What a pass begins with: RMSNorm([RMSNorm(e), s] W), in NumPy."""
  normed = plain._rms(e, params["prelude_norm"]["scale"], CONFIG.norm_eps)
  mixed = np.concatenate([normed, s]) @ params["adapter"]["matrix"]
  return plain._rms(mixed, params["core_norm"]["scale"], CONFIG.norm_eps)


def sure(signal, s, before, logits, logits_before):
  """How sure a signal is, by its definition."""
  match signal:
    case "stability":
      if logits_before is None:
        return 0.0
      return math.exp(-special.rel_entr(*map(special.softmax, (logits_before, logits))).sum())
    case "saturation":
      return 1 - np.linalg.norm(s - before) / np.linalg.norm(s)
    case "cosine":
      return s @ before / (np.linalg.norm(s) * np.linalg.norm(before))


def slow(model, params, batch, kv, signal, threshold, passes=PASSES):
  """Logits and passes, token by token."""
  doubles = plain._as_float64(params)
  drawn = np.asarray(recurrent_depth.first_state(model.method.state_std, CONFIG.d_model, jnp.arange(64)[None])[0])

  def decide(number, s, before, logits, logits_before, memory):
    return sure(signal, s, before, logits, logits_before) > threshold, None

  return slow_passes.run(
    CONFIG,
    params,
    batch,
    slow_passes.Model(
      PRELUDE,
      CORE,
      passes,
      kv,
      decide=decide,
      start=lambda e, position: drawn[position].astype(np.float64),
      enter=lambda s, e: enter(doubles, s, e),
    ),
  )


@pytest.mark.parametrize(
  ("signal", "kv"), [*((signal, "project") for signal in THRESHOLDS), ("stability", "latest"), ("cosine", "copy")]
)
def test_tokens_stop_where_the_slow_way_lets_them(signal, kv):
  model, params, run = built(signal, kv)
  batch = tiny.packed_batch(CONFIG, length=8)
  found = run(f"threshold={THRESHOLDS[signal]}", batch)
  want, passes = slow(model, params, batch, kv, signal, THRESHOLDS[signal])
  real = np.asarray(batch["segment_ids"]) > 0
  assert len(set(passes[real])) >= 3
  np.testing.assert_allclose(np.asarray(found.logits)[real], want[real], rtol=3e-5, atol=3e-5)
  assert float(found.aux["layers"][0]) == (PRELUDE + CORE * passes[real]).sum()


def test_fixed_passes_are_the_slow_ones_and_a_threshold_that_none_meets_is_all_of_them():
  model, params, run = built()
  batch = tiny.packed_batch(CONFIG, length=8)
  real = np.asarray(batch["segment_ids"]) > 0
  for passes in (1, 4):
    want, _ = slow(model, params, batch, "project", "stability", np.inf, passes)
    found = run(f"recursions={passes}", batch).logits
    np.testing.assert_allclose(np.asarray(found)[real], want[real], rtol=3e-5, atol=3e-5)
  np.testing.assert_array_equal(found, run("threshold=1.0", batch).logits)


def test_fewer_passes_are_cut_out_of_the_program():
  model, params, run = built()
  batch = tiny.packed_batch(CONFIG, length=8)
  cut = lambda index: lambda params: METHOD.forward(model, params, batch, index).logits
  np.testing.assert_allclose(jax.jit(cut(1))(params), run("recursions=2", batch).logits, rtol=1e-5, atol=1e-5)
  layers = lambda index: str(jax.make_jaxpr(cut(index))(params)).count("scan[")  # one for the prelude and each pass
  assert [layers(index) for index in (0, 1, 2, 5)] == [2, 3, 4, 5]


@pytest.mark.parametrize("kv", ["project", "latest"])
def test_a_later_token_changes_nothing_before_and_a_row_nothing_beside(kv):
  _, _, run = built("stability", kv)
  batch = tiny.one_document(CONFIG, rows=3)
  changed = {**batch, "inputs": batch["inputs"].at[:, 5:].add(1) % CONFIG.vocab_size}
  a, b = run("threshold=0.75", batch), run("threshold=0.75", changed)
  np.testing.assert_array_equal(a.logits[:, :5], b.logits[:, :5])
  assert not np.allclose(a.logits[:, 5:], b.logits[:, 5:])
  assert PRELUDE + CORE < float(a.aux["layers"][0] / a.aux["layers"][1]) < CONFIG.num_layers
  alone = jax.tree.map(lambda x: jnp.concatenate([x[1:2], x[1:2] * 0 + 1, x[1:2]]), batch)
  np.testing.assert_allclose(run("threshold=0.75", alone).logits[0], a.logits[1], rtol=1e-5, atol=1e-5)


def by_hand(model, params, cores, batch, stopped):
  """Loss of passes that have parameters of their own each; the state is cut off after the first `stopped`."""
  eps, backbone = CONFIG.norm_eps, Transformer(CONFIG)
  x, context = backbone.apply({"params": params}, batch, method="embed")
  layer = lambda x, weights: Block(CONFIG).apply({"params": weights}, x, context)[0]
  norm = lambda x, scale: x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale[None, None]
  take = lambda i: jax.tree.map(lambda leaf: leaf[i], params["layers"])
  for i in range(PRELUDE):
    x = layer(x, take(i))
  s = recurrent_depth.first_state(model.method.state_std, CONFIG.d_model, batch["positions"])
  for number, core in enumerate(cores):
    mixed = jnp.concatenate([norm(x, core["prelude_norm"]["scale"]), s], -1) @ core["adapter"]["matrix"]
    s = norm(mixed, core["core_norm"]["scale"])
    for i in range(PRELUDE, PRELUDE + CORE):
      s = layer(s, jax.tree.map(lambda leaf, i=i: leaf[i], core["layers"]))
    s = jax.lax.stop_gradient(s) if number + 1 == stopped else s
  logits = backbone.apply({"params": params}, s, method="head")
  return losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0))


CORE_PARTS = ("adapter", "core_norm", "prelude_norm", "layers")


@functools.cache
def gradients(backprop, passes):
  """Of the method's loss, and of passes by hand: by everything else, and by each pass's own copy of the core."""
  model, params, _ = built(backprop=backprop)
  batch = tiny.packed_batch(CONFIG, length=8)
  choice = ([submodel.name for submodel in METHOD.submodels(model)].index(f"recursions={passes}"),)
  loss = lambda params: METHOD.loss(model, params, batch, choice, jax.random.key(0), jnp.int32(0))[0]
  copies = [{name: params[name] for name in CORE_PARTS}] * passes
  stopped = max(passes - backprop, 0)
  hand = jax.value_and_grad(lambda params, cores: by_hand(model, params, cores, batch, stopped), argnums=(0, 1))
  return jax.jit(jax.value_and_grad(loss))(params), jax.jit(hand)(params, copies)


@pytest.mark.slow
@pytest.mark.parametrize(("backprop", "passes"), [(1, 3), (2, 3), (8, 2)])
def test_the_gradient_goes_through_the_last_passes_only(backprop, passes):
  (value, found), (want_value, (rest, cores)) = gradients(backprop, passes)
  assert float(value) == pytest.approx(float(want_value), rel=1e-5)
  total = jax.tree.map(lambda *leaves: sum(leaves), {name: rest[name] for name in CORE_PARTS}, *cores)
  tiny.assert_trees_close(found, {**rest, **total}, rtol=1e-4, atol=1e-6)
  first, last = cores[: max(passes - backprop, 0)], cores[max(passes - backprop, 0) :]
  assert len(last) == min(backprop, passes)
  assert all(not leaf.any() for leaf in jax.tree.leaves(first)), "exactly zero"
  assert all(leaf.any() for core in last for leaf in jax.tree.leaves(core["adapter"]))
  # The prelude learns through e, which the last passes read too.
  assert all(leaf[0].any() for leaf in jax.tree.leaves(found["layers"]))


def test_the_adapter_s_part_that_reads_the_state_learns_nothing_from_a_state_of_zeros():
  model, params, _ = built(state_std=0.0)
  batch = tiny.packed_batch(CONFIG, length=8)
  loss = lambda params: METHOD.loss(model, params, batch, (0,), jax.random.key(0), jnp.int32(0))[0]
  matrix = jax.jit(jax.grad(loss))(params)["adapter"]["matrix"]
  assert not matrix[CONFIG.d_model :].any()
  assert matrix[: CONFIG.d_model].all()


@pytest.mark.parametrize(("mean", "sigma"), [(32.0, 0.5), (4.0, 0.5), (6.0, 0.0)])
def test_passes_are_drawn_from_the_paper_s_distribution(mean, sigma):
  """Mean, median and mode against draws of the formula; 33, 29 and 24 for the paper's 32."""
  config, generator = METHOD.Config(mean_recursions=mean, sigma=sigma), np.random.default_rng(0)
  found = np.array([recurrent_depth.draw_recursions(config, generator) for _ in range(40_000)])
  other = np.random.default_rng(1)
  want = 1 + other.poisson(np.exp(other.normal(np.log(mean) - sigma**2 / 2, sigma, 400_000)))
  assert found.min() >= 1
  assert found.mean() == pytest.approx(mean + 1, rel=0.01)
  assert abs(np.median(found) - np.median(want)) <= 1
  assert found.std() == pytest.approx(want.std(), rel=0.03)
  if mean == 32:
    assert abs(np.median(found) - 29) <= 1
    smooth = np.convolve(np.bincount(found), np.ones(5), "same")
    assert abs(int(smooth.argmax()) - 24) <= 3


def test_a_step_s_passes_are_a_function_of_seed_and_step_and_bounded():
  model, *_ = built(mean_recursions=2.0)
  names = [submodel.name for submodel in METHOD.submodels(model)]
  drawn = [METHOD.sample(model, 0, step) for step in range(300)]
  assert drawn == [METHOD.sample(model, 0, step) for step in range(300)]
  assert drawn != [METHOD.sample(model, 1, step) for step in range(300)]
  assert {names[index] for (index,) in drawn} == {f"recursions={r}" for r in (1, 2, 3, 4)}
  assert METHOD.static_choice(model)


def test_the_first_state_is_one_of_a_position():
  positions = jnp.array([[0, 1, 2, 0], [2, 2, 5, 40_000]])
  found = np.asarray(recurrent_depth.first_state(0.5, 512, positions))
  np.testing.assert_array_equal(found[0, 2], found[1, 1])
  np.testing.assert_array_equal(found[0, 0], found[0, 3])
  np.testing.assert_array_equal(recurrent_depth.first_state(0.5, 512, positions[:, 2:]), found[:, 2:])
  assert len({row.tobytes() for row in found.reshape(-1, 512)}) == 5
  many = np.asarray(recurrent_depth.first_state(0.5, 512, jnp.arange(100)[None]))
  assert many.std() == pytest.approx(0.5 * 0.9866, rel=0.01)  # of a normal cut off at three deviations
  assert 1.4 < np.abs(many).max() <= 1.5
  assert abs(np.corrcoef(many[0])[0, 1:]).max() < 0.25
  assert not np.asarray(recurrent_depth.first_state(0.0, 512, positions)).any()


def test_no_number_of_passes_lets_the_state_grow():
  """Whatever the state is, a pass begins with a vector of size sqrt(d), up to the norm's scale."""
  model, params, _ = built()
  state = 1e4 * jax.random.normal(jax.random.key(0), (1, 3, CONFIG.d_model))
  begun = model.exits.loop.enter(params, state, 1e-2 * state)
  np.testing.assert_allclose(
    np.linalg.norm(np.asarray(begun) / np.asarray(params["core_norm"]["scale"]), axis=-1), 4.0, rtol=1e-3
  )


def test_what_is_trained_does_not_depend_on_how_the_model_leaves():
  model, params, _ = built()
  batch, found = tiny.packed_batch(CONFIG, length=8), []
  for how in (model.method.exit, Exiting(signal="cosine", thresholds=(0.1, 0.2), kv="latest")):
    other = model.clone(method=dataclasses.replace(model.method, exit=how))
    assert METHOD.sample(other, 0, 0) == METHOD.sample(model, 0, 0)
    loss = jax.jit(lambda p, m=other: METHOD.loss(m, p, batch, (1,), jax.random.key(0), jnp.int32(0))[0])
    found.append(float(loss(params)))
  assert found[0] == found[1]


def test_costs_count_adapters_and_heads_and_an_update_goes_back_through_the_last_passes():
  model, _, run = built(backprop=2)
  realised = run("threshold=0.75", tiny.one_document(CONFIG)).aux
  by_name = {submodel.name: (i, submodel) for i, submodel in enumerate(METHOD.submodels(model))}
  cost = lambda name, aux: METHOD.cost(model, by_name[name][1], 8, aux).flops_per_token
  width = CONFIG.d_model
  head, keys, adapter = 2 * CONFIG.vocab_size * width, 4 * width * CONFIG.num_kv_heads * CONFIG.head_size, 4 * width**2
  layer = (cost("recursions=4", {}) - head - 4 * adapter) / 9
  matrices = 2 * (2 * width * 24 + 2 * width * 8 + 3 * width * 24)
  assert layer == matrices + 4 * 4.5 * 24
  assert cost("recursions=1", {}) == pytest.approx(3 * layer + adapter + head)
  shares = [float(realised[f"ran/{d}"][0] / realised[f"ran/{d}"][1]) for d in (3, 5, 7, 9)]
  ran = PRELUDE + CORE * sum(shares)
  want = ran * layer + (9 - ran) * keys + 4 * adapter + sum(shares) * head
  assert cost("threshold=0.75", realised) == pytest.approx(want)
  found = METHOD.update_flops(model, (by_name["recursions=4"][0],), 8)
  there, back = 9 * layer + 4 * adapter + head, 5 * layer + 2 * adapter + head
  assert found == pytest.approx(there + 2 * back)


def test_it_begins_with_the_layers_of_a_dense_model():
  model, params, _ = built()
  source = tiny.random_params(CONFIG, seed=1)
  begun = METHOD.init_from(model, params, source, "lower", 0)
  first = jax.tree.map(lambda leaf: leaf[:3], source["layers"])
  own = {name: params[name] for name in ("adapter", "prelude_norm", "core_norm")}
  tiny.assert_trees_equal(begun, {**source, **own, "layers": first})


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_recursions=3), r"model.num_layers=9 is not .* = 1 \+ 2 \* 3; nearest: 7"),
    (dict(core=0), "method.core=0 must be at least 1"),
    (dict(backprop=0), "method.backprop=0"),
    (dict(prelude=-1), "method.prelude=-1"),
    (dict(mean_recursions=0.0), "method.mean_recursions=0.0 must be more than 0"),
    (dict(state_std=-0.5), "method.state_std"),
    (dict(exit=Exiting(kv="exact")), "method.exit.kv='exact' cannot"),
    (dict(exit=Exiting(kv="recompute")), "method.exit.kv='recompute' cannot"),
    (dict(exit=Exiting(depths=(3,))), r"method.exit.depths=\(3,\)"),
    (dict(exit=Exiting(signal="learned")), "method.exit.signal='learned'"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    METHOD.build(CONFIG, METHOD.Config(**{"prelude": 1, "core": 2, "num_recursions": 4, **settings}))

"""Pondering: both ways to halt against token-by-token NumPy, their losses by hand, and what their gradients say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_passes
import tiny
from scipy import special, stats

from adaptive import losses
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ConfigError
from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS
from adaptive.methods.depth import ponder

METHOD = METHODS["ponder"]
PASSES, PRELUDE, BLOCK = 4, 1, 2
CONFIG = tiny.model_config(num_layers=PRELUDE + PASSES * BLOCK, qk_norm=True)
KINDS = ("pondernet", "act")
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def built(kind="pondernet", kv="project"):
  """Model, parameters under which tokens halt in all passes, and the forward pass of a sub-model by its name."""
  how = Exiting(signal="learned", thresholds=(0.7, 1.0, -1.0), kv=kv)
  model = METHOD.build(CONFIG, METHOD.Config(halting=kind, num_recursions=PASSES, prelude=PRELUDE, exit=how))
  params = tiny.random_params(model)
  params["halting"] = {"weight": -0.4 * params["halting"]["weight"], "bias": jnp.full(1, -2.0)}
  names = [submodel.name for submodel in METHOD.submodels(model)]
  run = jax.jit(lambda index, batch: METHOD.forward(model, params, batch, index))
  return model, params, lambda name, batch: run(np.int32(names.index(name)), batch)


def halts(params, s):
  """Probability of halting in a pass that ends with the state s, in NumPy."""
  unit = params["halting"]
  return special.expit(s @ np.asarray(unit["weight"], np.float64) + float(unit["bias"][0]))


def slow(kind, params, batch, kv, threshold):
  """Logits and passes, token by token."""

  def decide(number, s, before, logits, logits_before, memory):
    p = halts(params, s)
    value = memory + (1 - memory) * p if kind == "pondernet" else min(memory + p, 1.0)
    return value > threshold, value

  def weigh(states, sums):
    if kind == "pondernet":
      return states[-1]
    before = [0.0, *sums]
    weights = [after - earlier for earlier, after in zip(before, sums[:-1])] + [1 - before[len(sums) - 1]]
    assert sum(weights) == pytest.approx(1)
    return sum(weight * state for weight, state in zip(weights, states))

  return slow_passes.run(
    CONFIG, params, batch, slow_passes.Model(PRELUDE, BLOCK, PASSES, kv, decide=decide, weigh=weigh)
  )


def states_of(params, batch):
  """Every token's state after each pass when none halts, [r, b, t, d], in NumPy."""
  found = []

  def decide(number, s, *rest):
    found.append(s)
    return False, 0.0

  slow_passes.run(CONFIG, params, batch, slow_passes.Model(PRELUDE, BLOCK, PASSES, "project", decide=decide))
  return np.moveaxis(np.array(found).reshape(*batch["inputs"].shape, PASSES, -1), 2, 0)


@pytest.mark.parametrize("kv", ["project", "copy", "latest"])
@every_kind
def test_tokens_halt_where_the_slow_way_lets_them(kind, kv):
  _, params, run = built(kind, kv)
  batch = tiny.packed_batch(CONFIG, length=8)
  found = run("threshold=0.7", batch)
  want, passes = slow(kind, params, batch, kv, 0.7)
  real = np.asarray(batch["segment_ids"]) > 0
  assert set(passes[real]) == {1, 2, 3, 4}
  np.testing.assert_allclose(np.asarray(found.logits)[real], want[real], rtol=3e-5, atol=3e-5)
  assert float(found.aux["layers"][0]) == (PRELUDE + BLOCK * passes[real]).sum()


@every_kind
def test_all_passes_are_the_slow_ones_and_fewer_are_cut_out(kind):
  model, params, run = built(kind)
  batch = tiny.packed_batch(CONFIG, length=8)
  real = np.asarray(batch["segment_ids"]) > 0
  want, _ = slow(kind, params, batch, "project", np.inf)
  np.testing.assert_allclose(np.asarray(run("recursions=4", batch).logits)[real], want[real], rtol=3e-5, atol=3e-5)
  fewer = run("recursions=2", batch).logits
  assert np.abs(want - np.asarray(fewer))[real].max() > 0.1
  cut = jax.jit(lambda params: METHOD.forward(model, params, batch, 1).logits)
  np.testing.assert_allclose(cut(params), fewer, rtol=1e-5, atol=1e-5)
  assert products(cut, params) < 0.6 * products(lambda params: METHOD.forward(model, params, batch, 5).logits, params)


def products(function, params):
  """Matrix products in a program's text."""
  return str(jax.make_jaxpr(function)(params)).count("dot_general")


def test_the_full_pondernet_is_the_plain_unrolled_model():
  model, params, run = built()
  batch = tiny.packed_batch(CONFIG, length=8)
  path = (0, *(1, 2) * PASSES)
  plain = {name: params[name] for name in ("embedding", "final_norm")}
  plain["layers"] = jax.tree.map(lambda leaf: leaf[np.array(path)], params["layers"])
  want = jax.jit(Transformer(CONFIG).apply)({"params": plain}, batch)
  np.testing.assert_allclose(run("recursions=4", batch).logits, want, rtol=1e-5, atol=1e-5)
  config, small = METHOD.extract(model, params, METHOD.submodels(model)[1])
  assert config.num_layers == PRELUDE + 2 * BLOCK
  fewer = jax.jit(Transformer(config).apply)({"params": small}, batch)
  np.testing.assert_allclose(run("recursions=2", batch).logits, fewer, rtol=1e-5, atol=1e-5)


@every_kind
def test_a_threshold_of_one_halts_nobody_and_one_below_zero_all(kind):
  _, _, run = built(kind)
  batch = tiny.packed_batch(CONFIG, length=8)
  for threshold, same in ((1.0, "recursions=4"), (-1.0, "recursions=1")):
    found, want = run(f"threshold={threshold}", batch), run(same, batch)
    np.testing.assert_array_equal(found.logits, want.logits)


def test_after_one_pass_acts_mean_is_that_pass():
  (_, _, mean), (_, _, plain) = built("act"), built("pondernet")
  batch = tiny.packed_batch(CONFIG, length=8)
  found, want = mean("recursions=1", batch).logits, plain("recursions=1", batch).logits
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("kv", ["project", "latest", "exact"])
def test_a_later_token_changes_nothing_before_and_a_row_nothing_beside(kind, kv):
  _, _, run = built(kind, kv)
  batch = tiny.one_document(CONFIG, rows=3)
  changed = {**batch, "inputs": batch["inputs"].at[:, 5:].add(1) % CONFIG.vocab_size}
  a, b = run("threshold=0.7", batch), run("threshold=0.7", changed)
  np.testing.assert_array_equal(a.logits[:, :5], b.logits[:, :5])
  assert not np.allclose(a.logits[:, 5:], b.logits[:, 5:])
  assert PRELUDE + BLOCK < float(a.aux["layers"][0] / a.aux["layers"][1]) < CONFIG.num_layers
  alone = jax.tree.map(lambda x: jnp.concatenate([x[1:2], x[1:2] * 0 + 1, x[1:2]]), batch)
  np.testing.assert_allclose(run("threshold=0.7", alone).logits[0], a.logits[1], rtol=1e-5, atol=1e-5)


def test_the_distribution_adds_up_to_one_and_is_the_product_formula():
  logits = np.random.default_rng(0).normal(size=(3, 2, 5)) * 4
  found = np.exp(ponder.log_distribution(jnp.asarray(logits)))
  assert found.shape == (4, 2, 5)
  np.testing.assert_allclose(found.sum(0), 1, rtol=1e-6)
  left = np.ones((2, 5))
  for n in range(3):
    p = special.expit(logits[n])
    np.testing.assert_allclose(found[n], left * p, rtol=2e-5, atol=1e-7)
    left = left * (1 - p)
  np.testing.assert_allclose(found[3], left, rtol=2e-5, atol=1e-7)


def test_the_divergence_is_zero_where_halting_is_the_prior_s():
  prior = lambda value: ponder.divergence(ponder.log_distribution(jnp.full((3, 2, 2), ponder.logit(value))), 0.3)
  np.testing.assert_allclose(prior(0.3), 0, atol=1e-7)
  assert np.all(prior(0.29) > 0)
  assert np.all(prior(0.31) > 0)


def test_the_divergence_is_from_the_geometric_distribution_with_its_tail_on_the_last_pass():
  logs = ponder.log_distribution(jnp.asarray(np.random.default_rng(1).normal(size=(3, 7)) * 2))
  q = stats.geom(0.3).pmf([1, 2, 3])
  q = np.append(q, stats.geom(0.3).sf(3))
  want = special.rel_entr(np.exp(np.asarray(logs, np.float64)), q[:, None]).sum(0)
  np.testing.assert_allclose(ponder.divergence(logs, 0.3), want, rtol=1e-5)


def mean_of(values, batch):
  return values[np.asarray(batch["segment_ids"]) > 0].mean()


def token_losses(logits, batch):
  logs = special.log_softmax(logits, axis=-1)
  return -np.take_along_axis(logs, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]


def loss_of(model, batch, **settings):
  """The loss as a function of the parameters, and its metrics."""
  model = model.clone(method=dataclasses.replace(model.method, **settings))
  return jax.jit(lambda p: METHOD.loss(model, p, batch, METHOD.sample(model, 0, 0), jax.random.key(0), jnp.int32(0)))


def test_pondernet_s_loss_is_expected_under_the_distribution():
  model, params, run = built()
  batch = tiny.packed_batch(CONFIG, length=8)
  p, left = [], 1.0
  for s in states_of(params, batch)[:-1]:
    here = halts(params, s)
    p.append(left * here)
    left = left * (1 - here)
  p = np.stack([*p, left])
  each = [token_losses(np.asarray(run(f"recursions={n}", batch).logits, np.float64), batch) for n in range(1, 5)]
  prior = np.append(stats.geom(0.4).pmf([1, 2, 3]), stats.geom(0.4).sf(3))
  task, divergence = (p * each).sum(0), special.rel_entr(p, prior[:, None, None]).sum(0)
  found, metrics = loss_of(model, batch, kl_weight=0.5)(params)
  assert float(losses.mean(metrics["loss"])) == pytest.approx(mean_of(task, batch), rel=1e-5)
  assert float(losses.mean(metrics["divergence"])) == pytest.approx(mean_of(divergence, batch), rel=1e-4)
  passes = (p * np.arange(1, 5)[:, None, None]).sum(0)
  assert float(losses.mean(metrics["passes"])) == pytest.approx(mean_of(passes, batch), rel=1e-5)
  assert float(found) == pytest.approx(mean_of(task + 0.5 * divergence, batch), rel=1e-5)


def test_act_s_loss_is_that_of_the_mean_where_it_halts_and_the_ponder_cost():
  """N and R by brute force: sums of probabilities until one is above 1 - epsilon."""
  model, params, _ = built("act")
  batch = tiny.packed_batch(CONFIG, length=8)
  logits, passes = slow("act", params, batch, "project", 0.7)
  found, metrics = loss_of(model, batch, epsilon=0.3, ponder_cost=0.5)(params)
  task = mean_of(token_losses(logits, batch), batch)
  assert float(losses.mean(metrics["loss"])) == pytest.approx(task, rel=1e-5)
  assert float(losses.mean(metrics["passes"])) == pytest.approx(mean_of(passes, batch))
  remainder = mean_of(remainders(params, batch, 0.7)[0], batch)
  assert float(losses.mean(metrics["ponder"])) == pytest.approx(mean_of(passes, batch) + remainder, rel=1e-5)
  assert float(found) == pytest.approx(task + 0.5 * (mean_of(passes, batch) + remainder), rel=1e-5)


def remainders(params, batch, threshold):
  """R of each token, and the derivative of it by the halting unit's bias, [b, t] each, halting by ACT."""
  rest, slope = [], []

  def decide(number, s, before, logits, logits_before, memory):
    p = halts(params, s)
    if number == 1:
      rest.append(1.0)
      slope.append(0.0)
    stops = memory + p > threshold
    if not stops and number < PASSES:
      rest[-1] -= p
      slope[-1] -= p * (1 - p)
    return stops, memory + p

  slow_passes.run(CONFIG, params, batch, slow_passes.Model(PRELUDE, BLOCK, PASSES, "project", decide=decide))
  return tuple(np.array(values).reshape(batch["inputs"].shape) for values in (rest, slope))


def test_the_ponder_cost_asks_for_larger_probabilities():
  """Its gradient goes through the remainder alone: - sum_{n < N} p_n (1 - p_n) by the bias."""
  model, params, _ = built("act")
  batch = tiny.packed_batch(CONFIG, length=8)
  slope = slope_of("ponder", loss_of(model, batch, epsilon=0.3), params, -2.0)
  assert slope < 0
  assert slope == pytest.approx(mean_of(remainders(params, batch, 0.7)[1], batch), rel=1e-3)


def test_a_likelier_halt_pulls_pondernet_down_to_the_prior():
  """Far above the prior the divergence asks for smaller probabilities, far below it for larger ones."""
  model, params, _ = built()
  batch = tiny.packed_batch(CONFIG, length=7)
  loss = loss_of(model, batch)
  assert slope_of("divergence", loss, params, 3.0) > 0.01
  assert slope_of("divergence", loss, params, -6.0) < -0.01


def slope_of(name, loss, params, bias):
  """The derivative of a metric by the halting unit's bias."""

  def metric(bias):
    halting = {**params["halting"], "bias": bias}
    return losses.mean(loss({**params, "halting": halting})[1][name])

  return float(jax.grad(metric)(jnp.full(1, bias))[0])


@every_kind
def test_every_parameter_has_a_gradient(kind):
  config = tiny.model_config(num_layers=3)
  model = METHOD.build(config, METHOD.Config(halting=kind, num_recursions=2, prelude=1))
  params, batch = tiny.random_params(model), tiny.packed_batch(config, length=7)
  params["halting"]["bias"] = jnp.full(1, -2.0)
  grads = jax.grad(lambda p: loss_of(model, batch)(p)[0])(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    per_layer = leaf if path[0].key == "layers" else leaf[None]
    assert all(float(jnp.abs(layer).max()) > 0 for layer in per_layer), path


@every_kind
def test_what_is_trained_does_not_depend_on_how_the_model_leaves(kind):
  model, params, _ = built(kind)
  other = dataclasses.replace(model.method.exit, kv="latest", thresholds=(0.2,))
  batch = tiny.packed_batch(CONFIG, length=8)
  found = [loss_of(model, batch, exit=how)(params)[0] for how in (model.method.exit, other)]
  assert float(found[0]) == float(found[1])


def test_an_untrained_unit_halts_rarely():
  model = METHOD.build(CONFIG, METHOD.Config(prelude=1, initial_halting=0.05))
  params = jax.jit(lambda key: ponder.nn.unbox(init_params(model, key)))(jax.random.key(0))
  found = jax.nn.sigmoid(ponder.halting_logits(params, jnp.ones((1, 1, CONFIG.d_model))))
  assert float(found[0, 0]) == pytest.approx(0.05, abs=0.01)
  assert {leaf.dtype for leaf in jax.tree.leaves(params["halting"])} == {jnp.dtype("float32")}


def test_the_halting_unit_stays_in_float32_where_the_rest_is_cast():
  config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
  model = METHOD.build(config, METHOD.Config(num_recursions=PASSES, prelude=PRELUDE))
  params = tiny.random_params(model)
  submodel = next(submodel for submodel in METHOD.submodels(model) if "threshold" in submodel.name)
  decoder = METHOD.decoder(model, params, submodel)
  assert {leaf.dtype for leaf in jax.tree.leaves(decoder.params["halting"])} == {jnp.dtype("float32")}
  assert {leaf.dtype for leaf in jax.tree.leaves(decoder.params["layers"])} == {jnp.dtype("bfloat16")}


def test_costs_count_the_passes_that_were_made_and_the_units_that_were_asked():
  model, _, run = built()
  realised = run("threshold=0.7", tiny.one_document(CONFIG)).aux
  by_name = {submodel.name: submodel for submodel in METHOD.submodels(model)}
  cost = lambda name, aux: METHOD.cost(model, by_name[name], 8, aux).flops_per_token
  head, keys = 2 * CONFIG.vocab_size * CONFIG.d_model, 4 * CONFIG.d_model * CONFIG.num_kv_heads * CONFIG.head_size
  layer = (cost("recursions=4", {}) - head) / CONFIG.num_layers
  shares = [float(realised[f"ran/{d}"][0] / realised[f"ran/{d}"][1]) for d in (3, 5, 7, 9)]
  ran = PRELUDE + BLOCK * sum(shares)
  want = ran * layer + (9 - ran) * keys + head + 2 * CONFIG.d_model * sum(shares[:3])
  assert cost("threshold=0.7", realised) == pytest.approx(want)
  assert cost("recursions=2", {}) == pytest.approx(5 * layer + head)
  act, *_ = built("act")
  mean = METHOD.cost(act, by_name["recursions=2"], 8, {}).flops_per_token
  assert mean == pytest.approx(5 * layer + head + 2 * CONFIG.d_model)


def test_fewer_passes_run_no_more_where_keys_are_the_full_model_s():
  """Two of four: the decoder under `exact` runs what the dial says and the cost counts."""
  model, params, _ = built("act", "exact")
  submodel = next(s for s in METHOD.submodels(model) if s.name == "recursions=2")
  tokens = np.asarray(tiny.one_document(CONFIG, rows=1, length=9)["inputs"])
  decoder, layers = METHOD.decoder(model, params, submodel), 0.0
  cache, step = decoder.empty_cache(1, 16), jax.jit(decoder.step)
  for i in range(9):
    _, cache, metrics = step(decoder.params, tokens[:, i : i + 1], jnp.ones(1, jnp.int32), cache)
    layers += float(metrics["layers"][0])
  assert layers == 9 * (PRELUDE + 2 * BLOCK)


def test_it_begins_with_the_layers_of_a_dense_model():
  model, params, _ = built()
  source = tiny.random_params(CONFIG, seed=1)
  begun = METHOD.init_from(model, params, source, "lower", 0)
  first = jax.tree.map(lambda leaf: leaf[:3], source["layers"])
  tiny.assert_trees_equal(begun, {**source, "halting": params["halting"], "layers": first})


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_recursions=1), "method.num_recursions=1 must be at least 2"),
    (dict(num_recursions=3, prelude=1), r"model.num_layers=9 is not method.prelude=1 \+ 3 x J .* nearest: 7 and 10"),
    (dict(num_recursions=2, prelude=9), r"nearest: 11"),
    (dict(prior=1.0), "method.prior=1.0 must lie between 0 and 1"),
    (dict(epsilon=0.0), "method.epsilon=0.0"),
    (dict(initial_halting=1.5), "method.initial_halting"),
    (dict(kl_weight=-1.0), "method.kl_weight"),
    (dict(halting="act", exit=Exiting()), "method.exit.signal='max_probability'"),
    (dict(halting="act", exit=Exiting(signal="learned", depths=(3,))), r"method.exit.depths=\(3,\)"),
    (dict(prelude=1, exit=Exiting(signal="learned", depths=(3,))), r"method.exit.depths=\(3,\): .* adds up over every"),
    (dict(prelude=1, exit=Exiting(depths=(4,))), r"no exit was trained at \[4\]"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    METHOD.build(CONFIG, METHOD.Config(**{"num_recursions": 4, **settings}))

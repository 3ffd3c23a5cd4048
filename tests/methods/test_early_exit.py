"""Early exit: what is trained, with which weights, and how it leaves as a dense model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_exits
import tiny
from scipy import special

from adaptive import losses
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.depth import exits, signals
from adaptive.methods import METHODS
from adaptive.methods.depth import early_exit

CONFIG, METHOD = tiny.model_config(), METHODS["early_exit"]


def built(**settings):
  model = METHOD.build(CONFIG, METHOD.Config(**{"exits": (1, 3), **settings}))
  return model, tiny.random_params(model), tiny.packed_batch(CONFIG)


def loss_of(model, params, batch, step=100):
  choice, key = METHOD.sample(model, 0, 0), jax.random.key(0)
  return jax.jit(lambda p: METHOD.loss(model, p, batch, choice, key, jnp.int32(step)))(params)


@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize(
  ("settings", "weights"),
  [
    (dict(weights="equal"), (1, 1, 1)),
    (dict(weights="linear"), (1, 3, 4)),
    (dict(weights="exponential"), (1, 4, 8)),
    (dict(listed_weights=(0.25, 0.5, 1.0)), (0.25, 0.5, 1.0)),
    (dict(listed_weights=(0.5, 0.5, 1.0), warmup_steps=200), (0.25, 0.25, 1.0)),
  ],
)
def test_the_loss_is_the_weighted_mean_over_the_extracted_exits(heads, settings, weights):
  model, params, batch = built(heads=heads, **settings)
  each = []
  for submodel in [s for s in METHOD.submodels(model) if "depth" in s.name]:
    config, small = METHOD.extract(model, params, submodel)
    assert config.num_layers == submodel["depth"]
    logits = jax.jit(Transformer(config).apply)({"params": small}, batch)
    pair = losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0)
    each.append(float(losses.mean(pair)))
  found, metrics = loss_of(model, params, batch)
  assert float(found) == pytest.approx(np.average(each, weights=weights), rel=1e-5)
  named = [float(losses.mean(metrics[name])) for name in ("loss/1", "loss/3", "loss")]
  np.testing.assert_allclose(named, each, rtol=1e-5)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_distilled_exits_learn_what_the_model_predicts(heads):
  """(1 - share) CE + share * cross entropy to the full model, whose prediction carries no gradient."""
  share = 0.7
  model, params, batch = built(heads=heads, weights="linear", distill=share)
  mask = batch["segment_ids"] > 0
  places = {submodel.name: place for place, submodel in enumerate(METHOD.submodels(model))}

  def slow(params, teacher):
    found = []
    for index, name in enumerate(("depth=1", "depth=3", "depth=4")):
      logits = METHOD.forward(model, params, batch, places[name]).logits
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
      hard = -jnp.sum(chosen * mask) / jnp.sum(mask)
      soft = -jnp.sum(jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(logits), axis=-1) * mask) / jnp.sum(mask)
      found.append(hard if index == 2 else (1 - share) * hard + share * soft)
    return jnp.dot(jnp.stack(found), jnp.array([1.0, 3.0, 4.0]) / 8.0)

  full = METHOD.forward(model, params, batch, places["depth=4"]).logits
  want, wanted = jax.value_and_grad(slow)(params, full)
  found, grads = jax.value_and_grad(lambda p: loss_of(model, p, batch)[0])(params)
  assert float(found) == pytest.approx(float(want), rel=1e-5)
  tiny.assert_trees_close(grads, wanted)
  metrics = loss_of(model, params, batch)[1]
  plain = loss_of(model.clone(method=METHOD.Config(exits=(1, 3), heads=heads)), params, batch)[1]
  assert {name: float(losses.mean(pair)) for name, pair in metrics.items()} == pytest.approx(
    {name: float(losses.mean(pair)) for name, pair in plain.items()}, rel=1e-6
  ), "what is reported is the next token's, to be compared with runs without a teacher"


def test_without_weight_the_exits_change_nothing():
  """The gradient is then the plain model's."""
  model, params, batch = built(listed_weights=(0.0, 0.0, 1.0))
  dense = METHODS["dense"]
  plain = Transformer(CONFIG)
  found = jax.grad(lambda p: loss_of(model, p, batch)[0])(params)
  want = jax.grad(lambda p: dense.loss(plain, p, batch, (0,), jax.random.key(0), jnp.int32(0))[0])(params)
  tiny.assert_trees_close(found, want)


def test_heads_of_their_own_are_the_only_thing_that_ee_tuning_trains():
  model, params, batch = built(heads="own", heads_only=True)
  assert METHOD.learning_rates(model) == {"embedding": 0.0, "layers": 0.0, "final_norm": 0.0}
  grads = jax.grad(lambda p: loss_of(model, p, batch)[0])(params)
  largest = {name: [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part)] for name, part in grads.items()}
  assert min(largest.pop("exit_heads")) > 0
  assert all(set(values) == {0.0} for values in largest.values()), "what is not trained is a constant"
  source = tiny.random_params(CONFIG, seed=1)
  begun = METHOD.init_from(model, params, source, "stepwise", 0)
  tiny.assert_trees_equal(begun, {**source, "exit_heads": params["exit_heads"]})


def test_an_exit_s_own_head_reaches_no_other_exit():
  model, params, batch = built(heads="own")
  changed = jax.tree.map(lambda leaf: leaf.at[0].add(1.0), params["exit_heads"])
  before = [METHOD.forward(model, params, batch, i).logits for i in (0, 1)]
  after = [METHOD.forward(model, {**params, "exit_heads": changed}, batch, i).logits for i in (0, 1)]
  assert not np.allclose(before[0], after[0])
  np.testing.assert_array_equal(before[1], after[1])


def test_the_weights_warm_up_to_their_own():
  model, *_ = built(weights="equal", warmup_steps=10)
  for step, early in ((0, 0.0), (5, 0.5), (10, 1.0), (50, 1.0)):
    np.testing.assert_allclose(early_exit.weights_at(model, jnp.int32(step)), [early, early, 1.0])


# CALM's classifier


def agreeing(**settings):
  """A model with a classifier that is no longer at its start."""
  model, params, batch = built(**{"classifier": "joint", **settings})
  random = np.random.default_rng(3)
  classifier = {"weight": jnp.asarray(random.normal(size=CONFIG.d_model), jnp.float32), "bias": jnp.float32(-2.0)}
  if model.own_heads:  # that are near the model's, for some tokens to agree
    own = params["exit_heads"]
    params["exit_heads"] = {**own, "matrix": 0.1 * own["matrix"] + params["embedding"]["table"].T[None]}
  return model, {**params, "classifier": classifier}, batch


def said(params, x):
  """The probability that an exit agrees, float64, of streams [..., d]."""
  x, part = np.asarray(x, np.float64), {k: np.asarray(v, np.float64) for k, v in params["classifier"].items()}
  normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
  return special.expit(normed @ part["weight"] + part["bias"])


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_the_classifier_s_loss_is_balanced_at_each_exit(heads):
  model, params, batch = agreeing(heads=heads)
  real = np.asarray(batch["segment_ids"]) > 0
  streams, tops = [], []
  for submodel in [s for s in METHOD.submodels(model) if "depth" in s.name]:
    config, small = METHOD.extract(model, params, submodel)
    dense = Transformer(config)
    x, context = dense.apply({"params": small}, batch, method="embed")
    x, _ = dense.apply({"params": small}, x, context, method=lambda m, x, c: m.layers(x, c, None))
    streams.append(np.asarray(x))
    tops.append(np.asarray(dense.apply({"params": small}, x, method="head")).argmax(-1))
  each = []
  for x, top in zip(streams[:-1], tops[:-1]):
    agrees, p, number = (top == tops[-1])[real], said(params, x)[real], real.sum()
    assert 0 < agrees.sum() < number
    each.append(-np.log(p[agrees]).sum() * (~agrees).sum() / number - np.log(1 - p[~agrees]).sum() * agrees.mean())
  want = np.mean(each) / real.sum()
  found, metrics = loss_of(model, params, batch)
  assert float(losses.mean(metrics["classifier_loss"])) == pytest.approx(want, rel=1e-5)
  plain = loss_of(model.clone(method=METHOD.Config(exits=(1, 3), heads=heads)), params, batch)[0]
  assert float(found) == pytest.approx(float(plain) + want, rel=1e-5)
  alone = model.clone(method=dataclasses.replace(model.method, classifier="alone", distill=0.5))
  assert float(loss_of(alone, params, batch)[0]) == pytest.approx(want, rel=1e-5)


def test_the_classifier_teaches_nobody_but_itself():
  model, params, batch = agreeing(heads="own")
  found = jax.grad(lambda p: loss_of(model, p, batch)[0])(params)
  plain = model.clone(method=METHOD.Config(exits=(1, 3), heads="own"))
  rest = lambda tree: {name: part for name, part in tree.items() if name != "classifier"}
  tiny.assert_trees_close(rest(found), jax.grad(lambda p: loss_of(plain, p, batch)[0])(rest(params)))
  alone = model.clone(method=dataclasses.replace(model.method, classifier="alone"))
  assert METHOD.learning_rates(alone) == dict.fromkeys(("embedding", "layers", "final_norm", "exit_heads"), 0.0)
  grads = jax.grad(lambda p: loss_of(alone, p, batch)[0])(params)
  tiny.assert_trees_close(grads["classifier"], found["classifier"])
  assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads["classifier"])) > 0
  assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(rest(grads)))


@pytest.mark.parametrize("kv", ["project", "copy"])
def test_tokens_leave_where_the_classifier_says_so(kv):
  threshold = 0.6
  model, params, batch = agreeing(exits=(1, 2, 3), exit=exits.Exiting(signal="learned", thresholds=(threshold,), kv=kv))
  names = [s.name for s in METHOD.submodels(model)]
  found = jax.device_get(METHOD.forward(model, params, batch, names.index(f"threshold={threshold}")))
  ask = lambda which, x: said(params, x) > threshold
  depth, x = slow_exits.left(CONFIG, params, batch, model.exits.depths, kv, lambda position: ask)
  real = np.asarray(batch["segment_ids"]) > 0
  assert len(set(depth[real])) >= 3
  np.testing.assert_allclose(found.logits[real], slow_exits.logits(CONFIG, params, x)[real], rtol=2e-5, atol=2e-5)
  assert float(found.aux["layers"][0]) == depth[real].sum()


def test_what_a_classifier_costs_and_needs():
  model, params, _ = agreeing()
  *_, full = METHOD.submodels(model)
  assert METHOD.cost(model, full, 8, {}).params_total == sum(leaf.size for leaf in jax.tree.leaves(params))
  asked = METHOD.build(CONFIG, dataclasses.replace(model.method, exit=exits.Exiting(signal="learned"))).exits
  assert asked.asked_flops(0) == 2 * CONFIG.d_model
  assert not asked.reads_logits
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CONFIG.d_model)), jnp.float32)
  found = asked.signal(params, 0).value(signals.Seen(None, None, x, x, None, None))
  np.testing.assert_allclose(found, said(params, x), rtol=1e-5)
  with pytest.raises(ConfigError, match="method.exit.signal='learned': this method trains none"):
    METHOD.build(CONFIG, METHOD.Config(exits=(1,), exit=exits.Exiting(signal="learned")))
  with pytest.raises(ConfigError, match="classifier='alone' trains no heads"):
    METHOD.Config(exits=(1,), heads="own", heads_only=True, classifier="alone")
  with pytest.raises(ConfigError, match=r"method.exits=\(4,\): there is nothing to classify"):
    METHOD.build(CONFIG, METHOD.Config(exits=(4,), classifier="joint"))


@pytest.mark.parametrize("kv", ["project", "copy", "hole", "exact", "recompute"])
def test_a_later_token_changes_nothing_that_the_classifier_said_before(kv):
  leaving = exits.Exiting(signal="learned", kv=kv, thresholds=(0.2,), wait=4)
  model, params, _ = agreeing(exit=leaving)
  batch = tiny.one_document(CONFIG)
  which = [s.name for s in METHOD.submodels(model)].index("threshold=0.2")
  first = METHOD.forward(model, params, batch, which)
  later = METHOD.forward(
    model, params, {**batch, "inputs": batch["inputs"].at[:, 5:].add(1) % CONFIG.vocab_size}, which
  )
  np.testing.assert_array_equal(first.logits[:, :5], later.logits[:, :5])
  layers = float(first.aux["layers"][0] / first.aux["layers"][1])
  assert 1 < layers < CONFIG.num_layers, "some leave and some do not"

"""JEI-DNN: gates and their probabilities by hand, who leaves where, costs, and settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_exits
import tiny
from planted_gates import BATCH, CONFIG, EXITS, METHOD, THRESHOLD, built, numbers_by_hand, probabilities_by_hand
from scipy import special

from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.depth.exits import Exiting
from adaptive.depth.signals import Seen
from adaptive.evaluation import calibration, thresholds
from adaptive.methods.depth import jei_dnn


@functools.cache
def runner(heads="own", kv="project", threshold=THRESHOLD):
  """Forward pass of a threshold: batch -> Output."""
  model, params = built(heads, kv, limits=(threshold,))
  index = [s.name for s in METHOD.submodels(model)].index(f"threshold={threshold}")
  run = jax.jit(lambda batch: METHOD.forward(model, params, batch, index))
  return lambda batch: jax.device_get(run(batch))


# The gates


def test_a_gate_reads_four_numbers_of_a_prediction_and_passes_no_gradient():
  logits = np.random.default_rng(0).normal(size=(3, 5, 7)) * 3
  found = jei_dnn.statistics(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(found, numbers_by_hand(logits), rtol=1e-5, atol=1e-6)
  equal = np.array([[1.0, 2.0, 2.0, 0.0]])
  np.testing.assert_allclose(jei_dnn.statistics(jnp.asarray(equal)), numbers_by_hand(equal), rtol=1e-6, atol=1e-7)
  grads = jax.grad(lambda x: jnp.sum(jei_dnn.statistics(x)))(jnp.asarray(logits, jnp.float32))
  assert not grads.any()


def test_probabilities_to_leave_are_shared_out_of_one():
  gates = np.random.default_rng(1).uniform(size=(5, 200)) * np.random.default_rng(2).uniform(size=(1, 200))
  found = np.asarray(jei_dnn.exit_probabilities(jnp.asarray(gates, jnp.float32)))
  np.testing.assert_allclose(found, probabilities_by_hand(gates), atol=1e-6)
  total = found.sum(0)
  assert total.max() <= 1 + 1e-6
  assert (total > 1 - 1e-6).any()
  assert (total < 0.9).any()


def test_from_exit_to_exit_the_conditional_probabilities_make_up_the_whole():
  """P_l = c_l prod_{j < l} (1 - c_j), with c_l = clip(P_l / prod_{j < l} (1 - c_j), 0, 1) and the signal's memory."""
  gates = np.random.default_rng(3).uniform(size=(6, 300)) * np.random.default_rng(4).uniform(size=(1, 300))
  wanted, staying = probabilities_by_hand(gates), np.ones(300)
  model, _ = built()
  remember, before = model.exits.learned({}, 0).remember, np.zeros(300, np.float32)
  for gate, probability in zip(gates, wanted):
    found = np.asarray(jei_dnn.conditional(jnp.asarray(gate, jnp.float32), jnp.asarray(before)))
    inside = staying > 1e-3  # what is left of the others has been lost in subtractions
    c = np.where(inside, np.clip(probability / np.maximum(staying, 1e-9), 0, 1), 1.0)
    np.testing.assert_allclose(found[inside], c[inside], atol=1e-3)
    np.testing.assert_allclose(found * (1 - before), probability, atol=1e-5)
    before, staying = np.asarray(remember(found, before)), staying * (1 - c)
    np.testing.assert_allclose(1 - before, staying, atol=2e-3)
  assert (staying < 1e-9).any()
  assert found.max() <= 1.0
  np.testing.assert_array_equal(jei_dnn.conditional(jnp.asarray([0.2, 0.0]), jnp.ones(2)), 1.0)


# Leaving


def asker(params, model):
  """What the slow way asks a token, from its first exit to where it leaves: c by the paper's formula."""

  def ask_token(position):
    gates, conditionals = [], []

    def ask(which, x):
      own = which if model.own_heads else None
      numbers = numbers_by_hand(slow_exits.logits(CONFIG, params, x, own))
      score = numbers @ np.asarray(params["gates"]["weight"], np.float64)[which] + float(params["gates"]["bias"][which])
      probability = max(0.0, min(special.expit(score), 1 - sum(gates)))
      gates.append(special.expit(score))
      staying = np.prod([1 - c for c in conditionals])
      conditionals.append(min(probability / staying, 1.0) if staying > 0 else 1.0)
      return conditionals[-1] > THRESHOLD

    return ask

  return ask_token


@pytest.mark.parametrize(("heads", "kv"), [("own", "project"), ("shared", "copy"), ("own", "hole")])
def test_tokens_leave_where_the_slow_way_lets_them(heads, kv):
  model, params = built(heads, kv)
  batch = tiny.packed_batch(CONFIG, length=7)
  found = runner(heads, kv)(batch)
  depth, x = slow_exits.left(CONFIG, params, batch, model.exits.depths, kv, asker(params, model))
  want = np.stack(
    [slow_exits.logits(CONFIG, params, x, which if which < 3 and heads == "own" else None) for which in range(4)]
  )
  want = np.take_along_axis(want, depth[None, ..., None] - 1, axis=0)[0]
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(found.logits[real], want[real], rtol=2e-5, atol=2e-5)
  assert float(found.aux["layers"][0]) == depth[real].sum()
  assert len(set(depth[real])) >= 3


def test_a_threshold_of_one_is_the_plain_model_even_where_gates_are_certain():
  model, params = built(limits=(1.0,))
  certain = {**params, "gates": {**params["gates"], "bias": jnp.full(3, 100.0)}}
  index = [s.name for s in METHOD.submodels(model)].index("threshold=1.0")
  plain = Transformer(CONFIG).apply({"params": {k: params[k] for k in ("embedding", "layers", "final_norm")}}, BATCH)
  for given in (params, certain):
    found = jax.jit(lambda p: METHOD.forward(model, p, BATCH, np.int32(index)).logits)(given)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)


def test_later_tokens_other_rows_and_other_documents_change_nothing():
  run, batch = runner(), tiny.packed_batch(CONFIG, rows=3)
  together = run(batch)
  assert 1 < float(together.aux["layers"][0] / together.aux["layers"][1]) < 4, "some leave and some do not"
  later = {**batch, "inputs": batch["inputs"].at[:, 6:].add(1) % CONFIG.vocab_size}
  np.testing.assert_array_equal(run(later).logits[:, :6], together.logits[:, :6])
  second = np.asarray(batch["segment_ids"]) == 2
  first = {**batch, "inputs": jnp.where(second, batch["inputs"], (batch["inputs"] + 1) % CONFIG.vocab_size)}
  np.testing.assert_array_equal(run(first).logits[second], together.logits[second])
  alone = [run(jax.tree.map(lambda x, i=i: x[np.array([i] * 3)], batch)).logits[0] for i in range(3)]
  np.testing.assert_allclose(np.stack(alone), together.logits, rtol=1e-5, atol=1e-5)


def test_a_calibration_foresees_what_gates_do():
  """With the memory of the exits before, and the keys of the full model."""
  model, params = built("shared", "exact")
  seen = calibration.collect(model.exits, params, [BATCH], 12)
  aux = METHOD.forward(model, params, BATCH, 3).aux
  at = thresholds.where_left(seen, (THRESHOLD,) * 3)
  assert METHOD.submodels(model)[3].name == f"threshold={THRESHOLD}"
  assert [float(aux[f"ran/{d}"][0]) for d in (*EXITS, 4)] == [np.sum(at >= e) for e in range(4)]
  assert len(set(at)) >= 3


def test_exits_that_are_left_out_keep_the_others_gates():
  model, params = built()
  how = dataclasses.replace(model.method.exit, depths=(2,))
  other = METHOD.build(CONFIG, dataclasses.replace(model.method, exit=how))
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 32)), jnp.float32)
  nothing = Seen(logits, None, None, None, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)))
  asked = lambda model, which: float(model.exits.learned(params, which).value(nothing)[0, 0])
  assert asked(other, 0) == asked(model, 1) != asked(model, 0)


def test_gates_stay_float32_where_a_model_decodes_in_half_precision():
  config = tiny.model_config(dtype="bfloat16")
  model = METHOD.build(config, METHOD.Config(exits=EXITS))
  submodel = next(s for s in METHOD.submodels(model) if "threshold" in s.name)
  kept = METHOD.decoder(model, tiny.random_params(model), submodel).params
  dtypes = lambda tree: {leaf.dtype.name for leaf in jax.tree.leaves(tree)}
  assert dtypes(kept.pop("gates")) == {"float32"}
  assert dtypes(kept) == {"bfloat16"}


def test_costs_count_the_gates_that_were_asked_and_the_parameters_that_a_sub_model_holds():
  model, _ = built()
  costs = {s.name: METHOD.cost(model, s, 8, {}) for s in METHOD.submodels(model)}
  shares = {f"ran/{d}": (ran, 4.0) for d, ran in zip((*EXITS, 4), (4.0, 2.0, 1.0, 1.0))}
  found = METHOD.cost(model, METHOD.submodels(model)[3], 8, shares).flops_per_token
  head = 2 * CONFIG.vocab_size * CONFIG.d_model
  layer = (costs["depth=4"].flops_per_token - head) / 4
  keys = 4 * CONFIG.d_model * CONFIG.num_kv_heads * CONFIG.head_size
  assert found == pytest.approx(2 * layer + 2 * keys + 2 * head + (1 + 0.5 + 0.25) * 8)
  foreseen = calibration.flops_where_left(model.exits, 8, np.ones((1, 1), np.int32))
  assert foreseen([3]) == pytest.approx(4 * layer + 4 * head + 3 * 8)
  config, small = METHOD.extract(model, built()[1], METHOD.submodels(model)[0])
  assert config.num_layers == 1
  assert costs["depth=1"].params_total == sum(leaf.size for leaf in jax.tree.leaves(small))
  for name in (f"threshold={THRESHOLD}", "depth=4"):
    assert costs[name].params_total == sum(leaf.size for leaf in jax.tree.leaves(built()[1]))


# Settings


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(exits=()), "method.exits is empty"),
    (dict(exits=(4,)), r"method.exits=\(4,\) has no exit before the model's own"),
    (dict(exits=(1,), backbone="frozen"), "method.backbone='frozen' needs method.heads='own'"),
    (dict(exits=(1,), phase_steps=0), "method.phase_steps=0 must be at least 1"),
    (dict(exits=(1,), warmup_steps=-1), "method.warmup_steps=-1 must be at least 0"),
    (dict(exits=(1,), cost_weight=-0.1), "method.cost_weight=-0.1 must be at least 0"),
    (dict(exits=(1,), gate_rate=0.0), "method.gate_rate=0.0 must be more than 0"),
    (dict(exits=(1, 3), exit=Exiting(depths=(2,))), r"no exit was trained at \[2\]"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    METHOD.build(CONFIG, METHOD.Config(**settings))

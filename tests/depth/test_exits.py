"""Leaving early: thresholds by the slow way, the neutral settings, causality, rows, and what cannot be."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import slow_exits
import tiny
from scipy import special

from adaptive import cost as costs
from adaptive import executors
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.depth import exits as parts
from adaptive.depth import walk
from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS

CONFIG = tiny.model_config()
METHOD = METHODS["early_exit"]
SIGNALS = {
  "max_probability": 0.22,
  "margin": 0.04,
  "entropy": 0.15,
  "cosine": 0.7,
  "saturation": 0.2,
  "patience": 0.5,
  "random": 0.5,
}


@functools.cache
def built(signal="max_probability", threshold=0.22, kv="project", heads="shared", **more):
  how = Exiting(signal=signal, thresholds=(threshold,), kv=kv, **more)
  model = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3), heads=heads, exit=how))
  index = [s.name for s in METHOD.submodels(model)].index(f"threshold={threshold}")
  run = jax.jit(lambda params, batch: METHOD.forward(model, params, batch, index))
  return model, tiny.random_params(model), run


@pytest.mark.parametrize("kv", ["project", "copy", "hole"])
def test_tokens_leave_where_the_slow_way_lets_them(kv):
  model, params, run = built(kv=kv)
  batch = tiny.packed_batch(CONFIG, length=7)
  found = run(params, batch)
  ask = lambda which, x: special.softmax(slow_exits.logits(CONFIG, params, x)).max() > 0.22
  depth, x = slow_exits.left(CONFIG, params, batch, model.exits.depths, kv, lambda position: ask)
  real = np.asarray(batch["segment_ids"]) > 0
  want = slow_exits.logits(CONFIG, params, x)
  np.testing.assert_allclose(np.asarray(found.logits)[real], want[real], rtol=2e-5, atol=2e-5)
  assert float(found.aux["layers"][0]) == depth[real].sum()
  assert len(set(depth[real])) == 3


def test_with_all_keys_every_exit_is_the_full_model_s():
  model, params, run = built(kv="exact")
  batch = tiny.packed_batch(CONFIG)
  found = np.asarray(run(params, batch).logits)
  hidden = executors.exits(CONFIG, params, batch, (1, 3, 4))
  each = np.stack([model.exits.head(params, i, x) for i, x in enumerate(hidden)])
  sure = np.asarray(jax.nn.softmax(each, axis=-1)).max(-1) > 0.22
  sure[-1] = True
  want = np.take_along_axis(each, np.argmax(sure, axis=0)[None, ..., None], axis=0)[0]
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv", ["project", "copy", "hole", "exact"])
@pytest.mark.parametrize("signal", [name for name in SIGNALS if name != "patience"])
def test_a_threshold_of_one_is_the_full_model(signal, kv):
  _, params, run = built(signal, 1.0, kv)
  batch = tiny.packed_batch(CONFIG)
  plain = Transformer(CONFIG).apply({"params": params}, batch)
  np.testing.assert_allclose(run(params, batch).logits, plain, rtol=1e-5, atol=1e-5)


def test_a_threshold_below_everything_is_the_first_exit():
  model, params, run = built("max_probability", -1.0)
  batch = tiny.packed_batch(CONFIG)
  first = METHOD.forward(model, params, batch, 0)
  np.testing.assert_allclose(run(params, batch).logits, first.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kv", ["project", "copy", "hole", "exact"])
def test_a_later_token_changes_nothing_before(signal, kv):
  _, params, run = built(signal, SIGNALS[signal], kv)
  batch = tiny.one_document(CONFIG)
  changed = {**batch, "inputs": batch["inputs"].at[:, 5:].add(1) % CONFIG.vocab_size}
  a, b = run(params, batch), run(params, changed)
  np.testing.assert_array_equal(a.logits[:, :5], b.logits[:, :5])
  layers = float(a.aux["layers"][0] / a.aux["layers"][1])
  assert 1 < layers < 4, "some leave and some do not"


@pytest.mark.parametrize("kv", ["project", "copy", "hole", "exact", "recompute"])
def test_a_row_leaves_where_it_leaves_alone_and_padding_changes_nothing(kv):
  _, params, run = built(kv=kv)
  batch = tiny.packed_batch(CONFIG, rows=3)
  together, counted = run(params, batch)
  together = np.asarray(together)
  logits, each = zip(*(run(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch)) for i in range(3)))
  np.testing.assert_allclose(np.concatenate(logits), together, rtol=1e-5, atol=1e-5)
  assert jax.tree.map(float, counted) == jax.tree.map(lambda *parts: float(sum(parts)), *each)
  real = np.asarray(batch["segment_ids"]) > 0
  padded = {**batch, "inputs": np.where(real, batch["inputs"], 7)}
  np.testing.assert_array_equal(np.asarray(run(params, padded).logits)[real], together[real])


def test_a_higher_threshold_lets_nobody_leave_earlier():
  """With the full model's keys what a token sees does not depend on the others' exits, so this holds token by token."""
  batch = tiny.one_document(CONFIG, rows=4, length=12)
  layers = []
  for threshold in (0.05, 0.1, 0.2, 0.22, 0.5):
    _, params, run = built("max_probability", threshold, "exact")
    layers.append(float(run(params, batch).aux["layers"][0]))
  assert layers == sorted(layers)
  assert layers[0] < layers[-1]


def test_later_tokens_have_lower_thresholds_where_they_decay():
  how = Exiting(decay=0.1, decay_rate=4.0, decay_length=100)
  found = walk.decay(how, np.array([[0, 25, 100]]))
  np.testing.assert_allclose(found, [[1, 0.9 + 0.1 * np.exp(-1), 0.9 + 0.1 * np.exp(-4)]])


def test_costs_count_what_ran_and_every_head_that_was_asked():
  model, params, run = built(threshold=0.22)
  batch = tiny.one_document(CONFIG, length=8)
  submodels = METHOD.submodels(model)
  at = [s.name for s in submodels].index("threshold=0.22")
  realised = run(params, batch).aux
  shares = [float(realised[f"ran/{d}"][0] / realised[f"ran/{d}"][1]) for d in (1, 3, 4)]
  cost = METHOD.cost(model, submodels[at], 8, realised).flops_per_token
  full = METHOD.cost(model, submodels[-1], 8, {}).flops_per_token
  head = 2 * CONFIG.vocab_size * CONFIG.d_model
  layer, keys = (full - head) / 4, 4 * CONFIG.d_model * CONFIG.num_kv_heads * CONFIG.head_size
  ran = shares[0] + 2 * shares[1] + shares[2]
  assert cost == pytest.approx(ran * layer + (4 - ran) * keys + sum(shares) * head)
  one = METHOD.cost(model, submodels[0], 8, {}).flops_per_token
  assert one == pytest.approx(layer + head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["early_exit", "jei_dnn", "sec"])
def test_a_fixed_depth_costs_what_the_model_costs_that_is_extracted(method, tied):
  """Beside a full model lie the heads and whatever decides for others; they compute nothing of it."""
  config, method = tiny.model_config(vocab_size=200, tied_embeddings=tied), METHODS[method]
  model = method.build(config, method.Config(exits=(1, 2, 3), heads="own"))
  params = tiny.random_params(model)
  everything = sum(leaf.size for leaf in jax.tree.leaves(params))
  for submodel in [s for s in method.submodels(model) if "depth" in s.name]:
    found = method.cost(model, submodel, 8, {})
    want = costs.dense_cost(method.extract(model, params, submodel)[0], 8)
    total = everything if submodel["depth"] == 4 else want.params_total
    assert found == dataclasses.replace(want, params_total=total), submodel.name


def test_a_hole_writes_no_keys():
  """By hand: half of the tokens leave after one layer of four, a quarter after three."""
  ran = {f"ran/{depth}": (tokens, 4.0) for depth, tokens in ((1, 4.0), (3, 2.0), (4, 1.0))}
  each = {}
  for kv in ("project", "hole"):
    model, _, _ = built(kv=kv)
    index = METHOD.submodels(model)[2]
    each[kv] = METHOD.cost(model, index, 8, ran).kv_bytes_per_token, METHOD.cost(model, index, 8, {}).kv_bytes_per_token
  full = 4 * 2 * CONFIG.num_kv_heads * CONFIG.head_size * 4
  assert each == {"project": (full, full), "hole": (full * (1 + 2 * 0.5 + 0.25) / 4, full)}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(exits=()), "method.exits is empty"),
    (dict(exits=(3, 1)), "must be increasing"),
    (dict(exits=(5,)), "lie in 1..4"),
    (dict(exits=(1, 3), exit=Exiting(depths=(2,))), r"no exit was trained at \[2\]"),
    (dict(exits=(1, 3), exit=Exiting(per_exit=(0.5,))), "no multiple of 2 early exits"),
    (dict(exits=(1, 3), exit=Exiting(decay=1.5)), "exit.decay"),
    (dict(exits=(1, 3), exit=Exiting(wait=0)), "exit.wait"),
    (dict(exits=(1, 3), exit=Exiting(wait=10**9)), "exit.wait=1000000000 must be at least 1 and at most 1024"),
    (dict(exits=(4,), heads="own", heads_only=True), r"method.exits=\(4,\) has no head of its own"),
    (dict(exits=(1, 3), exit=Exiting(decay_length=0)), "exit.decay_length=0 must be more than 0"),
    (dict(exits=(1, 3), exit=Exiting(decay_rate=-4.0)), "exit.decay_rate=-4.0 must be at least 0"),
    (dict(exits=(1, 3), exit=Exiting(decay_rate=math.nan)), "exit.decay_rate=nan must be at least 0"),
    (dict(exits=(1, 3), exit=Exiting(decay=0.1, thresholds=(0.5, -1.0))), "decay=0.1 would raise .* threshold -1 for"),
    (dict(exits=(1,), exit=Exiting(decay=0.1, per_exit=(-0.2,))), "decay=0.1 would raise .* threshold -0.2 for"),
    (dict(exits=(1, 3), listed_weights=(1.0, 1.0)), "listed_weights"),
    (dict(exits=(1,), listed_weights=(1.0, math.inf)), "listed_weights.*finite"),
    (dict(exits=(1,), listed_weights=(math.nan, 1.0)), "listed_weights.*finite"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    METHOD.build(CONFIG, METHOD.Config(**settings))


def test_heads_alone_need_heads_of_their_own():
  with pytest.raises(ConfigError, match="heads_only"):
    METHOD.Config(exits=(1,), heads_only=True)


def test_thresholds_of_each_exit_make_a_sub_model_each():
  how = Exiting(thresholds=(), per_exit=(0.1, 0.2, 0.3, 0.4))
  model = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3), exit=how))
  assert [s.name for s in METHOD.submodels(model)] == ["depth=1", "depth=3", "plan=1", "plan=2", "depth=4"]
  assert list(parts.rules(model.exits).values())[3].thresholds == (0.3, 0.4)

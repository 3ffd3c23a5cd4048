"""The decoder of every sub-model: in whatever pieces tokens arrive, the logits are those of one forward pass."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.depth import exits
from adaptive.methods import METHODS

MOD, MOR = "mixture_of_depths", "mixture_of_recursions"
SETTINGS = {
  "sorted_net": dict(depths=(2, 4), q_per_kv=(1, 3), d_ff=(8, 24)),
  "recursive": dict(num_recursions=2),
  "unified_skip": dict(speedups=(1.3, 2.0)),
  "first": dict(prompt_tokens=3, thresholds=(0.3, 0.6)),
}
# Of Mixture-of-Recursions: settings by variant, and where the three dials are in the list of sub-models.
RECURSIONS = {
  "wise": dict(),
  "shared": dict(kv_cache="shared"),
  "hybrid": dict(kv_cache="hybrid", router="mlp", inference="aux_router"),
  "cycle": dict(sharing="cycle", gating="additive", gate="tanh"),
  "random": dict(router="random", score_shifts=()),
  "token": dict(routing="token_choice", gate="softmax", alpha=1.0, score_shifts=(), capacity_scales=()),
  "token_hybrid": dict(
    routing="token_choice", composition="every", kv_cache="hybrid", score_shifts=(), capacity_scales=()
  ),
}
# Of Mixture-of-Depths; sub-models are a shift of the scores, a bound on the tokens, and the full one.
DEPTHS = {
  "router": dict(score_shifts=(0.3,)),
  "predictor": dict(inference="predictor", score_shifts=(-0.05,), routed=(0, 3), gate="tanh"),
}
MODELS = {"plain": tiny.model_config(), "qwen": tiny.model_config(qk_norm=True, qkv_bias=True, tied_embeddings=False)}
CASES = [("dense", "plain", 0), ("dense", "qwen", 0), ("sorted_net", "qwen", 0), ("sorted_net", "qwen", 5)]
CASES += [("recursive", "plain", 0), ("recursive", "plain", 1)]
CASES += [("unified_skip", "qwen", 1), ("first", "plain", 1), ("first", "qwen", 0), ("first", "plain", 2)]
# Of early exit by key/value rule: a fixed depth (0), and a threshold (3) that some tokens pass and others do not.
EXITS = {
  "project": dict(),
  "copy": dict(kv="copy", signal="entropy", thresholds=(0.1, 0.2, 0.3)),
  "hole": dict(kv="hole", signal="cosine", thresholds=(0.5, 0.6, 0.7)),
  "decay": dict(signal="margin", decay=0.5, decay_length=4, per_exit=(0.1, 0.0), thresholds=(0.05, 0.1)),
  "patience": dict(signal="patience", thresholds=(0.5, 1.5, 2.5)),
  "exact": dict(kv="exact", wait=16),
  "crowded": dict(kv="exact", wait=1),
  "recompute": dict(kv="recompute", wait=4),
  "stability": dict(kv="copy", signal="stability", thresholds=(0.2, 0.4, 0.6)),
  "random": dict(signal="random", thresholds=(0.3, 0.5, 0.7)),
  "agreement": dict(signal="learned", thresholds=(0.3, 0.5, 0.7)),
}
# Of shared blocks by settings and key/value rule: a fixed number of passes (1), and a threshold (2).
PASSES = {
  "pondernet": ("ponder", dict(), dict(signal="learned", thresholds=(0.8,))),
  "pondernet_exact": ("ponder", dict(), dict(signal="learned", thresholds=(0.8,), kv="exact")),
  "act": ("ponder", dict(halting="act"), dict(signal="learned", thresholds=(0.9,), kv="latest")),
  "recompute": ("ponder", dict(), dict(signal="learned", thresholds=(0.8,), kv="recompute", wait=3)),
  "act_exact": ("ponder", dict(halting="act"), dict(signal="learned", thresholds=(0.9,), kv="exact", wait=2)),
  "stability": ("recurrent_depth", dict(core=2), dict(signal="stability", thresholds=(0.4,))),
  "latest": ("recurrent_depth", dict(core=2), dict(signal="stability", thresholds=(0.4,), kv="latest")),
  "saturation": ("recurrent_depth", dict(core=2), dict(signal="saturation", thresholds=(0.0,), kv="copy")),
}
CASES += [("early_exit", "project", 0), *(("early_exit", rule, 3) for rule in EXITS)]
# Of exits that were learned, by method; SEC stops some tokens.
LEARNED = {"jei_dnn": dict(), "sec": dict(stop_threshold=0.6, stop_token=5)}
CASES += [(name, rule, 4) for name in LEARNED for rule in ("project", "hole", "exact")]
CASES += [(PASSES[name][0], name, 2) for name in PASSES]
CASES += [("ponder", "pondernet", 1), ("ponder", "act", 1), ("recurrent_depth", "stability", 1)]
CASES += [(MOR, variant, -1) for variant in RECURSIONS]
CASES += [(MOR, "wise", index) for index in (0, 2, 3)] + [(MOR, "token", 0), (MOR, "hybrid", 3)]
CASES += [(MOD, "router", index) for index in (0, 1, 2)] + [(MOD, "predictor", index) for index in (1, 2)]
LENGTH, PIECE = 8, 4


@functools.cache
def case(name: str, variant: str, index: int):
  """A decoder with its step compiled, tokens [3, LENGTH], and their logits of one forward pass, [3, LENGTH, v]."""
  method = METHODS[name]
  if name == MOR:
    config = tiny.model_config(num_layers=6 if variant == "cycle" else 5, qk_norm=True)
    dials = dict(score_shifts=(0.3,), capacity_scales=(0.5,))
    settings = dict(num_recursions=3, **{**dials, **RECURSIONS[variant]})
  elif name == MOD:
    config, settings = tiny.model_config(qk_norm=True), dict(capacity=0.5, capacity_scales=(0.5,), **DEPTHS[variant])
  elif name in ("ponder", "recurrent_depth"):
    config = tiny.model_config(num_layers=7, qk_norm=True)
    _, more, how = PASSES[variant]
    settings = dict(num_recursions=3, prelude=1, **more, exit=exits.Exiting(**how))
  elif name == "early_exit":
    config = tiny.model_config(qk_norm=True)
    exiting = exits.Exiting(**{"thresholds": (0.1, 0.15, 0.2), **EXITS[variant]})
    settings = dict(exits=(1, 3), heads="own" if variant == "copy" else "shared", exit=exiting)
    settings |= dict(classifier="joint") if exiting.signal == "learned" else {}
  elif name in LEARNED:
    config, how = tiny.model_config(qk_norm=True), METHODS[name].Config().exit
    exiting = dataclasses.replace(how, thresholds=(0.3, 0.5), kv=variant, **LEARNED[name])
    settings = dict(exits=(1, 2, 3), heads="own", exit=exiting)
  else:
    config, settings = MODELS[variant], SETTINGS.get(name, {})
  model = method.build(config, method.Config(**settings))
  index %= len(method.submodels(model))
  params, batch = tiny.random_params(model), tiny.one_document(config, rows=3, length=LENGTH)
  if name == "jei_dnn":  # gates that tell tokens apart
    params["gates"] = {"weight": jnp.tile(jnp.array([[8.0, 0.0, 4.0, -1.0]]), (3, 1)), "bias": jnp.full(3, -0.8)}
  expected = jax.jit(lambda params: method.forward(model, params, batch, index).logits)(params)
  decoder = method.decoder(model, params, method.submodels(model)[index])
  return decoder._replace(step=jax.jit(decoder.step)), np.asarray(batch["inputs"]), np.asarray(expected)


def run(decoder, tokens, counts_of_calls, slots=LENGTH):
  """Feeds each row's tokens in pieces of these counts [calls, b], padded with token 1; yields (done, logits, cache)."""
  rows = len(tokens)
  cache, done = decoder.empty_cache(rows, slots), np.zeros(rows, int)
  for counts in counts_of_calls:
    piece = np.ones((rows, 1 if max(counts) == 1 else PIECE), np.int32)  # two shapes, so two programs
    for row, count in enumerate(counts):
      piece[row, :count] = tokens[row, done[row] : done[row] + count]
    logits, cache, metrics = decoder.step(decoder.params, piece, jnp.asarray(counts, jnp.int32), cache)
    done = done + counts
    assert all(float(count) == sum(counts) for _, count in metrics.values())
    yield done, np.asarray(logits), cache


@pytest.mark.parametrize("which", CASES, ids=str)
def test_token_by_token_is_one_forward_pass(which):
  decoder, tokens, expected = case(*which)
  for done, logits, _ in run(decoder, tokens, [(1, 1, 1)] * LENGTH):
    np.testing.assert_allclose(logits, expected[:, done[0] - 1], rtol=1e-5, atol=1e-5)
  assert np.abs(expected).max() > 1


@pytest.mark.parametrize("which", CASES, ids=str)
def test_rows_of_their_own_lengths_and_pieces(which):
  decoder, tokens, expected = case(*which)
  calls = [(3, 1, 4), (0, 4, 1), (1, 1, 0), (4, 2, 3)]
  for counts, (done, logits, _) in zip(calls, run(decoder, tokens, calls)):
    for row in np.flatnonzero(counts):
      np.testing.assert_allclose(logits[row], expected[row, done[row] - 1], rtol=1e-5, atol=1e-5)
  assert done.tolist() == [8, 8, 8], "every row has filled its cache"


def test_a_row_without_a_token_stays_as_it_is_bit_for_bit():
  decoder, tokens, _ = case("sorted_net", "qwen", 5)
  calls = [(3, 2, 4), (2, 0, 1)]
  (_, _, before), (_, _, after) = run(decoder, tokens, calls)
  tiny.assert_trees_equal(jax.tree.map(lambda x: x[1], after.layers), jax.tree.map(lambda x: x[1], before.layers))
  assert after.lengths.tolist() == [5, 2, 5]
  assert (after.layers[0].key[0, :, 3:5] != before.layers[0].key[0, :, 3:5]).any()


def test_padding_is_not_stored():
  decoder, tokens, _ = case("dense", "qwen", 0)
  ((_, _, cache),) = run(decoder, tokens, [(4, 2, 3)])
  held = (np.stack([layer.key for layer in cache.layers]) != 0).any(axis=(0, 2, 4))
  np.testing.assert_array_equal(held, np.arange(LENGTH)[None] < np.array([[4], [2], [3]]))


# A decoder of each way to run layers.
WAYS = [("dense", "qwen", 0), ("sorted_net", "qwen", 0), ("recursive", "plain", 1), ("first", "qwen", 0)]
WAYS += [("early_exit", rule, 3) for rule in ("project", "copy", "hole", "exact")]
WAYS += [("ponder", "act", 2), (MOR, "wise", -1), (MOR, "shared", -1), (MOR, "hybrid", -1), (MOD, "router", 1)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("which", WAYS, ids=str)
def test_a_step_copies_no_cache_and_no_weights(which, rows):
  decoder, _, _ = case(*which)
  cache, ones = decoder.empty_cache(rows, 40), jnp.ones(rows, jnp.int32)
  step = jax.jit(decoder.step, donate_argnums=3).lower(decoder.params, ones[:, None], ones, cache)
  shapes = re.findall(r" = \w+\[([\d,]+)\]\S* copy\(", step.compile().as_text())
  copied = {math.prod(map(int, dims.split(","))) for dims in shapes}
  assert copied, "the text is read: something small is copied in every step"
  held = {leaf.size for leaf in jax.tree.leaves((decoder.params, cache))}
  assert not copied & {size for size in held if size >= 128}, "what is smaller is as large as a stream by chance"


def test_a_sub_model_s_decoder_holds_its_own_part_only():
  decoder, _, _ = case("sorted_net", "qwen", 0)
  first, _ = decoder.params["layers"]
  assert first["mlp"]["up"].shape == (16, 2, 4)
  assert first["attention"]["query"].shape == (16, 2, 1, 4)
  assert [layer.key.shape for layer in decoder.empty_cache(3, 5).layers] == [(3, 2, 5, 4)] * 2


def test_parameters_come_in_the_dtype_that_computes():
  config = tiny.model_config(dtype="bfloat16", num_layers=2)
  dense = METHODS["dense"]
  model, params = dense.build(config, dense.Config()), tiny.random_params(config)
  decoder = dense.decoder(model, params, dense.submodels(model)[0])
  assert {leaf.dtype for leaf in jax.tree.leaves(decoder.params)} == {jnp.dtype("bfloat16")}
  tokens, cache = np.zeros((2, 3), np.int32), decoder.empty_cache(2, 3)
  logits, after, _ = jax.eval_shape(decoder.step, decoder.params, tokens, jnp.full(2, 3), cache)
  assert (logits.dtype, after.layers[0].key.dtype) == (jnp.float32, jnp.bfloat16)

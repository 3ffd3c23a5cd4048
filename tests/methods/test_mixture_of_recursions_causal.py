"""Mixture-of-Recursions at inference: no look ahead, no padding, no other document; and the masked form of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.backbone.transformer import Block
from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import causal
from adaptive.methods.depth.mixture_of_recursions import model as models
from adaptive.methods.depth.mixture_of_recursions.config import capacity_tokens

LENGTH = 12
DIALS = dict(score_shifts=(-0.5, 0.7), capacity_scales=(0.4,))
FAMILIES = {
  "router": dict(DIALS, sharing="cycle"),
  "router, shared": dict(DIALS, kv_cache="shared", gate="tanh", sharing="cycle"),
  "aux_router, hybrid": dict(DIALS, kv_cache="hybrid", inference="aux_router", router="mlp", sharing="cycle"),
  "random": dict(router="random", capacity_scales=(0.5,), gating="additive", sharing="cycle"),
  "token": dict(routing="token_choice", gate="softmax", alpha=1.0, composition="every", balance="loss_free"),
  "token, hybrid": dict(routing="token_choice", kv_cache="hybrid", sharing="cycle"),
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(**settings):
  layers = 3 if settings.get("sharing") == "cycle" else 5
  return mor.build(tiny.model_config(num_layers=layers, d_ff=16, num_heads=2, num_kv_heads=1), mor.Config(**settings))


@functools.cache
def made(name):
  """Model, parameters, and jitted (batch, index) -> (logits, aux), one program for all sub-models."""
  model = build(**FAMILIES[name])
  params = tiny.random_params(model, seed=1)
  forward = jax.jit(lambda batch, index: mor.forward(model, params, batch, index))
  return model, params, lambda batch, index: jax.tree.map(np.asarray, forward(batch, jnp.int32(index)))


@functools.cache
def document():
  return tiny.one_document(tiny.model_config(), rows=2, length=LENGTH)


def number_of(name):
  return len(mor.submodels(made(name)[0]))


@every_family
def test_no_sub_model_looks_ahead(name):
  forward, batch = made(name)[2], document()
  for index in range(number_of(name)):
    before, _ = forward(batch, index)
    for position in (3, 8):
      for later in (slice(position, position + 1), slice(position, None)):
        changed = {**batch, "inputs": batch["inputs"].at[:, later].add(1) % 32}
        after, _ = forward(changed, index)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position] != before[:, position]).any(axis=-1).all()


@every_family
def test_each_sub_model_keeps_the_tokens_that_its_dial_says(name):
  """The control of the test above: a rule that lets all pass, or none, could not look ahead."""
  model, _, forward = made(name)
  outputs = [forward(document(), index) for index in range(number_of(name))]
  kept = [[float(out.aux[f"capacity/{r}"][0]) for r in (1, 2, 3)] for out in outputs]
  full, number = kept[-1], 2 * LENGTH
  assert number == full[0] > full[1] > full[2] > 0
  for submodel, found, (logits, aux) in zip(mor.submodels(model)[:-1], kept, outputs):
    assert np.abs(logits - outputs[-1].logits).max() > 1e-3
    assert all(count == number for _, count in aux.values())
    dial = dict(submodel.dial)
    if "capacity_scale" in dial:
      limits = [2 * np.ceil(dial["capacity_scale"] * share * LENGTH) for share in (2 / 3, 1 / 3)]
      assert found[0] == number, "a recursion that takes all tokens is never bounded"
      assert found[1] <= limits[0]
      assert found[2] <= limits[1]
    elif "score_shift" in dial:
      assert found[0] == number
      assert (found[1] < full[1]) == (dial["score_shift"] < 0)
      assert (found[1] > full[1]) == (dial["score_shift"] > 0)
    else:
      assert found == [k if r < submodel["recursions"] else 0 for r, k in enumerate(full)]


@pytest.mark.parametrize("inference", ["router", "aux_router"])
def test_the_configured_router_decides(inference):
  """Scores of zero are not above the threshold, so they stop a token; the other router stops none."""
  model = build(sharing="cycle", num_recursions=3, inference=inference)
  params, last = tiny.random_params(model, seed=1), len(mor.submodels(model)) - 1
  batch = document()
  kept = jax.jit(lambda params: mor.forward(model, params, batch, last).aux["capacity/2"][0])
  names = [name for name in ("router", "aux_router") if name in params]
  found = {name: float(kept({**params, name: jax.tree.map(jnp.zeros_like, params[name])})) for name in names}
  assert 0 < kept(params) < 2 * LENGTH
  assert {name: number == 0 for name, number in found.items()} == {name: name == inference for name in names}


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_training_looks_ahead_only_in_expert_choice(routing):
  """So the tests above could fail."""
  gate = "softmax" if routing == "token_choice" else "sigmoid"
  model = build(routing=routing, gate=gate, sharing="cycle")
  params, batch = tiny.random_params(model, seed=1), document()
  train = jax.jit(lambda b: models.training_logits(model, params, b, None, jax.random.key(0), jnp.int32(0))[0])
  changed = {**batch, "inputs": batch["inputs"].at[:, 8:].add(1) % 32}
  moved = np.abs(np.asarray(train(batch) - train(changed)))[:, :8].max()
  assert (moved > 1e-3) == (routing == "expert_choice")
  if routing == "token_choice":
    full = mor.forward(model, params, batch, len(mor.submodels(model)) - 1).logits
    np.testing.assert_allclose(train(batch), full, rtol=1e-4, atol=1e-5)


def padded(batch, front, length):
  """Rows with other padding after them."""
  rng = np.random.default_rng(9)
  more = {name: np.zeros((len(batch["inputs"]), length), np.int32) for name in batch}
  more["inputs"] = rng.integers(0, 32, more["inputs"].shape, np.int32)
  return {name: jnp.concatenate([jnp.asarray(part)[:, :front], more[name]], axis=1) for name, part in batch.items()}


@every_family
def test_padding_changes_nothing(name):
  """The same length, so one program: what is padding is another thing to the right of fewer real tokens."""
  forward, batch = made(name)[2], document()
  for index in range(number_of(name)):
    plain, _ = forward(batch, index)
    logits, aux = forward(padded(batch, 7, LENGTH - 7), index)
    np.testing.assert_allclose(logits[:, :7], plain[:, :7], rtol=1e-5, atol=1e-5)
    assert aux["capacity/1"][1] == 14


@every_family
def test_packed_documents_are_as_alone(name):
  forward, index = made(name)[2], number_of(name) - 1
  packed = tiny.packed_batch(made(name)[0].config, rows=2, length=LENGTH)
  indices = [index, *([index - 1] if "capacity_scales" in FAMILIES[name] else [])]
  for index in indices:
    logits, _ = forward(packed, index)
    for row in range(2):
      for segment in (1, 2):
        where = np.flatnonzero(packed["segment_ids"][row] == segment)
        alone = padded({k: v[row : row + 1][:, where] for k, v in packed.items()}, len(where), LENGTH - len(where))
        alone = {k: jnp.concatenate([v, v]) for k, v in alone.items()}
        alone["segment_ids"] = (alone["segment_ids"] > 0).astype(jnp.int32)
        np.testing.assert_allclose(forward(alone, index)[0][0, : len(where)], logits[row, where], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["router", "token"])
def test_an_int_and_a_traced_index_are_the_same_sub_model(name):
  model, params, forward = made(name)
  packed = tiny.packed_batch(model.config, rows=2, length=LENGTH)
  for index in range(number_of(name)):
    static = mor.forward(model, params, packed, index)
    traced = forward(packed, index)
    real = np.asarray(packed["segment_ids"]) > 0
    np.testing.assert_allclose(np.asarray(static.logits)[real], traced.logits[real], rtol=1e-4, atol=1e-5)
    assert {k: (float(s), float(c)) for k, (s, c) in static.aux.items()} == {
      k: (float(s), float(c)) for k, (s, c) in traced.aux.items()
    }


@pytest.mark.parametrize("settings", [
  dict(kv_cache="recursion_wise", capacities=(0.8, 0.5, 0.3)), dict(kv_cache="shared", gating="additive"),
  dict(kv_cache="hybrid"), dict(kv_cache="recursion_wise", capacity_chunk=4, inference="aux_router"),
], ids=str)  # fmt: skip
def test_the_gathered_form_is_the_masked_one_with_top_k(settings):
  model = build(**settings, sharing="cycle")
  params, batch = tiny.random_params(model, seed=1), tiny.packed_batch(model.config, rows=2, length=LENGTH)
  chunks = LENGTH // model.method.capacity_chunk if model.method.capacity_chunk else 1
  capacities = capacity_tokens(model.method, LENGTH)

  @jax.jit
  def both(batch):
    choose = causal.top_k(capacities, chunks)
    masked, keeps = models.causal_logits(model, params, batch, causal.Rule(3), choose)
    gathered, _, _ = models.training_logits(model, params, batch, None, jax.random.key(0), jnp.int32(0))
    return masked, gathered, jnp.stack(keeps)

  masked, gathered, keeps = both(batch)
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(gathered)[real], np.asarray(masked)[real], rtol=1e-4, atol=2e-5)
  if chunks == 1:
    np.testing.assert_array_equal(np.sum(keeps, axis=2), [np.minimum(c, real.sum(axis=1)) for c in capacities])


def test_with_all_tokens_and_additive_gating_each_recursion_adds_the_block_of_the_stream():
  model = build(capacities=(1.0,) * 3, gating="additive")
  params, batch = tiny.random_params(model, seed=1), tiny.packed_batch(model.config, rows=2, length=LENGTH)
  train = jax.jit(lambda b: models.training_logits(model, params, b, None, jax.random.key(0), jnp.int32(0))[0])

  @jax.jit
  def closed(batch):
    x, context = model.apply({"params": params}, batch, method="embed")

    def run(x, layer):
      weights = jax.tree.map(lambda leaf: leaf[layer], params["layers"])
      return Block(model.config).apply({"params": weights}, x, context)[0]

    x = run(x, 0)
    for _ in range(3):
      x = x + run(x, 1)
    return model.apply({"params": params}, run(x, 2), method="head")

  np.testing.assert_allclose(train(batch), closed(batch), rtol=1e-4, atol=1e-5)
  full = len(mor.submodels(model)) - 1
  logits, aux = jax.jit(lambda b: mor.forward(model, params, b, full))(batch)
  real = np.asarray(batch["segment_ids"]) > 0
  expected = np.asarray(closed(batch))[real]
  np.testing.assert_allclose(np.asarray(logits)[real], expected, rtol=1e-4, atol=1e-5, err_msg="all pass")
  assert all(total == count for total, count in aux.values())


def test_a_random_router_decides_alike_each_time_and_its_training_scores_follow_the_key():
  model, params, forward = made("random")
  batch, last = document(), number_of("random") - 1
  np.testing.assert_array_equal(forward(batch, last).logits, forward(batch, last).logits)
  assert "router" not in params
  train = jax.jit(lambda key: models.training_logits(model, params, batch, None, key, jnp.int32(0))[0])
  first = train(jax.random.key(1))
  np.testing.assert_array_equal(train(jax.random.key(1)), first)
  assert np.abs(train(jax.random.key(2)) - first).max() > 1e-3

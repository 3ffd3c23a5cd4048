"""What Mixture-of-Depths refuses, its layers and sub-models, what they cost, and what a diagnosis says of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.config import ConfigError
from adaptive.methods.depth import mixture_of_depths as mod

CONFIG = tiny.model_config(num_heads=4, d_ff=16, vocab_size=16)


def build(config=CONFIG, **settings):
  return mod.build(config, mod.Config(**settings))


@pytest.mark.parametrize(("settings", "message"), [
  (dict(every=0), "method.every=0 must be at least 1"),
  (dict(every=5), "method.every=5 routes none of the model.num_layers=4 layers"),
  *((dict(routed=r), f"method.routed={r} must increase and lie in 0..3") for r in ((3, 1), (1, 1), (-1, 2), (1, 4))),
  *((dict(capacity=c), f"method.capacity={c} must be more than 0 and at most 1") for c in (0.0, 1.5, float("nan"))),
  (dict(capacity_chunk=-1), "method.capacity_chunk=-1 must be at least 0"),
  (dict(capacity_multiple=0), "method.capacity_multiple=0 must be at least 1"),
  (dict(router_loss=-1.0), "method.router_loss=-1.0 must be at least 0"),
  (dict(gate="none", inference="predictor"), "method.gate='none' needs method.inference='router'"),
  (dict(gate="none", router_loss=0.0), "nothing else trains the routers"),
  *((dict(score_shifts=s), "must be finite and differ from each other and from 0, the full model's") for s in (
    (0.5, 0.5), (0.0,), (float("inf"),))),
  *((dict(capacity_scales=s), "must differ from each other and lie in (0, 1]") for s in ((0.5, 0.5), (0.0,), (1.1,))),
], ids=str)  # fmt: skip
def test_an_impossible_setting_is_refused_in_one_line(settings, message):
  with pytest.raises(ConfigError) as error:
    build(**settings)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_row_that_does_not_divide_into_chunks_is_refused():
  model = build(capacity_chunk=4)
  for refused in (lambda: model.method.tokens(10), lambda: mod.update_flops(model, (0,), 10)):
    with pytest.raises(ConfigError, match="data.seq_len=10 is not divisible by method.capacity_chunk=4"):
      refused()


@pytest.mark.parametrize(("settings", "layers"), [
  (dict(), (1, 3, 5)), (dict(every=1), (0, 1, 2, 3, 4, 5, 6)), (dict(every=3), (2, 5)), (dict(every=7), (6,)),
  (dict(routed=(0, 4)), (0, 4)),
], ids=str)  # fmt: skip
def test_the_last_of_every_few_layers_is_routed_or_those_listed(settings, layers):
  model = build(tiny.model_config(num_layers=7), **settings)
  assert model.routed == layers
  params = nn.unbox(tiny.shapes(model))
  assert {len(leaf) for leaf in jax.tree.leaves(params["layers"])} == {7}
  assert params["routers"]["weight"].shape == (len(layers), 16, 1)


def test_sub_models_are_shifts_scales_and_last_the_threshold_as_trained():
  model = build(score_shifts=(0.5, -0.5), capacity_scales=(0.25,))
  names = ["score_shift=0.5", "score_shift=-0.5", "capacity_scale=0.25", "score_shift=0.0"]
  assert [s.name for s in mod.submodels(model)] == names
  assert mod.sample(model, 0, 7) == (3,)
  assert mod.decoder(model, tiny.random_params(model), mod.submodels(model)[0]).params["routers"]["weight"].dtype == (
    jnp.float32
  )


def by_hand(tokens, length, inference):
  """Forward FLOPs of a row, product by product, of layers that compute so many tokens, each seeing (n + 1) / 2 keys."""
  total = 0
  for n in tokens:
    total += 2 * n * 16 * (4 * 4 + 2 * 4 + 2 * 4 + 4 * 4)  # queries, keys, values, output
    total += 3 * 2 * n * 16 * 16
    total += 2 * 2 * n * (n + 1) / 2 * 4 * 4
    if n < length:
      total += 2 * length * 16 + (2 * length * (16 * 2 + 2) if inference == "predictor" else 0)
  return total + 2 * length * 16 * 16


@pytest.mark.parametrize("inference", ["router", "predictor"])
def test_costs_are_those_counted_by_hand(inference):
  length, model = 60, build(capacity=0.2, inference=inference, capacity_scales=(0.5,))
  half, full = mod.submodels(model)
  expected = by_hand((60, 12, 60, 12), length, inference)
  nominal = mod.cost(model, full, length, {})
  assert nominal.flops_per_token == pytest.approx(expected / length)
  assert mod.update_flops(model, (1,), length) == pytest.approx(3 * expected / length)
  assert mod.cost(model, half, length, {}).flops_per_token == pytest.approx(
    by_hand((60, 6, 60, 6), length, inference) / length
  )
  realised = {f"capacity/{layer}": (np.float32(n * 5), np.float32(length * 5)) for layer, n in ((1, 30), (3, 3))}
  found = mod.cost(model, full, length, realised)
  assert found.flops_per_token == pytest.approx(by_hand((60, 30, 60, 3), length, inference) / length)
  per_layer = 2 * 2 * 4 * 4
  assert (nominal.kv_bytes_per_token, found.kv_bytes_per_token) == (round(2.4 * per_layer), round(2.55 * per_layer))


@pytest.mark.parametrize("inference", ["router", "predictor"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_all_counted(inference, tied):
  model = build(tiny.model_config(tied_embeddings=tied), inference=inference)
  params, found = nn.unbox(tiny.shapes(model)), mod.cost(model, mod.submodels(model)[-1], 16, {})
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert found.params_total == size(params)
  assert found.params_non_embedding == size(params) - size(params["embedding"])
  assert found.params_active == size(params) - (0 if tied else size(params["embedding"]["table"]))


@pytest.mark.parametrize("settings", [dict(), dict(inference="predictor", capacity_chunk=16)], ids=str)
def test_a_training_pass_computes_no_more_than_its_tokens(settings):
  """By XLA's own count of the unrolled program; with all tokens computed and masked it would be far off."""
  config = tiny.model_config(
    vocab_size=256, num_layers=4, d_model=128, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=32, scan_unroll=4
  )
  rows, length, share = 2, 64, 0.25
  model = build(config, **settings, capacity=share)
  params, batch = nn.unbox(tiny.shapes(model)), tiny.one_document(config, rows, length)
  loss = lambda p, b: mod.loss(model, p, b, (0,), jax.random.key(0), 0)[0]
  count = lambda program: jax.jit(program).lower(params, batch).compile().cost_analysis()["flops"] / (rows * length)
  # XLA computes all scores where a causal mask leaves half.
  scores = lambda keys: 4 * (keys - (keys + 1) / 2) * config.num_heads * config.head_size
  masked = 2 * scores(length) + 2 * share * scores(share * length)
  forward = mod.cost(model, mod.submodels(model)[-1], length, {}).flops_per_token
  assert count(loss) == pytest.approx(forward + masked, rel=0.03)
  assert mod.update_flops(model, (0,), length) == pytest.approx(3 * forward)
  assert count(jax.grad(loss)) == pytest.approx(3 * (forward + masked), rel=0.05)
  everyone = build(config, **settings, capacity=1.0)
  assert count(loss) < 0.7 * mod.cost(everyone, mod.submodels(everyone)[-1], length, {}).flops_per_token


def test_a_dense_model_gives_all_but_the_routers():
  model = build(inference="predictor")
  params, dense = tiny.random_params(model), tiny.random_params(CONFIG, seed=3)
  found = mod.init_from(model, params, dense, "upper", 0)
  tiny.assert_trees_equal(found, {**dense, "routers": params["routers"], "predictors": params["predictors"]})


def test_a_diagnosis_tells_both_losses_and_how_often_the_decisions_agree():
  model = build(capacity=0.4)
  params = tiny.random_params(model, seed=1)
  batches = [tiny.packed_batch(CONFIG, rows=8, length=12, seed=seed) for seed in (0, 1)]
  found = mod.diagnose(model, params, batches, tiny.mesh())
  mean = lambda pairs: sum(float(s) for s, _ in pairs) / sum(float(n) for _, n in pairs)
  train = jax.jit(lambda batch: mod.loss(model, params, batch, (0,), jax.random.key(0), 0)[1])
  metrics = [train(batch) for batch in batches]
  assert found["top_k_loss"] == pytest.approx(mean([m["loss"] for m in metrics]), rel=1e-5)
  agreement = (found["agreement/1"] + found["agreement/3"]) / 2
  assert agreement == pytest.approx(mean([m["router_accuracy"] for m in metrics]), rel=1e-5)
  causal = jax.jit(lambda batch: mod.forward(model, params, batch, 0))
  pairs, shares = [], []
  for batch in batches:
    logits, aux = causal(batch)
    chances = np.asarray(jax.nn.log_softmax(logits), np.float64)
    each = -np.take_along_axis(chances, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    real = np.asarray(batch["segment_ids"]) > 0
    pairs.append((each[real].sum(), real.sum()))
    shares.append(aux["capacity/3"])
  assert found["causal_loss"] == pytest.approx(mean(pairs), rel=1e-5)
  assert found["capacity/3"] == pytest.approx(mean(shares))
  assert abs(found["causal_loss"] - found["top_k_loss"]) > 1e-3


def test_routers_that_say_nothing_agree_where_nothing_is_taken():
  """Scores of 0 are not above the threshold; top-k then takes the first tokens of a row."""
  model = build(capacity=0.5)
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG, rows=8, length=12)
  params["routers"]["weight"] *= 0
  found = mod.diagnose(model, params, [batch], tiny.mesh())
  lengths = (np.asarray(batch["segment_ids"]) > 0).sum(axis=1)
  left = (lengths - np.minimum(lengths, 6)).sum() / lengths.sum()
  assert {k: v for k, v in found.items() if "/" in k} == pytest.approx(
    {"capacity/1": 0.0, "capacity/3": 0.0, "agreement/1": left, "agreement/3": left}
  )

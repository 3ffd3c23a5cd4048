"""What Mixture-of-Recursions refuses, its capacities and their warm-up, its sub-models, and what they cost."""

import itertools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from adaptive.config import ConfigError
from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import expert_choice
from adaptive.methods.depth.mixture_of_recursions.config import Config, capacity_tokens, stage_of, warmed

MODEL = tiny.model_config(num_layers=8)
TOKEN = dict(routing="token_choice", gate="softmax")


def build(model=MODEL, **settings):
  return mor.build(model, Config(**settings))


@pytest.mark.parametrize(("settings", "message"), [
  (dict(num_recursions=4), "model.num_layers=8 is not 1 + 4 x J + 1 for method.sharing='middle_cycle'; nearest: "
   "6 and 10"),
  (dict(sharing="cycle"), "nearest: 6 and 9"),
  (dict(gate="softmax"), "method.gate='softmax' needs method.routing='token_choice'"),
  (dict(balance="loss_free"), "method.balance='loss_free' needs method.routing='token_choice'"),
  (dict(TOKEN, gate="tanh"), "method.gate='tanh' needs method.routing='expert_choice'"),
  (dict(TOKEN, router="random"), "method.router='random' needs method.routing='expert_choice'"),
  (dict(TOKEN, inference="aux_router"), "method.inference='aux_router' means nothing to method.routing='token_choice'"),
  (dict(TOKEN, gating="additive"), "method.gating='additive' means nothing to"),
  (dict(TOKEN, warmup_steps=5), "method.warmup_steps=5 means nothing to"),
  (dict(TOKEN, capacity_chunk=4), "method.capacity_chunk=4 means nothing to"),
  (dict(TOKEN, score_shifts=(1.0,)), "method.score_shifts means nothing to method.routing='token_choice'"),
  (dict(TOKEN, capacity_scales=(0.5,)), "method.capacity_scales means nothing to method.routing='token_choice'"),
  (dict(router="random", score_shifts=(0.5,)), "method.router='random' has no threshold to shift"),
  (dict(router="random", inference="aux_router"), "and no aux_router"),
  (dict(alpha=0.0), "method.alpha=0.0 must be more than 0"),
  (dict(temperature=-1.0), "method.temperature=-1.0 must be more than 0"),
  (dict(TOKEN, balance_rate=0.0), "method.balance_rate=0.0 must be more than 0"),
  *(({field: -1}, f"method.{field}=-1 must be at least 0") for field in (
    "router_loss", "z_loss", "balance_loss", "warmup_steps", "balance_warmup_steps", "capacity_chunk")),
  (dict(capacity_multiple=0), "method.capacity_multiple=0 must be at least 1"),
  (dict(warmup_stages=0), "method.warmup_stages=0 must be at least 1"),
  *((dict(recursions=r), "must increase and be fewer than method.num_recursions=3") for r in (
    (2, 1), (1, 1), (0, 1), (1, 3))),
  *((dict(score_shifts=s), "must be finite and differ from each other and from 0, the full model's") for s in (
    (0.5, 0.5), (0.0,), (float("nan"),))),
  *((dict(capacity_scales=s), "must differ from each other and lie in (0, 1]") for s in ((0.5, 0.5), (0.0,), (1.1,))),
  (dict(capacities=(1.0, 0.5)), "method.capacities has 2 entries for 3 recursions"),
  *((dict(capacities=c), f"method.capacities={c} must lie in (0, 1] and not increase") for c in (
    (1.0, 0.5, 0.6), (1.0, 0.5, 0.0), (1.5, 1.0, 1.0))),
  *((dict(s, capacities=(0.9, 0.5, 0.5)), "method.capacities begins with 0.9: method.kv_cache=") for s in (
    dict(kv_cache="shared"), dict(kv_cache="hybrid"), TOKEN)),
], ids=str)  # fmt: skip
def test_an_impossible_setting_is_refused_in_one_line(settings, message):
  with pytest.raises(ConfigError) as error:
    build(**settings)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_row_that_does_not_divide_into_chunks_is_refused():
  with pytest.raises(ConfigError, match="data.seq_len=10 is not divisible by method.capacity_chunk=4"):
    capacity_tokens(Config(capacity_chunk=4), 10)


@pytest.mark.parametrize(("settings", "length", "tokens"), [
  (dict(), 2048, (2048, 1365, 682)),
  (dict(), 256, (256, 170, 85)),
  (dict(num_recursions=4), 100, (100, 75, 50, 25)),
  (dict(capacities=(0.7, 0.7, 0.001)), 100, (70, 70, 1)),
  (dict(capacity_chunk=4, capacities=(1.0, 0.6, 0.1)), 12, (12, 9, 3)),
  (dict(capacity_multiple=128), 2048, (2048, 1408, 640)),
])  # fmt: skip
def test_capacities_are_shares_of_the_whole_row(settings, length, tokens):
  assert capacity_tokens(Config(**settings), length) == tokens


def test_the_warm_up_falls_in_stages_along_half_a_cosine_to_the_capacities():
  config = Config(warmup_steps=100, warmup_stages=5, capacities=(1.0, 0.5, 0.2))
  model = build(warmup_steps=100, warmup_stages=5, capacities=(1.0, 0.5, 0.2))
  choices = [mor.sample(model, 0, step) for step in range(120)]
  assert choices == [(step // 20,) for step in range(100)] + [(5,)] * 20
  assert [stage_of(config, step) for step in (0, 19, 20, 99, 100, 5000)] == [0, 0, 1, 4, None, None]
  stages = [warmed(config, stage) for stage in range(5)]
  for stage, shares in enumerate(stages):
    rest = 0.5 * (1 + math.cos(math.pi * (20 * stage + 10) / 100))
    np.testing.assert_allclose(shares, [1.0, 0.5 + 0.5 * rest, 0.2 + 0.8 * rest])
  counts = [capacity_tokens(config, 100, stage) for stage in (*range(5), None)]
  assert counts[-1] == (100, 50, 20)
  for earlier, later in itertools.pairwise(counts):
    assert all(a >= b for a, b in zip(earlier, later))
  assert counts[0][1] > 95
  assert mor.static_choice(model)
  assert not mor.static_choice(build())
  assert mor.sample(build(), 0, 7) == (2,)


def test_a_stage_of_the_warm_up_trains_with_its_own_capacities(monkeypatch):
  model = build(warmup_steps=10, warmup_stages=2, capacities=(1.0, 0.5, 0.25))
  params, batch, used = nn.unbox(tiny.shapes(model)), tiny.one_document(MODEL, 2, 16), []
  recur = expert_choice.recur
  monkeypatch.setattr(expert_choice, "recur", lambda *args: used.append(args[4]) or recur(*args))
  for choice in ((0,), (1,), (2,)):
    jax.eval_shape(lambda p, c=choice: mor.loss(model, p, batch, c, jax.random.key(0), 0)[0], params)
  rest = [0.5 * (1 + math.cos(math.pi * done)) for done in (0.25, 0.75, 1)]
  assert used == [(16, math.floor(16 * (0.5 + 0.5 * r)), math.floor(16 * (0.25 + 0.75 * r))) for r in rest]


def test_sub_models_are_fewer_recursions_shifts_scales_and_last_the_full_one():
  model = build(score_shifts=(0.5, -0.5), capacity_scales=(0.5,))
  assert [s.name for s in mor.submodels(model)] == [
    "recursions=1", "recursions=2", "recursions=3,score_shift=0.5", "recursions=3,score_shift=-0.5",
    "recursions=3,capacity_scale=0.5", "recursions=3",
  ]  # fmt: skip
  assert [s.name for s in mor.submodels(build(recursions=(2,)))] == ["recursions=2", "recursions=3"]


@pytest.mark.parametrize("settings", [
  dict(), dict(router="mlp", inference="aux_router"), dict(router="wide_mlp"), dict(router="random"), TOKEN,
  dict(TOKEN, router="mlp", balance="loss_free"), dict(TOKEN, router="wide_mlp"), dict(sharing="cycle", layers=6),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_unique_layers_and_the_routers(settings, tied):
  settings = dict(settings)
  config = tiny.model_config(num_layers=settings.pop("layers", 8), tied_embeddings=tied)
  model = build(config, **settings)
  params = nn.unbox(tiny.shapes(model))
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  found = mor.cost(model, mor.submodels(model)[-1], 16, {})
  assert found.params_total == size(params)
  assert found.params_non_embedding == size(params) - size(params["embedding"])
  assert found.params_active == size(params) - (0 if tied else size(params["embedding"]["table"]))
  unique = {len(leaf) for leaf in jax.tree.leaves(params["layers"])}
  assert unique == {2 if model.method.sharing == "cycle" else 4}, "attention, feed-forward and norms are all shared"
  dense = nn.unbox(tiny.shapes(tiny.model_config(num_layers=unique.pop(), tied_embeddings=tied)))
  routers = sum(size(params.get(name, {})) for name in ("router", "aux_router"))
  assert size(params) == size(dense) + routers


def hand_count(config, method, tokens, queries_of_all):
  """Forward FLOPs of a whole row, product by product; recursion r computes tokens[r], each of n tokens seeing (n+1)/2.

  Args:
    queries_of_all: whether chosen tokens see keys of the whole row.
  """
  row, d, h = tokens[0], config.d_model, config.head_size
  projections = lambda n, outputs: 2 * n * d * outputs
  total = 0
  for r, n in [(None, row), *enumerate(tokens), (None, row)]:
    for _ in range(1 if r is None else 2):
      total += 2 * projections(n, config.num_heads * h)
      if not (r and method.kv_cache == "shared"):
        total += 2 * projections(n, config.num_kv_heads * h)
      total += 3 * projections(n, config.d_ff)
      keys = row if r is None or queries_of_all else n
      total += 2 * 2 * n * (keys + 1) / 2 * config.num_heads * h
  total += projections(row, config.vocab_size)
  if method.routing == "token_choice":
    return total + projections(row, 3)
  candidates = [row, *tokens[:-1]]
  return total + (2 if method.inference == "aux_router" else 1) * sum(projections(n, 1) for n in candidates)


@pytest.mark.parametrize("kv_cache", ["recursion_wise", "shared", "hybrid"])
@pytest.mark.parametrize("settings", [dict(), dict(inference="aux_router"), TOKEN], ids=str)
def test_flops_are_those_counted_by_hand(kv_cache, settings):
  length, tokens = 60, (60, 42, 12)
  model = build(**settings, kv_cache=kv_cache, capacities=(1.0, 0.7, 0.2))
  full = mor.submodels(model)[-1]
  expected = hand_count(MODEL, model.method, tokens, kv_cache != "recursion_wise") / length
  nominal = mor.cost(model, full, length, {})
  assert nominal.flops_per_token == pytest.approx(expected)
  assert mor.update_flops(model, (2,), length) == pytest.approx(3 * expected)
  realised = {f"capacity/{r}": (np.float32(n * 5), np.float32(length * 5)) for r, n in enumerate(tokens, 1)}
  assert mor.cost(model, mor.submodels(model)[0], length, realised).flops_per_token == pytest.approx(expected)
  copies = {"recursion_wise": 1.9, "shared": 1, "hybrid": 3}[kv_cache]
  per_layer = 2 * MODEL.num_kv_heads * MODEL.head_size * 4
  assert nominal.kv_bytes_per_token == round((2 + 2 * copies) * per_layer)


def test_fewer_recursions_and_a_scale_cost_less():
  model = build(capacity_scales=(0.5,))
  one, two, half, full = (mor.cost(model, s, 64, {}) for s in mor.submodels(model))
  assert one.flops_per_token < two.flops_per_token < full.flops_per_token
  assert half.flops_per_token < full.flops_per_token
  assert one.params_total == full.params_total


@pytest.mark.parametrize("settings", [
  dict(), dict(kv_cache="shared"), dict(kv_cache="hybrid", inference="aux_router"),
], ids=str)  # fmt: skip
def test_flops_agree_with_those_that_xla_counts_of_a_training_pass(settings):
  config = tiny.model_config(
    vocab_size=256, num_layers=5, d_model=128, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=32, scan_unroll=8
  )
  model = build(config, **settings, capacities=(1.0, 0.5, 0.25))
  rows, length, shares = 2, 64, (1.0, 0.5, 0.25)
  params, batch = nn.unbox(tiny.shapes(model)), tiny.one_document(config, rows, length)
  loss = lambda p, b: mor.loss(model, p, b, (2,), jax.random.key(0), 0)[0]
  found = jax.jit(loss).lower(params, batch).compile().cost_analysis()["flops"] / (rows * length)
  # XLA computes all scores where a causal mask leaves half; keys are as many as the recursion's, or the row's.
  alone = model.method.kv_cache == "recursion_wise"
  seen = [(share, share * length if alone else length) for share in shares] + 2 * [(1.0, length)]
  masked = sum(share * (keys - (keys + 1) / 2) for share, keys in seen)
  expected = mor.cost(model, mor.submodels(model)[-1], length, {}).flops_per_token
  assert found == pytest.approx(expected + 4 * masked * config.num_heads * config.head_size, rel=0.03)


def test_a_dense_model_gives_its_layers_and_all_but_the_routers():
  model = build(inference="aux_router")
  params, dense = tiny.random_params(model), tiny.random_params(MODEL, seed=3)
  found = mor.init_from(model, params, dense, "upper", 0)
  picked = np.array([0, 5, 6, 7])  # 1 + 3 x 2 + 1: the ends, and the two before the last
  tiny.assert_trees_equal(found["layers"], jax.tree.map(lambda leaf: leaf[picked], dense["layers"]))
  for name in ("embedding", "final_norm"):
    tiny.assert_trees_equal(found[name], dense[name])
  for name in ("router", "aux_router"):
    tiny.assert_trees_equal(found[name], params[name])

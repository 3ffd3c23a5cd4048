import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_routers
import tiny
from routed import LAYERS, LENGTH, MODEL, assert_close, built, fixed_params, forward, questions, sizes, varied_params

from adaptive import losses
from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.methods.depth import dr_llm
from adaptive.methods.depth.dr_llm import router, running


@pytest.mark.parametrize("split", ["even", "paper"])
@pytest.mark.parametrize("number", [1, 3, 8])
def test_windows_are_those_of_the_reference(split, number):
  tokens = np.array([1, 2, 7, 8, 9, 15, 16, 23])
  prompt = jnp.arange(24)[None] < jnp.asarray(tokens)[:, None]
  found = router.windows(prompt, number, split)
  for row, size in enumerate(tokens):
    wanted = slow_routers.window_tokens(size, number, split)
    weights = np.zeros((number, 24))
    for which, members in enumerate(wanted):
      weights[which, members] = 1 / len(members)
    np.testing.assert_allclose(found.weights[row], weights, rtol=1e-6)
    share = np.where(np.arange(number) < len(wanted), 1 / len(wanted), 0.0)
    np.testing.assert_allclose(found.share[row], share, rtol=1e-6)


def test_the_paper_s_windows_leave_out_the_newest_tokens_and_even_ones_none():
  prompt = jnp.ones((1, 15), bool)
  read = lambda split: np.asarray(router.windows(prompt, 8, split).weights).sum((0, 1)) > 0
  assert read("paper").tolist() == [True] * 8 + [False] * 7
  assert read("even").all()


@pytest.mark.parametrize("split", ["even", "paper"])
@pytest.mark.parametrize("index", [0, 1, 2, np.int32(1)])
def test_rows_are_those_of_the_slow_reference(split, index):
  model = built(split=split)
  params, batch = varied_params(model), questions([1, 2, 3, 7, 10])
  found = forward(model, params, batch, index)
  seen = set()
  for row, (size, prompt) in enumerate(zip(sizes(batch), [1, 2, 3, 7, 10])):
    budget = model.method.budgets[int(index)]
    tokens = batch["inputs"][row, :size]
    wanted, visits = slow_routers.routed(MODEL, params, tokens, prompt, budget, windows=3, split=split)
    np.testing.assert_allclose(found.logits[row, :size], wanted, rtol=1e-4, atol=1e-4)
    seen |= set(visits)
  assert seen == {0, 1, 2}  # or there was nothing to see


def test_a_row_decides_alone():
  model = built()
  params, batch = varied_params(model), questions([2, 5, 9, 4])
  together = forward(model, params, batch, 1).logits
  for row in range(4):
    alone = jax.tree.map(lambda leaf, i=row: leaf[i : i + 1], batch)
    size = sizes(alone)[0]
    np.testing.assert_allclose(forward(model, params, alone, 1).logits[0, :size], together[row, :size], atol=1e-5)


@pytest.mark.parametrize("when", ["once", "per_step"])
def test_what_comes_after_changes_nothing_before(when):
  """The prompt decides for itself as a whole, and nobody reads what it predicts before its last token."""
  model = built(when=when)
  params, batch = varied_params(model), questions([3, 6])
  before = forward(model, params, batch, 1).logits
  for changed in range(3, LENGTH):
    other = {**batch, "inputs": batch["inputs"].at[:, changed].add(1) % MODEL.vocab_size}
    after = forward(model, params, other, 1).logits
    for row, prompt in enumerate((3, 6)):
      if changed >= prompt:
        np.testing.assert_allclose(after[row, prompt - 1 : changed], before[row, prompt - 1 : changed], atol=1e-6)


def test_padding_changes_nothing():
  model = built()
  params, batch = varied_params(model), questions([4, 4, 4])
  longer = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 5))), batch)
  longer["inputs"] = jnp.where(longer["segment_ids"] > 0, longer["inputs"], 7)
  found, padded = (forward(model, params, b, 1).logits for b in (batch, longer))
  for row, size in enumerate(sizes(batch)):
    np.testing.assert_allclose(padded[row, :size], found[row, :size], atol=1e-5)


def test_fresh_routers_execute_everything():
  model = built(budgets=(-0.5, -0.2, 0.3))
  fresh = nn.unbox(init_params(model, jax.random.key(0)))
  params, batch = {**tiny.random_params(model), "routers": fresh["routers"]}, questions([3, 8])
  plain = jax.jit(lambda p: Transformer(MODEL).apply({"params": dr_llm.backbone(p)}, batch))(params)
  for index in range(4):
    assert_close(forward(model, params, batch, index).logits, plain, batch, rtol=1e-5, atol=1e-6)


def test_text_without_a_prompt_runs_the_given_model():
  model, batch = built(), tiny.packed_batch(MODEL)
  params = varied_params(model)
  found = forward(model, params, batch, 1)
  np.testing.assert_array_equal(found.logits, jax.jit(model.apply)({"params": params}, batch))
  assert float(found.aux["layers"][0] / found.aux["layers"][1]) == LAYERS


@pytest.mark.parametrize("budget", [-1.0, -0.8, -0.5, -0.1, 0.5, 0.7, 1.0])
def test_the_dial_is_that_of_the_reference(budget):
  scores = np.random.default_rng(0).normal(size=(200, 3)) * 2
  found = router.decide(jnp.asarray(scores, jnp.float32), router.dial(budget))
  assert found.tolist() == [slow_routers.decide(row, budget) for row in scores]


def test_the_corners_of_the_dial():
  scores = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
  at = lambda budget: set(router.decide(scores, router.dial(budget)).tolist())
  assert (at(-1.0), at(0.5), at(1.0)) == ({0}, {1}, {2})
  np.testing.assert_array_equal(router.decide(scores, router.dial(-0.5)), jnp.argmax(scores, axis=-1))


PLANS = [(1, 1, 1, 1), (0, 2, 1, 0), (2, 2, 2, 2), (0, 0, 1, 2), (2, 0, 0, 1), (0, 0, 0, 0)]


@pytest.mark.parametrize("visits", PLANS)
def test_a_plan_is_the_dense_model_of_its_layers(visits):
  model = built()
  params, batch = fixed_params(model, visits), questions([3, 7])
  found = forward(model, params, batch, 1)
  path = tuple(itertools.chain.from_iterable([layer] * count for layer, count in enumerate(visits)))
  if path:
    part = subnets.Subnet(path, MODEL.q_per_kv, MODEL.d_ff)
    small = subnets.extract(MODEL, dr_llm.backbone(params), part)
    wanted = Transformer(subnets.config_of(MODEL, part)).apply({"params": small}, batch)
    assert_close(found.logits, wanted, batch, rtol=1e-5, atol=1e-5)
  assert float(found.aux["layers"][0] / found.aux["layers"][1]) == sum(visits)


@pytest.mark.parametrize("when", ["once", "per_step"])
@pytest.mark.parametrize("visits", [None, *PLANS])
def test_decoding_after_the_prompt_is_one_shot(when, visits):
  """Prompts of different lengths in one step, then a token at a time, two at once, and one row that has ended."""
  model = built(when=when)
  params = varied_params(model) if visits is None else fixed_params(model, visits)
  prompts = np.array([3, 5, 1])
  batch = questions(prompts)
  batch["segment_ids"] = jnp.ones_like(batch["segment_ids"])
  batch["positions"] = jnp.broadcast_to(jnp.arange(LENGTH), batch["inputs"].shape)
  batch["scored"] = (jnp.arange(LENGTH)[None] >= jnp.asarray(prompts)[:, None] - 1).astype(jnp.int32)
  wanted = forward(model, params, batch, 1).logits
  decoder = dr_llm.decoder(model, params, dr_llm.submodels(model)[1])
  step, cache, lengths = jax.jit(decoder.step), decoder.empty_cache(3, LENGTH), np.zeros(3, int)
  for counts, width in ((prompts, 6), (np.ones(3, int), 1), (np.array([2, 1, 0]), 2), (np.ones(3, int), 1)):
    tokens = np.zeros((3, width), np.int32)
    for row in range(3):
      tokens[row, : counts[row]] = batch["inputs"][row, lengths[row] : lengths[row] + counts[row]]
    logits, cache, _ = step(decoder.params, tokens, counts.astype(np.int32), cache)
    lengths += counts
    for row in np.flatnonzero(counts):
      np.testing.assert_allclose(logits[row], wanted[row, lengths[row] - 1], rtol=1e-4, atol=1e-4)


def test_what_a_prompt_decided_stays():
  model = built()
  params, rng = varied_params(model), np.random.default_rng(0)
  decoder = dr_llm.decoder(model, params, dr_llm.submodels(model)[1])
  prompt = rng.integers(0, MODEL.vocab_size, (4, 5)).astype(np.int32)
  _, cache, _ = decoder.step(decoder.params, prompt, np.full(4, 5, np.int32), decoder.empty_cache(4, 12))
  first = np.asarray(cache.decided)
  for _ in range(3):
    token = rng.integers(0, MODEL.vocab_size, (4, 1)).astype(np.int32)
    _, cache, _ = decoder.step(decoder.params, token, np.ones(4, np.int32), cache)
  np.testing.assert_array_equal(cache.decided, first)
  assert len({tuple(column) for column in first.T}) > 1


def test_per_step_decides_again():
  once, again = (built(when=when) for when in ("once", "per_step"))
  params, batch = varied_params(once), questions([3, 4, 5, 6])
  a, b = (forward(model, params, batch, 1).logits for model in (once, again))
  np.testing.assert_allclose(a[0, 2], b[0, 2], atol=1e-5)  # the prompt's last token: decided by the prompt in both
  assert float(jnp.abs(a - b).max()) > 1e-3


def test_chance_skips_and_repeats_as_often_and_knows_no_token():
  model = built()
  params, rows = varied_params(model), 256
  batch = questions([5] * rows)
  measured = [jax.device_get(forward(model, params, batch, index).aux) for index in range(4)]
  random, indices = dr_llm.at_random(model, measured)
  assert list(indices) == [0, 1, 2, None]
  found = forward(random, params, batch, 1).aux
  for layer in range(LAYERS):
    for kind in ("skipped", "repeated"):
      rate, chance = (float(x[f"{kind}/{layer}"][0] / x[f"{kind}/{layer}"][1]) for x in (measured[1], found))
      assert abs(rate - chance) < 0.12
  routed, by_chance = (forward(m, params, batch, 1).logits for m in (model, random))
  assert float(jnp.abs(routed - by_chance).max()) > 1e-2


def test_chance_tells_prompts_of_the_same_tokens_apart():
  model = built()
  params, rows = varied_params(model), 64
  batch = questions([9] * rows)
  orders = np.stack([np.random.default_rng(row).permutation(9) for row in range(rows)])
  batch["inputs"] = batch["inputs"].at[:, :9].set(orders)
  random = model.clone(chance=(((0.5, 0.0),) * LAYERS,) * 4)
  choose = dr_llm._by_chance(random, params, batch, losses.prompt(batch), 1)
  plans = np.stack([choose(layer, None, None)[:, 0] for layer in range(LAYERS)], axis=1)
  skipped = set(map(tuple, plans.tolist()))
  assert len(skipped) > 8


def test_costs_are_of_the_layers_that_ran():
  model = built()
  params, batch = varied_params(model), questions([5, 6, 7])
  full, dial = dr_llm.submodels(model)[-1], dr_llm.submodels(model)[1]
  realised = jax.device_get(forward(model, params, batch, 1).aux)
  layers = realised["layers"][0] / realised["layers"][1]
  dense, found = dr_llm.cost(model, full, 16, {}), dr_llm.cost(model, dial, 16, realised)
  head = 2 * MODEL.vocab_size * MODEL.d_model
  per_layer = (dense.flops_per_token - head) / LAYERS
  assert found.flops_per_token == pytest.approx(head + layers * per_layer + dr_llm.router_flops(model, 16))
  total = sum(found[f"skipped/{i}"][0] - found[f"repeated/{i}"][0] for found in [realised] for i in range(LAYERS))
  assert layers == pytest.approx(LAYERS - total / realised["layers"][1])


def test_padding_makes_no_visit(monkeypatch):
  """Rows of padding fill up batches; what their routers would say costs nothing."""
  calls = []
  visit = running.parts.one_shot

  def counted(*arguments):
    jax.debug.callback(lambda: calls.append(1))
    return visit(*arguments)

  monkeypatch.setattr(running.parts, "one_shot", counted)
  model, batch = built(), questions([4, 4])
  params = fixed_params(model, (1, 1, 1, 1))
  forward(model, params, jax.tree.map(jnp.zeros_like, batch), 1)
  jax.effects_barrier()
  assert not calls
  forward(model, params, batch, 1)
  jax.effects_barrier()
  assert len(calls) == LAYERS


@pytest.mark.parametrize("index", [0, 2])
def test_each_budget_decodes_as_itself(index):
  model = built(budgets=(-0.9, -0.5, 0.3))
  params, batch = varied_params(model), questions([6])
  tokens = batch["inputs"][:, :6]
  decoder = dr_llm.decoder(model, params, dr_llm.submodels(model)[index])
  logits, _, aux = decoder.step(decoder.params, tokens, np.array([6], np.int32), decoder.empty_cache(1, 8))
  wanted = forward(model, params, batch, index)
  np.testing.assert_allclose(logits[0], wanted.logits[0, 5], rtol=1e-4, atol=1e-4)
  other = forward(model, params, batch, 1).logits[0, 5]
  assert float(jnp.abs(logits[0] - other).max()) > 1e-3, "another budget would be told apart"
  layers = lambda found: float(found["layers"][0] / found["layers"][1])
  assert layers(aux) == layers(wanted.aux)


def test_chance_has_the_rates_of_its_own_budget():
  model = built()
  params, batch = tiny.random_params(model), questions([5] * 128)
  rates = tuple(((skip, 0.0),) * LAYERS for skip in (1.0, 0.5, 0.0, 0.0))
  found = [forward(model.clone(chance=rates), params, batch, index).aux for index in range(3)]
  shares = [float(one["skipped/2"][0] / one["skipped/2"][1]) for one in found]
  assert (shares[0], shares[2]) == (1.0, 0.0)
  assert 0.3 < shares[1] < 0.7


def test_the_full_model_executes_everything_under_a_traced_index_too():
  model = built()
  params, batch = fixed_params(model, (0, 2, 0, 2)), questions([5, 8])
  plain, traced = (forward(model, params, batch, index).logits for index in (3, np.int32(3)))
  assert_close(traced, plain, batch, rtol=1e-5, atol=1e-5)


def test_deciding_at_every_token_costs_a_router_at_every_token():
  once, again = (dr_llm.router_flops(built(when=when), 256) for when in ("once", "per_step"))
  assert again == LAYERS * 2 * (16 * 8 + 8 * 3) > once

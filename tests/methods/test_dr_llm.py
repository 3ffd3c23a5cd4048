import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slow_routers
import tiny

from adaptive import losses
from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ConfigError, TrainingConfig
from adaptive.methods.depth import dr_llm
from adaptive.methods.depth.dr_llm import objective, router, running

MODEL = tiny.model_config()
LAYERS = MODEL.num_layers
LENGTH = 14


def built(config=MODEL, **settings):
  settings = {"hidden": 8, "windows": 3, "budgets": (-0.6, -0.5, -0.4), **settings}
  return dr_llm.build(config, dr_llm.Config(**settings))


def varied_params(model, seed=0):
  """Routers that decide differently for different prompts."""
  params = tiny.random_params(model, seed)
  routers = params["routers"]
  return {**params, "routers": {**routers, "weight": 12 * routers["weight"], "bias": 0.2 * routers["bias"]}}


def fixed_params(model, visits, seed=0):
  """Routers that decide one and the same, whatever they read."""
  params = tiny.random_params(model, seed)
  routers = params["routers"]
  bias = 9.0 * jax.nn.one_hot(jnp.asarray(visits), 3)
  return {**params, "routers": {**routers, "weight": jnp.zeros_like(routers["weight"]), "bias": bias}}


def questions(prompts, length=LENGTH, seed=0, config=MODEL):
  """Rows whose prompts have so many tokens, with answers of different lengths behind them, then padding."""
  rng, rows = np.random.default_rng(seed), len(prompts)
  sizes = np.minimum(np.array(prompts) + 2 + np.arange(rows) % 3, length)
  place = np.arange(length)[None]
  real, scored = place < sizes[:, None], place >= np.array(prompts)[:, None] - 1
  tokens = rng.integers(0, config.vocab_size, (2, rows, length)).astype(np.int32)
  batch = {
    "inputs": np.where(real, tokens[0], 0),
    "targets": np.where(real, tokens[1], 0),
    "segment_ids": real.astype(np.int32),
    "positions": np.where(real, place, 0).astype(np.int32),
    "scored": (real & scored).astype(np.int32),
  }
  return jax.tree.map(jnp.asarray, batch)


def forward(model, params, batch, index):
  return jax.jit(lambda p, b: dr_llm.forward(model, p, b, index))(params, batch)


def assert_close(found, wanted, batch, **tolerance):
  """Logits [b, t, v] of real tokens; those of padding mean nothing."""
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], **tolerance)


def sizes(batch):
  return np.asarray(batch["segment_ids"]).sum(1)


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


def labelled(prompts, seed=0):
  batch = questions(prompts, seed=seed)
  return {**batch, **{k: v for k, v in tiny.labels(MODEL, batch, seed).items() if k != "scored"}}


def test_training_runs_the_labels_path_and_each_router_reads_what_enters_there():
  model = built(gamma=0.0, beta=0.0)
  params, batch = varied_params(model), labelled([3, 6, 9])
  total, metrics = jax.jit(lambda p: dr_llm.loss(model, p, batch, (3,), jax.random.key(0), 0))(params)
  routers, wanted = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["routers"]), []
  for row, prompt in enumerate((3, 6, 9)):
    labels = np.asarray(batch["visits"][row])

    def choose(layer, stream, labels=labels):
      own = {name: leaf[layer] for name, leaf in routers.items()}
      logits = slow_routers.logits(own, stream, 3, "even")
      wanted.append(np.log(np.sum(np.exp(logits))) - logits[labels[layer]])
      return int(labels[layer])

    slow_routers.row(MODEL, params, batch["inputs"][row, : sizes(batch)[row]], prompt, choose)
  np.testing.assert_allclose(float(total), np.mean(wanted), rtol=1e-4)
  assert float(metrics["loss"][1]) == 3 * LAYERS
  assert float(metrics["always_execute"][0]) == int((batch["visits"] == 1).sum())
  free = built(gamma=0.0, beta=0.0, teacher_forcing=False)
  other, _ = dr_llm.loss(free, params, batch, (3,), jax.random.key(0), 0)
  assert abs(float(other) - float(total)) > 1e-3


def test_only_routers_have_a_gradient():
  model = built()
  params, batch = varied_params(model), labelled([3, 6, 9])
  grads = jax.grad(lambda p: dr_llm.loss(model, p, batch, (3,), jax.random.key(0), 0)[0])(params)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(dr_llm.backbone(grads)))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["routers"]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_and_its_gradient(gamma):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(40, 3)) * 4, rng.integers(0, 3, 40)
  weights = np.array([0.7, 0.3, 2.0])

  def formula(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True))[np.arange(40), labels]
    return np.sum(-weights[labels] * (1 - p) ** gamma * np.log(p))

  run = lambda x: jnp.sum(objective.focal(x, jnp.asarray(labels), jnp.asarray(weights, jnp.float32), gamma))
  value, grads = jax.value_and_grad(run)(jnp.asarray(logits, jnp.float32))
  np.testing.assert_allclose(float(value), formula(logits), rtol=1e-5)
  for place in [(0, 0), (3, 1), (17, 2)]:
    moved = np.zeros_like(logits)
    moved[place] = 1e-5
    slope = (formula(logits + moved) - formula(logits - moved)) / 2e-5
    np.testing.assert_allclose(float(grads[place]), slope, rtol=2e-3, atol=1e-5)


def test_focal_loss_of_a_certain_router_is_finite():
  run = lambda x: jnp.sum(objective.focal(x, jnp.array([0]), jnp.ones(3), 0.5))
  value, grads = jax.value_and_grad(run)(jnp.array([[200.0, 0.0, 0.0]]))
  assert np.isfinite(float(value))
  assert np.isfinite(grads).all()


@pytest.mark.parametrize(
  ("beta", "wanted"),
  [(0.999, (0.916, 0.905, 1.179)), (0.9999, (0.754, 0.268, 1.978)), (0.99999, (0.743, 0.046, 2.211))],
)
def test_class_weights_of_the_paper_s_counts(beta, wanted):
  found = objective.class_weights(jnp.array([4399, 120956, 1457]), beta)
  np.testing.assert_allclose(found, wanted, atol=6e-4)


def test_a_class_without_labels_weighs_nothing():
  np.testing.assert_allclose(objective.class_weights(jnp.array([0, 1000, 0]), 0.999), (0, 1, 0), rtol=1e-6)
  np.testing.assert_allclose(objective.class_weights(jnp.array([5, 1000, 2]), 0.0), (1, 1, 1), rtol=1e-6)


def test_routers_learn_which_layer_a_token_names():
  """The prompt's first token says which layer is skipped, and which is run twice."""
  model = built(hidden=32, windows=8)
  params, rows = tiny.random_params(model), 96
  params["routers"] = jax.tree.map(lambda leaf: 0.3 * leaf, params["routers"])
  batch = questions([6] * rows, seed=3)
  names = np.arange(rows) % LAYERS
  visits = np.ones((rows, LAYERS), np.int32)
  visits[np.arange(rows), names], visits[np.arange(rows), (names + 1) % LAYERS] = 0, 2
  counts = np.broadcast_to(np.bincount(visits.ravel()).astype(np.int32), (rows, 3))
  batch = {**batch, "inputs": batch["inputs"].at[:, 0].set(names), "visits": jnp.asarray(visits)}
  batch["label_counts"] = jnp.asarray(counts)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def update(routers, state):
    run = lambda r: dr_llm.loss(model, {**params, "routers": r}, batch, (3,), jax.random.key(0), 0)
    grads, metrics = jax.grad(run, has_aux=True)(routers)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(routers, updates), state, metrics

  routers, state = params["routers"], optimizer.init(params["routers"])
  for _ in range(150):
    routers, state, metrics = update(routers, state)
  assert float(metrics["router_accuracy"][0] / metrics["router_accuracy"][1]) == 1.0
  assert float(metrics["always_execute"][0] / metrics["always_execute"][1]) == 0.5
  # Without anyone's help the routers run those paths, too.
  found = forward(model, {**params, "routers": routers}, batch, 1).aux
  for layer in range(LAYERS):
    tokens = np.asarray(batch["segment_ids"]).sum(1)
    assert float(found[f"skipped/{layer}"][0]) == tokens[visits[:, layer] == 0].sum()
    assert float(found[f"repeated/{layer}"][0]) == tokens[visits[:, layer] == 2].sum()


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


def test_an_update_is_the_layers_once_and_three_times_the_routers():
  """By hand: d_model 16, 6 heads of size 4, two key/value heads, d_ff 24; 3 windows, hidden 8, 12 tokens."""
  matrices = 2 * 16 * 24 + 2 * 16 * 8 + 3 * 16 * 24
  layer = 2 * matrices + 4 * 6.5 * 24
  own = 3 * 2 * (16 * 8 + 8 * 3) / 12 + 3 * 2 * 16
  assert dr_llm.update_flops(built(), (3,), 12) == pytest.approx(LAYERS * (layer + 3 * own))


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


def test_training_asks_for_the_focal_loss_its_weights_and_the_split():
  """Each of them is what the settings say, and changes the loss."""
  params, batch = varied_params(built()), labelled([5, 7, 10])
  run = lambda model: float(dr_llm.loss(model, params, batch, (3,), jax.random.key(0), 0)[0])
  seen, logits = {}, None
  for gamma, beta, split in itertools.product((0.0, 2.0), (0.0, 0.9), ("even", "paper")):
    model = built(gamma=gamma, beta=beta, split=split)
    cut = router.windows(losses.prompt(batch), 3, split)
    logits = dr_llm._training_logits(model, params, batch, cut, batch["visits"].T)
    weights = objective.class_weights(batch["label_counts"][0], beta)
    seen[gamma, beta, split] = run(model)
    wanted = jnp.mean(objective.focal(logits, batch["visits"].T, weights, gamma))
    assert seen[gamma, beta, split] == pytest.approx(float(wanted), rel=1e-5)
  assert len(set(seen.values())) == len(seen)


def test_without_teacher_forcing_training_runs_the_likeliest():
  model = built(teacher_forcing=False)
  params, batch = varied_params(model), labelled([5, 7, 10])
  prompt = losses.prompt(batch)
  cut = router.windows(prompt, 3, "even")
  logits = dr_llm._training_logits(model, params, batch, cut, batch["visits"].T)
  ran = forward(model, params, batch, 1).aux  # at -0.5 inference does so, too
  found = jnp.argmax(logits, axis=-1)
  for layer in range(LAYERS):
    skipped = jnp.sum(batch["segment_ids"] * (found[layer] == 0)[:, None])
    assert float(ran[f"skipped/{layer}"][0]) == float(skipped)


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


def test_the_paper_s_start_is_xavier_s():
  model = built(start="xavier", hidden=64)
  fresh = nn.unbox(init_params(model, jax.random.key(0)))["routers"]
  assert not np.any(fresh["bias"])
  assert not np.any(fresh["hidden_bias"])
  for name, inputs, outputs in (("hidden", MODEL.d_model, 64), ("weight", 64, 3)):
    bound = (6 / (inputs + outputs)) ** 0.5
    assert 0.9 * bound < float(jnp.abs(fresh[name]).max()) <= bound
    assert len(np.unique(fresh[name][:, 0, 0])) == LAYERS, "every layer has its own"


def test_deciding_at_every_token_costs_a_router_at_every_token():
  once, again = (dr_llm.router_flops(built(when=when), 256) for when in ("once", "per_step"))
  assert again == LAYERS * 2 * (16 * 8 + 8 * 3) > once


def test_what_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"method.budgets=\(0.5, -0.5\) must be increasing"):
    dr_llm.Config(budgets=(0.5, -0.5))
  with pytest.raises(ConfigError, match="method.beta=1.0 must be below 1"):
    dr_llm.Config(beta=1.0)
  with pytest.raises(ConfigError, match="training.init_from"):
    dr_llm.check_training(built(), TrainingConfig())
  model = built()
  with pytest.raises(ConfigError, match="set data.source='questions' and data.labels"):
    dr_llm.loss(model, tiny.random_params(model), tiny.packed_batch(MODEL), (3,), jax.random.key(0), 0)

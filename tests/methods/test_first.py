"""FiRST: decisions and logits against the slow executor, decoding in any pieces, gradients of decisions, the budget."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
import slow_visits
import tiny

from adaptive import cost as costs
from adaptive import losses
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ConfigError
from adaptive.depth import prompt_plan, replay, visits
from adaptive.methods import METHODS
from adaptive.methods.depth import first

CONFIG, METHOD = tiny.model_config(num_layers=5, qk_norm=True), METHODS["first"]
PROMPT, THRESHOLDS = 3, (0.3, 0.5, 0.7)
ROUTED = (1, 2, 3)


def built(config=CONFIG, **settings):
  return METHOD.build(config, METHOD.Config(**{"prompt_tokens": PROMPT, "thresholds": THRESHOLDS, **settings}))


@functools.cache
def params_of(config=CONFIG):
  """Routers of which some say yes and some no, to some documents."""
  params = tiny.random_params(built(config), seed=3)
  return {**params, "routers": {**params["routers"], "bias": 0.3 * params["routers"]["bias"]}}


def batch_of(rows=4, length=12):
  return tiny.packed_batch(CONFIG, rows=rows, length=length)


@functools.cache
def program(index, prompt=PROMPT):
  model = built(prompt_tokens=prompt)
  return jax.jit(lambda params, batch: METHOD.forward(model, params, batch, index))


def slow_visits_of(config, params, batch, prompt, threshold):
  """Which tokens run which layer, int [l, b, t]: a document after the other, its prompt in models of fewer layers."""
  params = numpy_transformer._as_float64(params)
  segments, positions = np.asarray(batch["segment_ids"]), np.asarray(batch["positions"])
  ran = np.ones((config.num_layers, *segments.shape), np.int32)
  for row, segment in {(r, s) for r, line in enumerate(segments) for s in line}:
    where = np.flatnonzero(segments[row] == segment)[:prompt]
    tokens, at = np.asarray(batch["inputs"])[row, where], positions[row, where]
    later = (segments[row] == segment) & (positions[row] >= prompt)
    for layer in range(1, config.num_layers - 1):
      below = tiny.model_config(num_layers=layer, qk_norm=config.qk_norm)
      everyone = np.ones((layer, len(where)), int)
      enter = slow_visits.streams(below, params, tokens, [1] * len(where), at, everyone, "hole", 1)
      weight, bias = (params["routers"][name][layer - 1] for name in ("weight", "bias"))
      logit = np.mean(enter, axis=0) @ weight[:, 0] + bias
      ran[layer, row, later] = 1 / (1 + np.exp(-logit)) > threshold
  return ran


@functools.cache
def slow(index, prompt=PROMPT):
  return slow_visits_of(CONFIG, params_of(), batch_of(), prompt, THRESHOLDS[index])


@pytest.mark.parametrize(("index", "prompt"), [(0, PROMPT), (1, PROMPT), (2, PROMPT), (1, 1), (1, 5)])
def test_whole_rows_are_the_slow_ones(index, prompt):
  params, batch, ran = params_of(), batch_of(), slow(index, prompt)
  want = slow_visits.logits(CONFIG, params, batch, ran, "hole", 1)
  found = program(index, prompt)(params, batch)
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found.logits)[real], want[real], rtol=5e-5, atol=5e-5)
  number = real.sum()
  assert float(found.aux["layers"][0]) == ran[:, real].sum()
  for layer in ROUTED:
    assert [float(x) for x in found.aux[f"ran/{layer}"]] == [ran[layer][real].sum(), number]


def test_the_decisions_of_these_tests_differ():
  """Teeth: between documents of a layer, between layers of a document, and between thresholds."""
  batch, middle = batch_of(), slow(1)
  later = np.asarray((batch["positions"] >= PROMPT) & (batch["segment_ids"] > 0))
  shares = middle[1:-1][:, later].mean(axis=1)
  assert ((shares > 0) & (shares < 1)).sum() >= 2
  assert slow(0).sum() > middle.sum() > slow(2).sum()


def test_the_decisions_played_again_give_the_same():
  batch = batch_of()
  found = program(1)(params_of(), batch).logits
  again = jax.jit(lambda p, n: replay.one_shot(CONFIG, p, batch, n, "hole"))(params_of(), slow(1))
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found)[real], np.asarray(again)[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["bias", "threshold", "long prompts"])
def test_who_skips_nothing_is_the_plain_model(which):
  params, batch = params_of(), batch_of()
  if which == "bias":
    params = {**params, "routers": jax.tree.map(lambda x: 0 * x + (x.ndim == 1) * 9.0, params["routers"])}
  settings = {"threshold": dict(thresholds=(0.0,)), "long prompts": dict(prompt_tokens=12)}.get(which, {})
  model = built(**settings)
  found = jax.jit(lambda p: METHOD.forward(model, p, batch, 0))(params)
  plain = jax.jit(Transformer(CONFIG).apply)({"params": first.backbone(params)}, batch)
  np.testing.assert_allclose(found.logits, plain, rtol=1e-5, atol=1e-5)
  assert float(losses.mean(found.aux["layers"])) == CONFIG.num_layers


def test_a_layer_is_run_strictly_above_the_threshold():
  params, batch = params_of(), batch_of()
  params = {**params, "routers": jax.tree.map(jnp.zeros_like, params["routers"])}  # probability 0.5, exactly
  model = built(thresholds=(0.4999, 0.5))
  run = jax.jit(lambda index: losses.mean(METHOD.forward(model, params, batch, index).aux["layers"]))
  layers = [float(run(i)) for i in (0, 1)]
  assert layers[0] == CONFIG.num_layers > layers[1]


def scores_and_gates(params, batch):
  model = built()
  return prompt_plan.one_shot(model, params, batch, first.plans(model, 0.5))


def test_what_comes_after_the_prompt_decides_nothing():
  params, batch = params_of(), tiny.one_document(CONFIG, rows=6, length=9)
  run = jax.jit(scores_and_gates)
  logits, gates = run(params, batch)
  for start in (PROMPT, 6):
    changed = {**batch, "inputs": batch["inputs"].at[:, start:].add(1) % CONFIG.vocab_size}
    after, same = run(params, changed)
    np.testing.assert_array_equal(gates, same)
    np.testing.assert_array_equal(logits[:, :start], after[:, :start])
    assert not np.allclose(logits[:, start:], after[:, start:])
  _, other = run(params, {**batch, "inputs": batch["inputs"].at[:, PROMPT - 1].add(1) % CONFIG.vocab_size})
  assert (np.asarray(gates) != np.asarray(other)).any(), "the last token of the prompt does"


@pytest.mark.parametrize("changed", [1, 2])
def test_packed_documents_do_not_see_each_other(changed):
  params, batch = params_of(), batch_of()
  mine = np.asarray(batch["segment_ids"]) == changed
  other = {**batch, "inputs": jnp.where(mine, (batch["inputs"] + 5) % CONFIG.vocab_size, batch["inputs"])}
  a, b = (np.asarray(program(1)(params, rows).logits) for rows in (batch, other))
  np.testing.assert_array_equal(a[~mine], b[~mine])
  assert not np.allclose(a[mine], b[mine])


def test_large_and_unordered_segment_ids_are_only_names():
  params, batch = params_of(), batch_of()
  names = jnp.asarray([0, 9000, 17])
  found = [program(1)(params, rows).logits for rows in (batch, {**batch, "segment_ids": names[batch["segment_ids"]]})]
  np.testing.assert_array_equal(*found)


def test_each_row_alone_is_as_in_the_batch():
  params, batch = params_of(), batch_of()
  together = program(1)(params, batch).logits
  for row in range(4):
    alone = program(1)(params, jax.tree.map(lambda x, row=row: x[row : row + 1], batch)).logits
    np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)


@functools.cache
def played(rows=4, length=10):
  """A decoder with its step compiled, tokens, and what one forward pass gives for them."""
  model, params = built(), params_of()
  batch = tiny.one_document(CONFIG, rows=rows, length=length)
  decoder = METHOD.decoder(model, params, METHOD.submodels(model)[1])
  return decoder._replace(step=jax.jit(decoder.step)), np.asarray(batch["inputs"]), program(1)(params, batch)


def added(a, b):
  return b if a is None else jax.tree.map(lambda x, y: np.asarray(x) + np.asarray(y), a, b)


@pytest.mark.parametrize("calls", [[1] * 10, [3, 7], [2, 1, 7], [4, 4, 2]], ids=str)
def test_steps_are_the_forward_pass_however_the_tokens_are_cut(calls):
  """Also where a piece holds the end of the prompt and what follows; and they run what the forward pass runs."""
  decoder, tokens, want = played()
  cache, start, found = decoder.empty_cache(4, 10), 0, None
  for count in calls:
    logits, cache, metrics = decoder.step(
      decoder.params, tokens[:, start : start + count], np.full(4, count, np.int32), cache
    )
    start, found = start + count, added(found, metrics)
    np.testing.assert_allclose(logits, want.logits[:, start - 1], rtol=2e-5, atol=2e-5)
  tiny.assert_trees_equal(found, want.aux)
  assert float(found["layers"][0]) < 4 * 10 * CONFIG.num_layers


def test_rows_in_different_parts_of_their_prompts_do_not_disturb_each_other():
  decoder, tokens, want = played()
  cache, done = decoder.empty_cache(4, 10), np.zeros(4, int)
  for counts in ([3, 1, 0, 4], [2, 4, 1, 0], [0, 3, 4, 4], [4, 0, 4, 1], [1, 2, 1, 1]):
    piece = np.ones((4, 4), np.int32)
    for row, count in enumerate(counts):
      piece[row, :count] = tokens[row, done[row] : done[row] + count]
    logits, cache, metrics = decoder.step(decoder.params, piece, np.array(counts, np.int32), cache)
    done += counts
    for row in np.flatnonzero(counts):
      np.testing.assert_allclose(logits[row], want.logits[row, done[row] - 1], rtol=2e-5, atol=2e-5)
    assert float(metrics["layers"][1]) == sum(counts)
  assert done.tolist() == [10] * 4
  _, whole, _ = decoder.step(
    decoder.params, tokens[:, :PROMPT], np.full(4, PROMPT, np.int32), decoder.empty_cache(4, 10)
  )
  np.testing.assert_allclose(cache.scores, whole.scores, rtol=1e-5, atol=1e-5)


def test_generated_tokens_change_no_decision():
  """The sums that decide grow with the prompt and then stay, whatever is fed."""
  decoder, tokens, _ = played()
  _, cache, _ = decoder.step(
    decoder.params, tokens[:, :PROMPT], np.full(4, PROMPT, np.int32), decoder.empty_cache(4, 10)
  )
  sums = np.asarray(cache.scores)
  assert sums.shape == (len(ROUTED), 4)
  assert (np.abs(sums) > 0).all()
  for token in (7, 30):
    _, cache, _ = decoder.step(decoder.params, np.full((4, 1), token, np.int32), np.ones(4, np.int32), cache)
    np.testing.assert_array_equal(cache.scores, sums)


def test_layers_that_no_row_runs_are_left_out():
  """Every layer is in a conditional; beside them a step computes scores and the head."""
  decoder, tokens, _ = played()
  program = jax.make_jaxpr(decoder.step)(
    decoder.params, tokens[:, :1], np.ones(4, np.int32), decoder.empty_cache(4, 10)
  )
  (step,) = [e.params["jaxpr"] for e in program.eqns if e.primitive.name in ("pjit", "jit")]
  outside = [e for e in step.eqns if e.primitive.name != "cond"]
  assert len(step.eqns) - len(outside) == CONFIG.num_layers
  assert str(outside).count("dot_general[") == len(ROUTED) + 1


def loss_of(model, params, batch):
  return METHOD.loss(model, params, batch, METHOD.sample(model, 0, 0), jax.random.key(0), jnp.int32(0))


def test_the_loss_is_that_of_the_hard_decisions_plus_the_squared_distance_to_the_budget():
  params, batch = params_of(), batch_of()
  model = built(budget_loss=4.0, target=0.1)
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch))(params)
  logits = program(1)(params, batch).logits
  task = losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0))
  later = np.asarray((batch["positions"] >= PROMPT) & (batch["segment_ids"] > 0))
  share = slow(1)[1:-1][:, later].mean()
  assert float(losses.mean(metrics["run"])) == pytest.approx(share, rel=1e-6)
  assert float(losses.mean(metrics["loss"])) == pytest.approx(float(task), rel=1e-6)
  assert float(total) == pytest.approx(float(task) + 4.0 * (share - 0.1) ** 2, rel=1e-6)


def test_rows_of_prompts_only_have_no_budget():
  model, params = built(budget_loss=100.0, prompt_tokens=12), params_of()
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch_of()))(params)
  assert float(total) == pytest.approx(float(losses.mean(metrics["loss"])))
  assert float(metrics["run"][1]) == 0


ONE, FEW = tiny.model_config(num_layers=3), tiny.model_config(num_layers=4)  # one routed layer, two


def by_hand(params, batch, part):
  """Loss where tokens after the prompt make part(probability [b]) of the middle layer's update."""
  model = Transformer(ONE)
  x, context = model.apply({"params": params}, batch, method="embed")
  everyone = jnp.ones(x.shape[:2], bool)

  def run(layer, x):
    weights = jax.tree.map(lambda leaf: leaf[layer : layer + 1], params["layers"])
    return visits.one_shot(ONE, weights, x, context, everyone, "project", visits.nothing(ONE, x))[0]

  x = run(0, x)
  score = jnp.mean(x[:, :PROMPT] @ params["routers"]["weight"][0, :, 0], axis=1) + params["routers"]["bias"][0]
  part = jnp.where(batch["positions"] < PROMPT, 1.0, part(jax.nn.sigmoid(score))[:, None])[..., None]
  x = run(2, x + part * (run(1, x) - x))
  logits = model.apply({"params": params}, x, method="head")
  return losses.mean(losses.cross_entropy(logits, batch["targets"], everyone))


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_the_gradient_of_a_decision_is_that_of_its_layer_s_update(estimator):
  """Straight-through: taken at the hard decision; soft: at the probability, which is also the value."""
  model, params = built(ONE, estimator=estimator, budget_loss=0.0), params_of(ONE)
  batch = tiny.one_document(ONE, rows=6, length=8)
  parts = {
    "soft": lambda p: p,
    "straight_through": lambda p: jax.lax.stop_gradient((p > 0.5) - p) + p,
  }
  want = jax.jit(jax.value_and_grad(lambda p: by_hand(p, batch, parts[estimator])))(params)
  found = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch)[0]))(params)
  tiny.assert_trees_close(found, want, rtol=2e-5)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[1]["routers"]))


def test_the_soft_budget_is_of_the_probabilities():
  model, params = built(ONE, estimator="soft", budget_loss=3.0, target=0.2), params_of(ONE)
  batch = tiny.one_document(ONE, rows=6, length=8)
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch))(params)
  stream = tiny.model_config(num_layers=1)
  rows = zip(np.asarray(batch["inputs"]), np.asarray(batch["positions"]))
  double, chances = numpy_transformer._as_float64(params), []
  for tokens, at in rows:
    enter = slow_visits.streams(stream, double, tokens[:PROMPT], [1] * PROMPT, at, np.ones((1, PROMPT)), "hole", 1)
    logit = np.mean(enter, axis=0) @ double["routers"]["weight"][0, :, 0] + double["routers"]["bias"][0]
    chances.append(1 / (1 + np.exp(-logit)))
  assert float(losses.mean(metrics["run"])) == pytest.approx(np.mean(chances), rel=1e-5)
  budget = 3.0 * (np.mean(chances) - 0.2) ** 2
  assert float(total) - float(losses.mean(metrics["loss"])) == pytest.approx(budget, rel=1e-4)


def test_the_first_stage_s_gradient_of_the_backbone_is_exactly_zero():
  model, params, batch = built(FEW, train="routers"), params_of(FEW), batch_of()
  assert METHOD.learning_rates(model) == {"embedding": 0.0, "layers": 0.0, "final_norm": 0.0}
  assert METHOD.learning_rates(built(FEW)) == {}
  grads = jax.jit(jax.grad(lambda p: loss_of(model, p, batch)[0]))(params)
  free = jax.jit(jax.grad(lambda p: loss_of(built(FEW), p, batch)[0]))(params)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(first.backbone(grads)))
  tiny.assert_trees_close(grads["routers"], free["routers"])
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(free))


def test_fresh_routers_run_everything_so_that_training_begins_at_the_given_model():
  model, source = built(FEW), tiny.random_params(FEW, seed=1)
  fresh = nn.unbox(init_params(model, jax.random.key(0)))
  params = METHOD.init_from(model, fresh, source, "stepwise", 0)
  tiny.assert_trees_equal(params, {**source, "routers": fresh["routers"]})
  batch, plain = batch_of(), Transformer(FEW)
  want = jax.jit(plain.apply)({"params": source}, batch)
  forward = jax.jit(lambda index: METHOD.forward(model, params, batch, index).logits)
  for index in range(len(THRESHOLDS)):
    np.testing.assert_allclose(forward(np.int32(index)), want, rtol=1e-5, atol=1e-5)
  free = built(FEW, budget_loss=0.0)
  found = jax.jit(jax.value_and_grad(lambda p: loss_of(free, p, batch)[0]))(params)
  dense = METHODS["dense"]
  begun = jax.jit(jax.value_and_grad(lambda p: dense.loss(plain, p, batch, (0,), jax.random.key(0), 0)[0]))(source)
  tiny.assert_trees_close((found[0], first.backbone(found[1])), begun)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[1]["routers"]))


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_routers_learn_the_budget(estimator):
  """From running everything to about the target, with the backbone frozen, by plain descent."""
  model = built(train="routers", estimator=estimator, target=0.6, budget_loss=20.0)
  batch, params = batch_of(rows=8), params_of()
  routers = jax.tree.map(lambda x: 0 * x + (x.ndim == 1) * first.START, params["routers"])

  @jax.jit
  def step(routers):
    (_, metrics), grads = jax.value_and_grad(lambda r: loss_of(model, {**params, "routers": r}, batch), has_aux=True)(
      routers
    )
    return jax.tree.map(lambda p, g: p - 0.2 * g, routers, grads), losses.mean(metrics["run"])

  shares = []
  for _ in range(150):
    routers, share = step(routers)
    shares.append(float(share))
  assert shares[0] > 0.85
  assert np.mean(shares[-50:]) == pytest.approx(0.6, abs=0.1)


def test_the_cost_is_what_was_run():
  model, batch = built(), batch_of()
  submodels, dense = METHOD.submodels(model), costs.dense_cost(CONFIG, 12)
  assert [s.name for s in submodels] == ["threshold=0.3", "threshold=0.5", "threshold=0.7", "depth=5"]
  ran = slow(1)[:, np.asarray(batch["segment_ids"]) > 0].mean(axis=1)
  found = METHOD.cost(model, submodels[1], 12, program(1)(params_of(), batch).aux)
  routers = 3 * 2 * CONFIG.d_model
  head = 2 * CONFIG.vocab_size * CONFIG.d_model
  assert found.flops_per_token == pytest.approx(ran.sum() * costs.layer_flops(CONFIG, 6.5) + routers + head)
  assert found.kv_bytes_per_token == round(ran.sum() * 2 * CONFIG.num_kv_heads * CONFIG.head_size * 4)
  assert METHOD.cost(model, submodels[0], 12, {}).flops_per_token == dense.flops_per_token + routers
  assert METHOD.cost(model, submodels[-1], 12, {}).flops_per_token == dense.flops_per_token
  assert found.params_total == dense.params_total + 3 * (CONFIG.d_model + 1)


def test_only_the_full_model_is_a_dense_one():
  model, params = built(), params_of()
  *early, full = METHOD.submodels(model)
  assert all(METHOD.extract(model, params, submodel) is None for submodel in early)
  config, extracted = METHOD.extract(model, params, full)
  assert config == CONFIG
  assert set(extracted) == {"embedding", "layers", "final_norm"}


def test_routers_decide_in_float32_whatever_the_model_computes_in():
  config = tiny.model_config(num_layers=4, dtype="bfloat16")
  model, params = built(config), params_of(config)
  decoder = METHOD.decoder(model, params, METHOD.submodels(model)[1])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder.params["routers"])} == {"float32"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(decoder.params["layers"])} == {"bfloat16"}
  assert first.score(params, 0, jnp.ones((1, 2, 16), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(prompt_tokens=0), "method.prompt_tokens=0"),
    (dict(target=1.5), "method.target=1.5"),
    (dict(budget_loss=-1.0), "method.budget_loss=-1.0"),
    (dict(thresholds=(0.5, 0.3)), r"method.thresholds=\(0.5, 0.3\)"),
    (dict(thresholds=(0.5, 1.3)), r"method.thresholds=\(0.5, 1.3\)"),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    built(**settings)


def test_two_layers_leave_nothing_to_skip():
  with pytest.raises(ConfigError, match=r"model.num_layers=2: the first and the last are never skipped"):
    built(tiny.model_config(num_layers=2))

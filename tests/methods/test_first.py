"""FiRST: decisions and logits against the slow executor, and decoding in any pieces."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_prompts
import slow_visits
import tiny

from adaptive import config_dict, losses, methods
from adaptive import cost as costs
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError, Experiment
from adaptive.depth import prompt_plan, replay
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


@functools.cache
def slow(index, prompt=PROMPT):
  return slow_prompts.visits(CONFIG, params_of(), batch_of(), prompt, THRESHOLDS[index])


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


def test_thresholds_may_change_after_training_and_nothing_else():
  saved = json.loads(config_dict.to_json(Experiment(method=METHOD.Config()), "first"))
  changed = config_dict.changed(saved, ["method.thresholds=(0.9, 0.95)"])
  assert methods.parse_config(changed)[1].method.thresholds == (0.9, 0.95)
  with pytest.raises(ConfigError, match="prompt_tokens is part of what was trained"):
    config_dict.changed(saved, ["method.prompt_tokens=4"])


def test_two_layers_leave_nothing_to_skip():
  with pytest.raises(ConfigError, match=r"model.num_layers=2: the first and the last are never skipped"):
    built(tiny.model_config(num_layers=2))

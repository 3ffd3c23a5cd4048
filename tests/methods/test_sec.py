"""SEC: the controller's labels and loss by hand, who learns from what, leaving and stopping by the slow way."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_exits
import tiny
from scipy import special

from adaptive import config_dict, losses
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError, Experiment
from adaptive.depth import exits as exiting
from adaptive.evaluation import calibration
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import METHODS
from adaptive.methods.depth import sec
from adaptive.methods.depth.sec import CONTINUE, EXIT, STOP, Stopping

CONFIG, METHOD = tiny.model_config(), METHODS["sec"]
EXITS, THRESHOLD, STOPS, TOKEN = (1, 2, 3), 0.5, 0.6, 5
BATCH = tiny.packed_batch(CONFIG)
REAL = np.asarray(BATCH["segment_ids"]) > 0


@functools.cache
def built(heads="own", kv="project", stop=STOPS, limits=(THRESHOLD,), **settings):
  how = Stopping(thresholds=limits, kv=kv, stop_threshold=stop, stop_token=TOKEN)
  model = METHOD.build(CONFIG, METHOD.Config(exits=EXITS, heads=heads, exit=how, **settings))
  return model, tiny.random_params(model)


def index_of(model, threshold=THRESHOLD):
  return [s.name for s in METHOD.submodels(model)].index(f"threshold={threshold}")


@functools.cache
def runner(heads="own", kv="project", stop=STOPS):
  """Forward pass of the threshold: batch -> Output."""
  model, params = built(heads, kv, stop)
  run = jax.jit(lambda batch: METHOD.forward(model, params, batch, index_of(model)))
  return lambda batch: jax.device_get(run(batch))


def stopped(logits):
  return np.asarray(logits).min(-1) == -1e4


# Leaving and stopping


def said(params, x):
  """Probabilities of the three actions, float64."""
  return special.softmax(np.asarray(x, np.float64) @ np.asarray(params["controller"]["weight"][0], np.float64), axis=-1)


@pytest.mark.parametrize(("heads", "kv", "seed"), [("own", "project", 4), ("shared", "copy", 0)])
def test_tokens_leave_and_stop_where_the_slow_way_lets_them(heads, kv, seed):
  model, params = built(heads, kv)
  batch = tiny.packed_batch(CONFIG, rows=3, length=8, seed=seed)
  found = runner(heads, kv)(batch)

  def asker(position):
    ask = lambda which, x: said(params, x)[EXIT] > THRESHOLD or said(params, x)[STOP] > STOPS
    return ask if position > 0 else lambda which, x: False

  depth, x = slow_exits.left(CONFIG, params, batch, model.exits.depths, kv, asker)
  each = [slow_exits.logits(CONFIG, params, x, which if which < 3 and heads == "own" else None) for which in range(4)]
  want = np.take_along_axis(np.stack(each), depth[None, ..., None] - 1, axis=0)[0]
  over = (said(params, x)[..., STOP] > STOPS) & (np.asarray(batch["positions"]) > 0)
  want[over] = np.where(np.arange(CONFIG.vocab_size) == TOKEN, 0.0, -1e4)
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(found.logits[real], want[real], rtol=2e-5, atol=2e-5)
  assert float(found.aux["layers"][0]) == depth[real].sum()
  assert len(set(depth[real])) >= 3
  assert 0 < over[real].sum() < real.sum()
  assert (depth[real & over] == 4).any(), "some stop at the model's own exit"
  assert (depth[real & over] < 4).any(), "and some before"


@pytest.mark.parametrize("kv", ["project", "exact"])
def test_thresholds_of_one_are_the_plain_model_even_where_the_controller_is_certain(kv):
  model, params = built(kv=kv, stop=1.0, limits=(1.0,))
  plain = Transformer(CONFIG).apply({"params": {k: params[k] for k in ("embedding", "layers", "final_norm")}}, BATCH)
  run = jax.jit(lambda p: METHOD.forward(model, p, BATCH, index_of(model, 1.0)).logits)
  for factor in (1.0, 1e4):
    given = {**params, "controller": {"weight": factor * params["controller"]["weight"]}}
    np.testing.assert_allclose(run(given), plain, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_document_never_exits_nor_stops():
  """Of tokens alike, where the rest exits, or stops, at the first exit; whatever says so, and below every threshold."""
  first = np.asarray(BATCH["positions"]) == 0
  for stop, threshold, signal in (
    (1.0, 0.0, "learned"),
    (0.0, 1.0, "learned"),
    (1.0, -2.0, "learned"),
    (1.0, -1.0, "random"),
  ):
    model, params = built(stop=stop, limits=(threshold,))
    model = model.clone(
      method=dataclasses.replace(model.method, exit=dataclasses.replace(model.method.exit, signal=signal))
    )
    found = METHOD.forward(model, params, BATCH, index_of(model, threshold))
    full = METHOD.forward(model, params, BATCH, len(METHOD.submodels(model)) - 1).logits
    starts = np.sum(first & REAL)
    assert float(found.aux["ran/2"][0]) == starts == 4
    rows = np.arange(2), np.array([0, 0])
    np.testing.assert_allclose(found.logits[rows], full[rows], rtol=1e-5, atol=1e-5)
    assert not stopped(found.logits)[first & REAL].any()
    assert stopped(found.logits)[~first & REAL].all() == (stop == 0.0)


def test_a_model_that_stops_says_so_and_nothing_after():
  """Greedily or drawn: the stop token is the last that is generated; without the controller texts are longer."""
  prompts, made = [[3, 1, 4], [9], [2, 6, 5, 3], [7, 7]], {}
  for stop, temperature in ((STOPS, 0), (1.0, 0), (STOPS, 1.5)):
    model, params = built(stop=stop, limits=(1.0,))
    decoder = METHOD.decoder(model, params, METHOD.submodels(model)[index_of(model, 1.0)])
    generator = Generator(decoder, CONFIG.vocab_size, Sampling(temperature), stop_tokens=(TOKEN,))
    result = made[stop, temperature] = generator(prompts, 12)
    for tokens in result.tokens:
      assert TOKEN not in tokens[:-1]
      assert len(tokens) == 12 or tokens[-1] == TOKEN
  for temperature in (0, 1.5):
    certain = [log_probs[-1] == 0 for log_probs in made[STOPS, temperature].log_probs]
    assert any(certain), "a token that is certain has log-probability 0"
  length = lambda result: sum(map(len, result.tokens))
  assert length(made[STOPS, 0]) < length(made[1.0, 0])


def test_a_fixed_depth_asks_nobody_and_stops_nowhere():
  model, params = built(stop=0.0)
  run = jax.jit(lambda i: METHOD.forward(model, params, BATCH, i).logits)
  for index, submodel in enumerate(METHOD.submodels(model)):
    if "depth" in submodel.name:
      config, small = METHOD.extract(model, params, submodel)
      want = Transformer(config).apply({"params": small}, BATCH)
      traced = run(np.int32(index))
      np.testing.assert_allclose(traced, want, rtol=1e-5, atol=1e-5)
      assert not stopped(traced).any()


def test_later_tokens_other_rows_and_other_documents_change_nothing():
  run, batch = runner(), tiny.packed_batch(CONFIG, rows=3)
  together = run(batch)
  assert 1 < float(together.aux["layers"][0] / together.aux["layers"][1]) < 4, "some leave and some do not"
  assert stopped(together.logits).any()
  later = {**batch, "inputs": batch["inputs"].at[:, 6:].add(1) % CONFIG.vocab_size}
  np.testing.assert_array_equal(run(later).logits[:, :6], together.logits[:, :6])
  second = np.asarray(batch["segment_ids"]) == 2
  first = {**batch, "inputs": jnp.where(second, batch["inputs"], (batch["inputs"] + 1) % CONFIG.vocab_size)}
  np.testing.assert_array_equal(run(first).logits[second], together.logits[second])
  alone = [run(jax.tree.map(lambda x, i=i: x[np.array([i] * 3)], batch)).logits[0] for i in range(3)]
  np.testing.assert_allclose(np.stack(alone), together.logits, rtol=1e-5, atol=1e-5)


def test_how_a_model_stops_can_be_changed_after_training():
  """And only how it leaves."""
  experiment = Experiment(method=METHOD.Config(exits=EXITS))
  saved = json.loads(config_dict.to_json(experiment, "sec"))
  wanted = config_dict.changed(saved, ["method.exit.stop_threshold=0.5", "method.exit.thresholds=(0.9,)"])
  found = config_dict.from_config_dict(wanted, METHOD.Config).method
  assert found.exit == Stopping(stop_threshold=0.5, thresholds=(0.9,))
  assert found.exit.signal == "learned"
  with pytest.raises(ConfigError, match="method.heads is part of what was trained"):
    config_dict.changed(saved, ["method.heads=shared"])


def test_costs_count_the_controller_wherever_it_was_asked():
  head, asked = 2 * CONFIG.vocab_size * CONFIG.d_model, 2 * 3 * CONFIG.d_model
  shares = {f"ran/{d}": (ran, 4.0) for d, ran in zip((*EXITS, 4), (4.0, 2.0, 1.0, 1.0))}
  for stop, times in ((1.0, 1 + 0.5 + 0.25), (STOPS, 1 + 0.5 + 0.25 + 0.25)):  # the last exit may stop, too
    model, params = built(stop=stop)
    full = METHOD.cost(model, METHOD.submodels(model)[-1], 8, {})
    layer, keys = (full.flops_per_token - head) / 4, 4 * CONFIG.d_model * CONFIG.num_kv_heads * CONFIG.head_size
    found = METHOD.cost(model, METHOD.submodels(model)[index_of(model)], 8, shares).flops_per_token
    assert found == pytest.approx(2 * layer + 2 * keys + head + times * asked)
    foreseen = calibration.flops_where_left(model.exits, 8, np.ones((1, 1), np.int32))
    assert foreseen([0]) == pytest.approx(layer + 3 * keys + head + asked)
    assert foreseen([3]) == pytest.approx(4 * layer + head + (3 + (stop < 1)) * asked)
    assert full.params_total == sum(leaf.size for leaf in jax.tree.leaves(params))


# Training


def test_labels_by_hand():
  right = np.random.default_rng(0).uniform(size=(4, 5, 30)) < 0.25
  want = np.full(right.shape, STOP)
  for token in np.ndindex(5, 30):
    firsts = [which for which in range(4) if right[(which, *token)]]
    for which in range(4 if firsts else 0):
      want[(which, *token)] = EXIT if which >= firsts[0] else CONTINUE
  np.testing.assert_array_equal(sec.labels(jnp.asarray(right)), want)
  assert len(np.unique(want)) == 3


def easy(params):
  """Targets that some exits predict: those of the second for a third of the tokens, of the last for another."""
  model, _ = built()
  predicted = [METHOD.forward(model, params, BATCH, i).logits.argmax(-1) for i in (1, 4)]
  assert METHOD.submodels(model)[4].name == "depth=4"
  third = jnp.arange(12)[None] % 3
  return {
    **BATCH,
    "targets": jnp.where(third == 0, predicted[0], jnp.where(third == 1, predicted[1], BATCH["targets"])),
  }


def loss_of(model, params, batch):
  return jax.jit(lambda p: METHOD.loss(model, p, batch, (0,), jax.random.key(0), jnp.int32(0)))(params)


def test_the_loss_is_the_heads_mean_and_the_controller_s_weighed_by_depth():
  model, params = built()
  batch = easy(params)
  streams, total, number = [], 0.0, 0
  depth_of = lambda s: METHOD.extract(model, params, s)
  each, right = [], []
  for submodel in [s for s in METHOD.submodels(model) if "depth" in s.name]:
    config, small = depth_of(submodel)
    dense = Transformer(config)
    x, context = dense.apply({"params": small}, batch, method="embed")
    x, _ = dense.apply({"params": small}, x, context, method=lambda m, x, c: m.layers(x, c, None))
    logits = dense.apply({"params": small}, x, method="head")
    streams.append(np.asarray(x))
    each.append(np.asarray(losses.token_losses(logits, batch["targets"]))[REAL].mean())
    right.append(np.asarray(logits).argmax(-1) == np.asarray(batch["targets"]))
  seen = set()
  for token in zip(*np.nonzero(REAL)):
    firsts = [which for which in range(4) if right[which][token]]
    for which, depth in enumerate((1, 2, 3, 4)):
      label = STOP if not firsts else EXIT if which >= firsts[0] else CONTINUE
      total -= depth / 10 * np.log(said(params, streams[which][token])[label])
      seen.add(label)
    number += 1
  assert len(seen) == 3
  found, metrics = loss_of(model, params, batch)
  assert float(found) == pytest.approx(np.mean(each) + total / number, rel=1e-5)
  assert float(losses.mean(metrics["controller_loss"])) == pytest.approx(total / number, rel=1e-5)
  named = [float(losses.mean(metrics[name])) for name in ("loss/1", "loss/2", "loss/3", "loss")]
  np.testing.assert_allclose(named, each, rtol=1e-5)


@functools.cache
def gradients(**settings):
  model, params = built(**settings)
  return jax.jit(jax.grad(lambda p: METHOD.loss(model, p, BATCH, (0,), jax.random.key(0), 0)[0]))(params)


def test_the_controller_teaches_nobody_but_itself():
  """All others learn what they learn without it."""
  _, params = built()
  plain = METHODS["early_exit"]
  other = plain.build(CONFIG, plain.Config(exits=EXITS, heads="own", weights="equal"))
  rest = lambda tree: {name: part for name, part in tree.items() if name != "controller"}
  want = jax.jit(jax.grad(lambda p: plain.loss(other, p, BATCH, (0,), jax.random.key(0), 0)[0]))(rest(params))
  found = gradients()
  tiny.assert_trees_close(rest(found), want)
  assert float(jnp.abs(found["controller"]["weight"]).max()) > 0


@pytest.mark.parametrize(("heads", "trained"), [("own", {"exit_heads", "controller"}), ("shared", {"controller"})])
def test_a_frozen_backbone_has_no_gradient(heads, trained):
  for name, part in gradients(heads=heads, backbone="frozen").items():
    largest = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part)]
    assert all(value > 0 for value in largest) if name in trained else set(largest) == {0.0}, name
  model, params = built(heads=heads, backbone="frozen")
  assert METHOD.learning_rates(model) == {"embedding": 0.0, "layers": 0.0, "final_norm": 0.0}
  source = tiny.random_params(CONFIG, seed=1)
  begun = METHOD.init_from(model, params, source, "stepwise", 0)
  tiny.assert_trees_equal(begun, {**params, **source})


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(exits=()), "method.exits is empty"),
    (dict(exits=(3, 1)), "must be increasing"),
    (dict(exits=(1,), exit=Stopping(stop_threshold=0.5)), "method.exit.stop_token=256 must be less than model.vocab_s"),
    (dict(exits=(1,), exit=Stopping(stop_threshold=-0.5)), "method.exit.stop_threshold=-0.5 must be at least 0"),
    (dict(exits=(1,), exit=Stopping(stop_token=-1)), "method.exit.stop_token=-1 must be at least 0"),
    (dict(exits=(1,), exit=Stopping(depths=(2,))), r"no exit was trained at \[2\]"),
  ],
)
def test_settings_that_cannot_work_are_named(settings, message):
  with pytest.raises(ConfigError, match=message):
    METHOD.build(CONFIG, METHOD.Config(**settings))


def test_without_stops_any_vocabulary_will_do():
  assert METHOD.build(CONFIG, METHOD.Config(exits=(1,))).exits.ends is None
  how = dataclasses.replace(Stopping(), stop_threshold=0.9, stop_token=31)
  assert METHOD.build(CONFIG, METHOD.Config(exits=(1,), exit=how)).exits.ends.token == 31


def test_a_text_ends_with_the_tokenizer_s_token_or_not_at_all():
  model, _ = built()
  exiting.check_end(model, TOKEN)
  exiting.check_end(built(stop=1.0)[0], 256)
  exiting.check_end(Transformer(CONFIG), 256)
  with pytest.raises(ConfigError, match="method.exit.stop_token=5 is not the tokenizer's end of a document, 256"):
    exiting.check_end(model, 256)

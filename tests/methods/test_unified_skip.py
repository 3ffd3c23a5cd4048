"""Unified Layer Skipping: which layers a speed-up keeps and what a step trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_visits
import tiny

from adaptive import cost as costs
from adaptive import losses
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.methods import METHODS
from adaptive.methods.depth import unified_skip

CONFIG, METHOD = tiny.model_config(num_layers=6, qk_norm=True), METHODS["unified_skip"]
PATHS = {3.0: (0, 5), 2.0: (0, 3, 5), 1.5: (0, 2, 3, 5), 1.0: range(6)}  # by hand, of the nearest to evenly spaced


def built(config=CONFIG, **settings):
  model = METHOD.build(config, METHOD.Config(**settings))
  return model, tiny.random_params(model), tiny.packed_batch(config)


@pytest.mark.parametrize(
  ("layers", "speedup", "spacing", "path"),
  [
    (30, 5, "divisible", (0, 6, 12, 18, 24, 29)),  # the example of the released code
    (30, 5, "rounded", (0, 6, 12, 17, 23, 29)),
    (16, 1.5, "divisible", (0, 1, 2, 3, 4, 5, 6, 7, 8, 15)),  # the gap that evenly spaced layers do not have
    (16, 1.5, "rounded", (0, 2, 3, 5, 7, 8, 10, 12, 13, 15)),
    (16, 2, "divisible", (0, 2, 4, 6, 8, 10, 12, 15)),
    (16, 8, "divisible", (0, 15)),
    (16, 8, "rounded", (0, 15)),
    (32, 3.2, "rounded", (0, 3, 7, 10, 14, 17, 21, 24, 28, 31)),
    (4, 1.3, "rounded", (0, 2, 3)),  # 1.5 upwards
  ],
)
def test_the_layers_that_are_kept(layers, speedup, spacing, path):
  assert unified_skip.layer_path(layers, unified_skip.kept(layers, speedup), spacing) == path


@pytest.mark.parametrize("spacing", ["rounded", "divisible"])
def test_any_speedup_keeps_as_many_layers_as_it_says_and_both_ends(spacing):
  for layers in range(4, 49):
    for number in range(2, layers):
      path = unified_skip.layer_path(layers, number, spacing)
      assert len(set(path)) == len(path) == number
      assert (path[0], path[-1]) == (0, layers - 1)
      assert list(path) == sorted(path)
      if spacing == "rounded":
        gaps, even = np.diff(path), (layers - 1) / (number - 1)
        assert set(gaps.tolist()) <= {int(even), int(np.ceil(even))}


def test_whole_layers_are_counted_whatever_floating_point_makes_of_them():
  for layers in range(2, 100):
    for tenths in range(11, 90):
      assert unified_skip.kept(layers, tenths / 10) == 10 * layers // tenths


@pytest.mark.parametrize("traced", [False, True])
def test_a_sub_model_runs_its_layers_and_no_others(traced):
  model, params, batch = built()
  real = np.asarray(batch["segment_ids"]) > 0
  run = jax.jit(lambda index: METHOD.forward(model, params, batch, index).logits)
  assert [s["speedup"] for s in METHOD.submodels(model)] == list(PATHS)
  for index, path in enumerate(PATHS.values()):
    ran = np.isin(np.arange(6), path)[:, None, None] * np.ones((6, *real.shape), int)
    want = slow_visits.logits(CONFIG, params, batch, ran, "hole", 1)
    found = run(np.int32(index)) if traced else METHOD.forward(model, params, batch, index).logits
    np.testing.assert_allclose(np.asarray(found)[real], want[real], rtol=2e-5, atol=2e-5)


def test_a_later_token_changes_nothing_before_and_documents_do_not_see_each_other():
  model, params, batch = built()
  run = jax.jit(lambda tokens: METHOD.forward(model, params, {**batch, "inputs": tokens}, 1).logits)
  tokens, second = batch["inputs"], np.asarray(batch["segment_ids"]) == 2
  a, b = np.asarray(run(tokens)), np.asarray(run(jnp.where(second, (tokens + 1) % 32, tokens)))
  np.testing.assert_array_equal(a[~second], b[~second])
  assert not np.allclose(a[second], b[second])
  c = np.asarray(run(tokens.at[:, 1].add(1) % 32))
  np.testing.assert_array_equal(a[:, :1], c[:, :1])
  assert not np.allclose(a[:, 1], c[:, 1])


def loss_of(model, params, batch, choice):
  return METHOD.loss(model, params, batch, choice, jax.random.key(0), jnp.int32(0))


def alone(model, params, batch, index):
  """Loss and last stream of a sub-model as the dense model that it is."""
  config, small = METHOD.extract(model, params, METHOD.submodels(model)[index])
  plain = Transformer(config)
  logits = plain.apply({"params": small}, batch)
  x, context = plain.apply({"params": small}, batch, method="embed")
  x = plain.apply({"params": small}, x, context, None, method=lambda m, *args: m.layers(*args)[0])
  return losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0)), x


@pytest.mark.parametrize("choice", [(1,), (0, 2, 3)], ids=str)
def test_the_loss_is_the_mean_over_the_step_s_sub_models(choice):
  model, params, batch = built()
  mean = lambda p: sum(alone(model, p, batch, index)[0] for index in choice) / len(choice)
  want = jax.jit(jax.value_and_grad(mean))(params)
  (total, metrics), grads = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, choice), has_aux=True))(
    params
  )
  tiny.assert_trees_close((total, grads), want)
  assert metrics["submodel_loss"][0].shape == (len(choice),)
  kept = sorted({layer for index in choice for layer in list(PATHS.values())[index]})
  moved = [layer for layer in range(6) if any(np.any(leaf[layer] != 0) for leaf in jax.tree.leaves(grads["layers"]))]
  assert moved == kept, "the others' gradients are exactly zero"


def test_the_cosine_loss_draws_a_plan_s_last_stream_to_the_full_model_s():
  model, params, batch = built(cosine_loss=2.0)
  without = built()[0]
  real = np.asarray(batch["segment_ids"]) > 0
  streams = [np.asarray(alone(model, params, batch, index)[1], np.float64)[real] for index in (1, 3)]
  cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*streams)]
  value = lambda m, choice: jax.jit(jax.value_and_grad(lambda p: loss_of(m, p, batch, choice)[0]))(params)
  (total, grads), (task, plain) = value(model, (1,)), value(without, (1,))
  assert float(total - task) == pytest.approx(2.0 * np.mean(1 - np.array(cosine)), rel=1e-4)
  skipped = jax.tree.map(lambda leaf: leaf[jnp.array([1, 2, 4])], grads["layers"])
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(skipped)), "the teacher learns nothing"
  assert not np.allclose(grads["layers"]["mlp"]["up"][0], plain["layers"]["mlp"]["up"][0], rtol=1e-3)
  tiny.assert_trees_close(value(model, (3,)), value(without, (3,)), rtol=1e-5)  # the full model teaches itself nothing


def test_a_step_trains_one_plan_or_all():
  model, *_ = built()
  draws = [METHOD.sample(model, 5, step) for step in range(400)]
  assert draws == [METHOD.sample(model, 5, step) for step in range(400)]
  assert draws != [METHOD.sample(model, 6, step) for step in range(400)]
  counts = np.bincount([index for (index,) in draws], minlength=4)
  assert np.all(np.abs(counts - 100) < 4 * np.sqrt(400 * 0.25 * 0.75))
  assert METHOD.sample(built(train="all")[0], 5, 0) == (0, 1, 2, 3)
  assert METHOD.static_choice(model)


def test_a_sub_model_costs_its_layers():
  model, params, _ = built()
  for submodel, path in zip(METHOD.submodels(model), PATHS.values()):
    small = dataclasses.replace(CONFIG, num_layers=len(path))
    assert METHOD.cost(model, submodel, 8, {}) == costs.dense_cost(small, 8)
    decoder = METHOD.decoder(model, params, submodel)
    assert len(decoder.params["layers"]) == len(decoder.empty_cache(1, 4).layers) == len(path)


def test_any_plan_may_draft():
  model, params, _ = built()
  ladder = METHOD.ladder(model, params, None)
  assert ladder.layers == (2, 3, 4, 6)
  assert ladder.rungs == (1, 1, 1)
  prefix, *_ = built(tiny.model_config(num_layers=16), speedups=(1.5, 2.0), spacing="divisible")
  paths = METHOD.ladder(prefix, tiny.random_params(prefix), None)
  assert paths.layers == (8, 10, 16), "in the order of what they share with the model: 1 layer, and 9"
  assert paths.rungs == (1, 2)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(speedups=(2.0, 1.5)), r"method.speedups=\(2.0, 1.5\) must be increasing and more than 1"),
    (dict(speedups=(1.0, 2.0)), r"method.speedups=\(1.0, 2.0\) must be increasing and more than 1"),
    (dict(speedups=(2.0, 4.0)), r"method.speedups=\(2.0, 4.0\) of 6 layers keep \[3, 1\]"),
    (dict(speedups=(1.8, 2.0)), r"keep \[3, 3\]: numbers below 6 that differ"),
    (dict(cosine_loss=-1.0), "method.cosine_loss=-1.0"),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    built(**settings)

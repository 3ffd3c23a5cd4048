"""SortedNet's training losses against slow ones put together from separate dense models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import losses
from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer
from adaptive.methods import dense
from adaptive.methods.width import sorted_net
from adaptive.methods.width.sorted_net import Config

MODEL = tiny.model_config(num_layers=3)
PARAMS = tiny.random_params(MODEL)
BATCH = tiny.packed_batch(MODEL, rows=6)
SHARED = Config(depths=(1, 3), d_ff=(8, 24), accum_data="shared", scheme="all")
DEPTHS = Config(depths=(1, 2, 3), scheme="multi_exit")


@functools.cache
def trained(config, choice, model_config=MODEL):
  """((loss, metrics), gradients) of a step."""
  model = sorted_net.build(model_config, config)
  static = sorted_net.static_choice(model)

  def loss(params, traced):
    return sorted_net.loss(model, params, BATCH, choice if static else traced, jax.random.key(0), 0)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, jnp.asarray(choice))


def logits_of(params, config, index, batch=BATCH):
  """Of a sub-model, cut out and run as a dense model."""
  model = sorted_net.build(MODEL, config)
  small, cut = sorted_net.extract(model, params, sorted_net.submodels(model)[index])
  return Transformer(small).apply({"params": cut}, batch)


def task(logits, batch=BATCH):
  return losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0))


def slow(loss):
  return jax.jit(jax.value_and_grad(loss))(PARAMS)


def check(found, expected, rtol=2e-5):
  (loss, _), grads = found
  tiny.assert_trees_close((loss, grads), expected, rtol=rtol)


@functools.cache
def alone(config, index):
  """(loss, gradient) of one sub-model on the whole batch."""
  return slow(lambda params: task(logits_of(params, config, index)))


def weighted_sum(shares, parts):
  return jax.tree.map(lambda *leaves: sum(w * x for w, x in zip(shares, leaves)), *parts)


@pytest.mark.parametrize("executor", ["static", "switch", "mask"])
def test_a_step_is_the_mean_over_its_sub_models_in_every_executor(executor):
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=3, executor=executor)
  found, parts = trained(config, (3, 0, 1)), [alone(SHARED, i) for i in (3, 0, 1)]
  check(found, weighted_sum([1 / 3] * 3, parts))
  check_metrics(found, parts)


def check_metrics(found, parts):
  """Metrics hold the loss of each sub-model, and their sum."""
  (_, metrics), _ = found
  total, count = metrics["submodel_loss"]
  tokens = float(jnp.sum(BATCH["segment_ids"] > 0))
  np.testing.assert_allclose(total / count, [loss for loss, _ in parts], rtol=1e-5)
  assert count.tolist() == [tokens] * 3
  assert [float(x) for x in metrics["loss"]] == pytest.approx([float(total.sum()), 3 * tokens])


def test_the_same_sub_model_twice_is_that_sub_model_once():
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, replacement=True, executor="mask")
  check(trained(config, (1, 1)), alone(SHARED, 1))


def test_all_of_a_family_of_one_is_the_dense_model():
  found = trained(Config(scheme="all", num_sampled=1), (0,))
  model = Transformer(MODEL)
  check(found, slow(lambda params: dense.loss(model, params, BATCH, (0,), None, 0)[0]))


def test_a_split_batch_gives_each_sub_model_its_own_rows():
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, accum_data="split", executor="mask")

  def expected(params):
    parts = [jax.tree.map(lambda x, p=part: x[p::2], BATCH) for part in range(2)]
    return sum(task(logits_of(params, SHARED, i, rows), rows) for i, rows in zip((2, 0), parts)) / 2

  check(trained(config, (2, 0)), slow(expected))


def test_training_by_switch_branches_inside_the_loop_over_sub_models():
  model = sorted_net.build(MODEL, dataclasses.replace(SHARED, executor="switch"))
  loss = lambda params, choice: sorted_net.loss(model, params, BATCH, choice, None, 0)[0]
  program = jax.jit(jax.grad(loss)).lower(PARAMS, jnp.arange(4)).as_text()
  assert program.count("stablehlo.case") >= 2, "one in the forward pass, one in the backward pass"


def distilled(params, share, temperature):
  """From its parts: the full sub-model learns from labels; the smallest, drawn twice, from labels and from it."""
  teacher = logits_of(PARAMS, SHARED, 3)  # of the constant parameters: no gradient
  mask, student = BATCH["segment_ids"] > 0, logits_of(params, SHARED, 0)
  soft = jnp.sum(jax.nn.softmax(teacher / temperature) * jax.nn.log_softmax(student / temperature), -1)
  soft = -(temperature**2) * jnp.sum(soft * mask) / jnp.sum(mask)
  return (task(logits_of(params, SHARED, 3)) + 2 * ((1 - share) * task(student) + share * soft)) / 3


def test_distillation_matches_its_parts():
  config = dataclasses.replace(SHARED, distill=0.3, distill_temperature=2.0, executor="mask")
  check(trained(config, (3, 0, 0)), slow(lambda params: distilled(params, 0.3, 2.0)))


def test_distilling_harder_does_not_move_the_teacher():
  """Parameters outside the smallest sub-model hear from the full one's own loss only."""
  config = dataclasses.replace(SHARED, scheme="sandwich", num_sampled=2, executor="static")
  _, gentle = trained(dataclasses.replace(config, distill=0.1), (3, 0))
  _, hard = trained(dataclasses.replace(config, distill=1.0), (3, 0))
  inside = tiny.inside(MODEL, PARAMS, subnets.prefix(MODEL, 1, 3, 8))
  split = lambda grads, where: jax.tree.map(lambda g, keep: jnp.where(keep == where, g, 0), grads, inside)
  tiny.assert_trees_close(split(gentle, False), split(hard, False), rtol=1e-6)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), split(gentle, True), split(hard, True))
  assert min(jax.tree.leaves(moved["layers"])) > 1e-4


@pytest.mark.parametrize(("weights", "remat"), [((), "none"), ((1.0, 0.0, 3.0), "full")], ids=["mean", "weighted"])
def test_multi_exit_is_the_mean_over_separate_depths(weights, remat):
  config, model = dataclasses.replace(DEPTHS, weights=weights), dataclasses.replace(MODEL, remat=remat)
  shares = np.array(weights or (1.0,) * 3) / sum(weights or (1.0,) * 3)
  found, parts = trained(config, (2, 1, 0), model), [alone(DEPTHS, i) for i in range(3)]
  check(found, weighted_sum(shares.tolist(), parts))
  check_metrics(found, parts[::-1])


@pytest.mark.parametrize("executor", ["static", "switch"])
def test_split_data_means_the_same_in_every_executor(executor):
  """Each sub-model reads the same rows whichever way it runs; losses of single sub-models tell them apart."""
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, accum_data="split")
  (loss, metrics), grads = trained(dataclasses.replace(config, executor=executor), (0, 2))
  (expected, wanted), expected_grads = trained(dataclasses.replace(config, executor="mask"), (0, 2))
  tiny.assert_trees_close((loss, metrics, grads), (expected, wanted, expected_grads), rtol=2e-5)


@pytest.mark.parametrize("executor", ["static", "switch", "mask"])
@pytest.mark.parametrize("accum_data", ["split", "shared"])
def test_gradients_of_a_step_are_zero_outside_the_union_of_its_sub_models_and_not_inside(executor, accum_data):
  """(depth 1, d_ff 24) and (depth 3, d_ff 8): neither holds the other, and their union is not the whole."""
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, accum_data=accum_data, executor=executor)
  model = sorted_net.build(MODEL, config)
  parts = [sorted_net.subnet_of(model, sorted_net.submodels(model)[i]) for i in (1, 2)]
  masks = [tiny.inside(MODEL, PARAMS, part) for part in parts]
  _, grads = trained(config, (1, 2))
  for (path, grad), a, b in zip(jax.tree_util.tree_leaves_with_path(grads), *map(jax.tree.leaves, masks)):
    grad, union = np.asarray(grad), a | b
    assert not grad[~union].any(), jax.tree_util.keystr(path)
    assert np.mean(grad[union] != 0) > 0.99, jax.tree_util.keystr(path)
  outside = jax.tree.map(lambda a, b: not (a | b).all(), *masks)
  assert {path[-1].key for path, some in jax.tree_util.tree_leaves_with_path(outside) if some} == {"gate", "up", "down"}


def test_distillation_by_switch_is_that_by_static():
  config = dataclasses.replace(SHARED, scheme="sandwich", num_sampled=3, distill=0.4, distill_temperature=1.5)
  found, expected = (trained(dataclasses.replace(config, executor=e), (3, 0, 2)) for e in ("switch", "static"))
  tiny.assert_trees_close(found, expected, rtol=2e-5)


def test_the_sandwich_of_a_family_of_two_is_all_of_it():
  config = dataclasses.replace(SHARED, d_ff=(), scheme="sandwich", num_sampled=2)
  model = sorted_net.build(MODEL, config)
  assert {sorted_net.sample(model, 0, step) for step in range(10)} == {(1, 0)}
  check(
    trained(config, (1, 0)), weighted_sum([0.5, 0.5], [alone(dataclasses.replace(SHARED, d_ff=()), i) for i in (1, 0)])
  )

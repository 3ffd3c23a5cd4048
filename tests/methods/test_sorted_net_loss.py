"""SortedNet's training losses against slow ones put together from separate dense models."""

import dataclasses

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


def trained(config, choice, params=PARAMS, batch=BATCH):
  """((loss, metrics), gradients) of a step."""
  model = sorted_net.build(MODEL, config)
  static = sorted_net.static_choice(model)

  def loss(params, traced):
    return sorted_net.loss(model, params, batch, choice if static else traced, jax.random.key(0), 0)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, jnp.asarray(choice))


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


@pytest.fixture(scope="module")
def mean_of_three():
  """The mean over three sub-models, each on the whole batch."""
  return slow(lambda params: sum(task(logits_of(params, SHARED, i)) for i in (3, 0, 1)) / 3)


@pytest.mark.parametrize("executor", ["static", "switch", "mask"])
def test_a_step_is_the_mean_over_its_sub_models_in_every_executor(mean_of_three, executor):
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=3, executor=executor)
  check(trained(config, (3, 0, 1)), mean_of_three)


def test_metrics_hold_the_loss_of_each_sub_model():
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, executor="mask")
  (_, metrics), _ = trained(config, (3, 0))
  expected = [float(task(logits_of(PARAMS, SHARED, i))) for i in (3, 0)]
  total, count = metrics["submodel_loss"]
  np.testing.assert_allclose(total / count, expected, rtol=1e-5)
  tokens = float(jnp.sum(BATCH["segment_ids"] > 0))
  assert count.tolist() == [tokens, tokens]
  assert [float(x) for x in metrics["loss"]] == pytest.approx([float(total.sum()), 2 * tokens])


def test_the_same_sub_model_twice_is_that_sub_model_once():
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, replacement=True)
  check(trained(config, (1, 1)), slow(lambda params: task(logits_of(params, SHARED, 1))))


def test_all_of_a_family_of_one_is_the_dense_model():
  found = trained(Config(scheme="all", num_sampled=1), (0,))
  model = Transformer(MODEL)
  check(found, slow(lambda params: dense.loss(model, params, BATCH, (0,), None, 0)[0]))


def test_a_split_batch_gives_each_sub_model_its_own_rows():
  config = dataclasses.replace(SHARED, scheme="uniform", num_sampled=2, accum_data="split")

  def expected(params):
    parts = [jax.tree.map(lambda x, p=part: x[p::2], BATCH) for part in range(2)]
    return sum(task(logits_of(params, SHARED, i, rows), rows) for i, rows in zip((2, 0), parts)) / 2

  check(trained(config, (2, 0)), slow(expected))


def test_training_by_switch_branches_in_the_compiled_program():
  model = sorted_net.build(MODEL, dataclasses.replace(SHARED, executor="switch"))
  loss = lambda params, choice: sorted_net.loss(model, params, BATCH, choice, None, 0)[0]
  program = jax.jit(jax.grad(loss)).lower(PARAMS, jnp.arange(4)).compile().as_text()
  assert program.count(" conditional(") >= 2
  assert program.count(" while(") >= 2, "a loop over sub-models around loops over layers"


def distilled(params, share, temperature, choice=(3, 0, 1)):
  """From its parts: the full sub-model learns from labels, the others from labels and from it."""
  teacher = logits_of(PARAMS, SHARED, 3)  # of the constant parameters: no gradient
  mask, total = BATCH["segment_ids"] > 0, task(logits_of(params, SHARED, choice[0]))
  for index in choice[1:]:
    logits = logits_of(params, SHARED, index)
    soft = jnp.sum(jax.nn.softmax(teacher / temperature) * jax.nn.log_softmax(logits / temperature), -1)
    soft = -temperature**2 * jnp.sum(soft * mask) / jnp.sum(mask)
    total += (1 - share) * task(logits) + share * soft
  return total / len(choice)


@pytest.mark.parametrize(("share", "executor"), [(0.3, "switch"), (1.0, "static")])
def test_distillation_matches_its_parts(share, executor):
  config = dataclasses.replace(
    SHARED, scheme="sandwich", num_sampled=3, distill=share, distill_temperature=2.0, executor=executor
  )
  check(trained(config, (3, 0, 1)), slow(lambda params: distilled(params, share, 2.0)))


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


@pytest.mark.parametrize("weights", [(), (1.0, 0.0, 3.0)], ids=["mean", "weighted"])
def test_multi_exit_is_the_mean_over_separate_depths(weights):
  config = dataclasses.replace(DEPTHS, weights=weights)
  shares = np.array(weights or (1.0,) * 3) / sum(weights or (1.0,) * 3)
  expected = slow(lambda params: sum(w * task(logits_of(params, DEPTHS, i)) for i, w in enumerate(shares)))
  found = trained(config, (2, 1, 0))
  check(found, expected)
  each = [float(task(logits_of(PARAMS, DEPTHS, i))) for i in (2, 1, 0)]
  total, count = found[0][1]["submodel_loss"]
  np.testing.assert_allclose(total / count, each, rtol=1e-5)


def test_multi_exit_with_remat_has_the_same_gradient():
  config = dataclasses.replace(MODEL, remat="full")
  model = sorted_net.build(config, DEPTHS)
  loss = lambda params: sorted_net.loss(model, params, BATCH, (2, 1, 0), None, 0)
  check(jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS), (lambda f: (f[0][0], f[1]))(trained(DEPTHS, (2, 1, 0))))

"""FiRST's training: the loss and its budget by hand, gradients of decisions, what is frozen, where it begins."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_prompts
import tiny

from adaptive import losses
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.depth import visits
from adaptive.methods import METHODS
from adaptive.methods.depth import first

METHOD, PROMPT, THRESHOLDS = METHODS["first"], 3, (0.3, 0.5, 0.7)
ONE, FEW = tiny.model_config(num_layers=3), tiny.model_config(num_layers=4)  # one routed layer, two


def built(config=FEW, **settings):
  """Model, random parameters whose routers say yes to some documents and no to others, and rows of two documents."""
  model = METHOD.build(config, METHOD.Config(**{"prompt_tokens": PROMPT, "thresholds": THRESHOLDS, **settings}))
  params = tiny.random_params(model, seed=3)
  routers = {**params["routers"], "bias": 0.3 * params["routers"]["bias"]}
  return model, {**params, "routers": routers}, tiny.packed_batch(config, rows=6)


def later(batch):
  """Tokens that are not of a prompt."""
  return np.asarray((batch["positions"] >= PROMPT) & (batch["segment_ids"] > 0))


def loss_of(model, params, batch):
  return METHOD.loss(model, params, batch, METHOD.sample(model, 0, 0), jax.random.key(0), jnp.int32(0))


def test_the_loss_is_that_of_the_hard_decisions_plus_the_squared_distance_to_the_budget():
  model, params, batch = built(budget_loss=4.0, target=0.1)
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch))(params)
  logits = jax.jit(lambda p: METHOD.forward(model, p, batch, THRESHOLDS.index(0.5)).logits)(params)
  task = losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0))
  share = slow_prompts.visits(FEW, params, batch, PROMPT, 0.5)[1:-1][:, later(batch)].mean()
  assert 0 < share < 1
  assert float(losses.mean(metrics["run"])) == pytest.approx(share, rel=1e-6)
  assert float(losses.mean(metrics["loss"])) == pytest.approx(float(task), rel=1e-6)
  assert float(total) == pytest.approx(float(task) + 4.0 * (share - 0.1) ** 2, rel=1e-6)


def test_rows_of_prompts_only_have_no_budget():
  model, params, batch = built(budget_loss=100.0, prompt_tokens=12)
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch))(params)
  assert float(total) == pytest.approx(float(losses.mean(metrics["loss"])))
  assert float(metrics["run"][1]) == 0


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
  model, params, _ = built(ONE, estimator=estimator, budget_loss=0.0)
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
  model, params, batch = built(ONE, estimator="soft", budget_loss=3.0, target=0.2)
  total, metrics = jax.jit(lambda p: loss_of(model, p, batch))(params)
  share = slow_prompts.probabilities(ONE, params, batch, PROMPT)[:, later(batch)].mean()
  assert float(losses.mean(metrics["run"])) == pytest.approx(share, rel=1e-5)
  assert float(total) - float(losses.mean(metrics["loss"])) == pytest.approx(3.0 * (share - 0.2) ** 2, rel=1e-4)


def test_the_first_stage_s_gradient_of_the_backbone_is_exactly_zero():
  (model, params, batch), (other, *_) = built(train="routers"), built()
  assert METHOD.learning_rates(model) == {"embedding": 0.0, "layers": 0.0, "final_norm": 0.0}
  assert METHOD.learning_rates(other) == {}
  grads = jax.jit(jax.grad(lambda p: loss_of(model, p, batch)[0]))(params)
  free = jax.jit(jax.grad(lambda p: loss_of(other, p, batch)[0]))(params)
  assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(first.backbone(grads)))
  tiny.assert_trees_close(grads["routers"], free["routers"])
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(free))


def test_fresh_routers_run_everything_so_that_training_begins_at_the_given_model():
  (model, _, batch), source = built(), tiny.random_params(FEW, seed=1)
  fresh = nn.unbox(init_params(model, jax.random.key(0)))
  params = METHOD.init_from(model, fresh, source, "stepwise", 0)
  tiny.assert_trees_equal(params, {**source, "routers": fresh["routers"]})
  plain = Transformer(FEW)
  want = jax.jit(plain.apply)({"params": source}, batch)
  forward = jax.jit(lambda index: METHOD.forward(model, params, batch, index).logits)
  for index in range(len(THRESHOLDS)):
    np.testing.assert_allclose(forward(np.int32(index)), want, rtol=1e-5, atol=1e-5)
  free, *_ = built(budget_loss=0.0)
  found = jax.jit(jax.value_and_grad(lambda p: loss_of(free, p, batch)[0]))(params)
  dense = METHODS["dense"]
  begun = jax.jit(jax.value_and_grad(lambda p: dense.loss(plain, p, batch, (0,), jax.random.key(0), 0)[0]))(source)
  tiny.assert_trees_close((found[0], first.backbone(found[1])), begun)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[1]["routers"]))


@pytest.mark.parametrize("estimator", ["straight_through", "soft"])
def test_routers_learn_the_budget(estimator):
  """From running everything to about the target, with the backbone frozen, by plain descent."""
  config = tiny.model_config(num_layers=5)
  model, params, batch = built(config, train="routers", estimator=estimator, target=0.6, budget_loss=20.0)
  routers = jax.tree.map(lambda x: 0 * x + (x.ndim == 1) * first.START, params["routers"])

  @jax.jit
  def step(routers):
    whole = lambda routers: loss_of(model, {**params, "routers": routers}, batch)
    (_, metrics), grads = jax.value_and_grad(whole, has_aux=True)(routers)
    return jax.tree.map(lambda p, g: p - 0.2 * g, routers, grads), losses.mean(metrics["run"])

  shares = []
  for _ in range(150):
    routers, share = step(routers)
    shares.append(float(share))
  assert shares[0] > 0.85
  assert np.mean(shares[-50:]) == pytest.approx(0.6, abs=0.1)

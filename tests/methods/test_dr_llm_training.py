import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import slow_routers
import tiny
from routed import LAYERS, MODEL, built, forward, labelled, questions, sizes, varied_params

from adaptive import losses
from adaptive.backbone.transformer import init_params
from adaptive.config import ConfigError, DataConfig, Experiment, TrainingConfig
from adaptive.methods.depth import dr_llm
from adaptive.methods.depth.dr_llm import objective, router


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


def test_an_update_is_the_layers_once_and_three_times_the_routers():
  """By hand: d_model 16, 6 heads of size 4, two key/value heads, d_ff 24; 3 windows, hidden 8, 12 tokens."""
  matrices = 2 * 16 * 24 + 2 * 16 * 8 + 3 * 16 * 24
  layer = 2 * matrices + 4 * 6.5 * 24
  own = 3 * 2 * (16 * 8 + 8 * 3) / 12 + 3 * 2 * 16
  assert dr_llm.update_flops(built(), (3,), 12) == pytest.approx(LAYERS * (layer + 3 * own))


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


def test_the_paper_s_start_is_xavier_s():
  model = built(start="xavier", hidden=64)
  fresh = nn.unbox(init_params(model, jax.random.key(0)))["routers"]
  assert not np.any(fresh["bias"])
  assert not np.any(fresh["hidden_bias"])
  for name, inputs, outputs in (("hidden", MODEL.d_model, 64), ("weight", 64, 3)):
    bound = (6 / (inputs + outputs)) ** 0.5
    assert 0.9 * bound < float(jnp.abs(fresh[name]).max()) <= bound
    assert len(np.unique(fresh[name][:, 0, 0])) == LAYERS, "every layer has its own"


def experiment(**parts):
  return Experiment(method=dr_llm.Config(), **parts)


def test_what_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"method.budgets=\(0.5, -0.5\) must be increasing"):
    dr_llm.Config(budgets=(0.5, -0.5))
  with pytest.raises(ConfigError, match="method.beta=1.0 must be below 1"):
    dr_llm.Config(beta=1.0)
  with pytest.raises(ConfigError, match="training.init_from"):
    dr_llm.check_training(built(), experiment())
  trained = TrainingConfig(init_from="runs/base")
  with pytest.raises(ConfigError, match="set data.source='questions' and data.labels"):
    dr_llm.check_training(built(), experiment(training=trained))
  dr_llm.check_training(
    built(), experiment(training=trained, data=DataConfig(source="questions", path="q.jsonl", labels="l.jsonl"))
  )
  model = built()
  with pytest.raises(ConfigError, match="set data.source='questions' and data.labels"):
    dr_llm.loss(model, tiny.random_params(model), tiny.packed_batch(MODEL), (3,), jax.random.key(0), 0)

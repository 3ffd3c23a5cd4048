"""JEI-DNN's training: the losses of its three stages by hand, and what each of them trains."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run
from planted_gates import BATCH, CONFIG, EXITS, METHOD, OPENING, REAL, built, numbers_by_hand, probabilities_by_hand
from scipy import special

from adaptive import executors
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError, OptimizerConfig
from adaptive.methods import METHODS, parse_config
from adaptive.methods.depth import jei_dnn
from adaptive.methods.depth.jei_dnn import GATES, HEADS, WARM_UP
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.run import plan
from adaptive.training.step import make_step


def loss_of(model, params, stage, batch=BATCH):
  run = jax.jit(lambda p: METHOD.loss(model, p, batch, (stage,), jax.random.key(0), jnp.int32(0)))
  return run(params)


@functools.cache
def gradients(stage, **settings):
  model, params = built(**settings)
  return jax.jit(jax.grad(lambda p: METHOD.loss(model, p, BATCH, (stage,), jax.random.key(0), 0)[0]))(params)


def test_stages_take_turns_after_the_warm_up_the_gates_first():
  model = METHOD.build(CONFIG, METHOD.Config(exits=EXITS, warmup_steps=2, phase_steps=3))
  found = [METHOD.sample(model, 7, step)[0] for step in range(12)]
  assert found == [WARM_UP] * 2 + [GATES] * 3 + [HEADS] * 3 + [GATES] * 3 + [HEADS]
  assert METHOD.static_choice(model)
  assert METHOD.sample(METHOD.build(CONFIG, METHOD.Config(exits=EXITS, warmup_steps=0)), 0, 0) == (GATES,)


def test_the_best_exit_is_the_lowest_of_loss_and_cost_and_the_ends_are_the_best_loss_and_the_first():
  each, costs = np.random.default_rng(5).uniform(0, 2, (4, 3, 6)), np.array([0.3, 0.5, 0.8, 1.0])
  best = lambda weight: np.asarray(jei_dnn.best_exits(jnp.asarray(each, jnp.float32), costs, weight))
  for weight in (0.0, 0.7, 3.0):
    want = np.zeros((3, 6), int)
    for i, j in itertools.product(range(3), range(6)):
      want[i, j] = min(range(4), key=lambda e: each[e, i, j] + weight * costs[e])
    np.testing.assert_array_equal(best(weight), want)
  np.testing.assert_array_equal(best(0.0), each.argmin(0))
  np.testing.assert_array_equal(best(1e6), 0)
  assert len(np.unique(best(0.7))) == 4


def test_the_cost_of_an_exit_is_that_of_the_model_cut_there():
  model, _ = built()
  found = jei_dnn.flops_shares(model, 12)
  flops = [METHOD.cost(model, s, 12, {}).flops_per_token for s in METHOD.submodels(model) if "depth" in s.name]
  np.testing.assert_allclose(found, np.array(flops) / flops[-1])
  assert found[-1] == 1


def gate_loss_by_hand(scores, targets, mask):
  total, number = 0.0, 0
  for which, score in enumerate(scores):
    labels = targets <= which
    positives = np.sum(labels & mask)
    weight = min(np.sum(~labels & mask) / max(positives, 1), 5.0)
    for at in zip(*np.nonzero(mask)):
      probability = special.expit(score[at])
      total -= weight * np.log(probability) if labels[at] else np.log(1 - probability)
      number += 1
  return total / number


def test_gates_learn_to_open_at_the_best_exit_and_after_it():
  rng = np.random.default_rng(6)
  scores, mask = rng.normal(size=(3, 4, 10)), rng.uniform(size=(4, 10)) < 0.8
  # First exits that are best for hardly anybody and for nearly all: weights at their limit of 5, and below 1.
  for shares in ([0.02, 0.3, 0.3, 0.38], [0.9, 0.05, 0.05, 0.0], [0.0, 0.0, 0.0, 1.0]):
    targets = rng.choice(4, (4, 10), p=shares)
    total, number = jei_dnn.gate_loss(*map(jnp.asarray, (scores.astype(np.float32), targets, mask)))
    assert float(total / number) == pytest.approx(gate_loss_by_hand(scores, targets, mask), rel=1e-5)


def weighed_by_hand(each, probabilities):
  weighed = probabilities * each
  return weighed * (each.sum(0) / weighed.sum(0))[None]


def test_the_published_ratio_takes_the_gates_out_of_the_loss_and_its_gradient():
  rng = np.random.default_rng(7)
  each, gates = (jnp.asarray(rng.uniform(0.1, 1, (3, 2, 5)), jnp.float32) for _ in range(2))
  probabilities = jei_dnn.exit_probabilities(gates * 0.5)
  run = lambda detach: jax.value_and_grad(lambda x: jnp.sum(jei_dnn.weighed_losses(x, probabilities, detach)))(each)
  (kept, slope), (published, flat) = run(True), run(False)
  np.testing.assert_allclose([kept, published], each.sum(), rtol=1e-6)
  np.testing.assert_allclose(flat, 1.0, rtol=1e-4)  # the gradient of the plain sum
  want = weighed_by_hand(np.asarray(each, np.float64), np.asarray(probabilities, np.float64)) / np.asarray(each)
  np.testing.assert_allclose(slope, want, rtol=1e-5)
  assert np.abs(np.asarray(slope) - 1).max() > 0.5
  closed = jei_dnn.weighed_losses(each, jnp.zeros_like(each), True)
  np.testing.assert_array_equal(closed, 0.0)  # and no NaN


@functools.cache
def token_losses(**settings):
  """Of every exit as a model that stands alone, float64 [e, b, t]; and its logits."""
  model, params = built(**settings)
  each, seen, targets = [], [], np.asarray(BATCH["targets"])[..., None]
  for submodel in [s for s in METHOD.submodels(model) if "depth" in s.name]:
    config, small = METHOD.extract(model, params, submodel)
    logits = np.asarray(jax.jit(Transformer(config).apply)({"params": small}, BATCH), np.float64)
    each.append(special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, targets, axis=-1)[..., 0])
    seen.append(logits)
  return np.stack(each), np.stack(seen)


def scores_by_hand(logits):
  numbers = numbers_by_hand(logits[:-1])
  return np.einsum("ebtf,ef->ebt", numbers, OPENING["weight"]) + OPENING["bias"][:, None, None]


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_the_losses_of_the_stages(heads):
  model, params = built(heads)
  each, logits = token_losses(heads=heads)
  mean = lambda x: x[..., REAL].mean(-1)
  found, metrics = loss_of(model, params, WARM_UP)
  assert float(found) == pytest.approx(np.average(mean(each), weights=[3, 2, 1, 1]), rel=1e-5)
  named = [float(metrics[name][0] / metrics[name][1]) for name in ("loss/1", "loss/2", "loss/3", "loss")]
  np.testing.assert_allclose(named, mean(each), rtol=1e-5)

  scores = scores_by_hand(logits)
  costs = [METHOD.cost(model, s, 12, {}).flops_per_token for s in METHOD.submodels(model) if "depth" in s.name]
  targets = np.argmin(each + 0.7 * (np.array(costs) / costs[-1])[:, None, None], axis=0)
  found, metrics = loss_of(model, params, GATES)
  assert float(found) == pytest.approx(gate_loss_by_hand(scores, targets, REAL), rel=1e-4)
  assert float(metrics["gate_loss"][0] / metrics["gate_loss"][1]) == pytest.approx(float(found))
  assert len(set(targets[REAL])) >= 3

  weighed = weighed_by_hand(each[:-1], probabilities_by_hand(special.expit(scores)))
  found, metrics = loss_of(model, params, HEADS)
  assert float(found) == pytest.approx(mean(weighed.sum(0) + each[-1]) / 4, rel=1e-4)
  assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(mean(each)[-1], rel=1e-5)


def test_with_the_published_ratio_heads_learn_the_plain_mean_of_all_exits():
  _, params = built(detach_ratio=False)
  plain = METHODS["early_exit"]
  other = plain.build(CONFIG, plain.Config(exits=EXITS, heads="own", weights="equal"))
  shared = {name: part for name, part in params.items() if name != "gates"}
  want = jax.jit(jax.grad(lambda p: plain.loss(other, p, BATCH, (0,), jax.random.key(0), 0)[0]))(shared)
  found = {name: part for name, part in gradients(HEADS, detach_ratio=False).items() if name != "gates"}
  tiny.assert_trees_close(found, want, rtol=1e-4, atol=1e-6)
  kept = gradients(HEADS)["exit_heads"]["matrix"]
  assert float(jnp.abs(kept - want["exit_heads"]["matrix"]).max()) > 1e-3, "with a constant ratio they do not"


def test_where_all_leave_at_one_exit_no_other_early_head_learns():
  """The first two gates are shut, the third is open; with the published ratio the other heads learn all the same."""
  bias = jnp.asarray([-200.0, 200.0, 0.0])
  for detach in (True, False):
    model, params = built(detach_ratio=detach)
    shut = {**params, "gates": {"weight": jnp.zeros((3, 4)), "bias": bias}}
    run = jax.jit(jax.grad(lambda p, m=model: METHOD.loss(m, p, BATCH, (HEADS,), jax.random.key(0), 0)[0]))
    learned = jnp.abs(run(shut)["exit_heads"]["matrix"]).max((1, 2))
    assert bool(learned[1] > 0)
    np.testing.assert_array_equal(learned[np.array([0, 2])] > 0, not detach)


PARTS = ("embedding", "layers", "final_norm", "exit_heads", "gates")


@pytest.mark.parametrize(
  ("backbone", "stage", "trained"),
  [
    ("trained", WARM_UP, PARTS[:4]),
    ("trained", HEADS, PARTS[:4]),
    ("trained", GATES, ("gates",)),
    ("frozen", WARM_UP, ("exit_heads",)),
    ("frozen", HEADS, ("exit_heads",)),
    ("frozen", GATES, ("gates",)),
  ],
)
def test_a_stage_trains_its_part_and_nothing_else(backbone, stage, trained):
  grads = gradients(stage, backbone=backbone)
  assert set(grads) == set(PARTS)
  for name, part in grads.items():
    largest = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part)]
    assert all(value > 0 for value in largest) if name in trained else set(largest) == {0.0}, name


@pytest.mark.parametrize("inactive", ["freeze", "keep"])
def test_momentum_moves_the_other_part_unless_the_inactive_is_frozen(inactive):
  settings = dict(exits=EXITS, warmup_steps=1, phase_steps=1)
  model = METHOD.build(CONFIG, METHOD.Config(**settings))
  settings = OptimizerConfig(warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, inactive=inactive)
  optimizer = optim.make_optimizer(settings, 10, METHOD.learning_rates(model))
  state = states.fresh(tiny.random_params(model), optimizer)
  step = jax.jit(make_step(METHOD, model, optimizer, 0, 1), static_argnums=2)
  seen = [state.params]
  for number in range(3):
    state, _ = step(state, BATCH, METHOD.sample(model, 0, number))
    seen.append(state.params)
  same = lambda a, b: all(bool(jnp.array_equal(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b))))
  rest = [{name: part for name, part in params.items() if name != "gates"} for params in seen]
  gates = [params["gates"] for params in seen]
  frozen = inactive == "freeze"
  assert same(gates[0], gates[1])  # no gradient yet, no momentum
  assert not same(rest[0], rest[1])
  assert not same(gates[1], gates[2])
  assert same(rest[1], rest[2]) == frozen, "the gates' turn"
  assert same(gates[2], gates[3]) == frozen, "the heads' turn"


def test_a_run_that_would_train_both_in_each_turn_is_refused_but_can_be_evaluated():
  config = tiny_run.config("nowhere", "jei_dnn")
  plan(*parse_config(config))
  config.training.optimizer.inactive = "keep"
  with pytest.raises(ConfigError, match=r"inactive='keep' would move .* jei_dnn trains with 'freeze'"):
    plan(*parse_config(config))
  plan(*parse_config(config), training=False)


def test_learning_rates_are_the_gates_own_and_nothing_where_frozen():
  rates = lambda **settings: METHOD.learning_rates(METHOD.build(CONFIG, METHOD.Config(exits=EXITS, **settings)))
  assert rates() == {}
  assert rates(gate_rate=10.0) == {"gates": 10.0}
  assert rates(heads="own", backbone="frozen") == {"embedding": 0.0, "layers": 0.0, "final_norm": 0.0}


def test_gates_find_the_exits_of_a_planted_task():
  """A token should leave at the first exit where its prediction is sure enough: a line in what gates read."""
  rng = np.random.default_rng(8)
  logits = rng.normal(size=(3, 8, 40, 7)) * rng.uniform(0.3, 5, (3, 8, 40, 1))
  numbers = jei_dnn.statistics(jnp.asarray(logits, jnp.float32))
  opens = np.asarray(numbers[..., 0]) > 0.7
  targets = np.where(opens.any(0), opens.argmax(0), 3)
  numbers = jnp.where((np.arange(3)[:, None, None] > targets[None])[..., None], jnp.eye(4)[0], numbers)  # it stays open
  mask = jnp.ones((8, 40), bool)

  def loss(gates):
    total, count = jei_dnn.gate_loss(jax.vmap(jei_dnn.gate_logits)(gates, numbers), jnp.asarray(targets), mask)
    return total / count

  optimizer = optim.optax.adam(0.2)

  def update(_, carried):
    gates, state = carried
    updates, state = optimizer.update(jax.grad(loss)(gates), state)
    return optim.optax.apply_updates(gates, updates), state

  gates = {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros(3)}
  gates, _ = jax.jit(lambda g: jax.lax.fori_loop(0, 300, update, (g, optimizer.init(g))))(gates)
  said = np.asarray(jax.vmap(jei_dnn.gate_logits)(gates, numbers)) > 0
  assert np.mean(said == (targets[None] <= np.arange(3)[:, None, None])) > 0.97


def test_a_frozen_model_begins_with_a_dense_one_s_parameters():
  model, params = built(backbone="frozen")
  source = tiny.random_params(CONFIG, seed=1)
  begun = METHOD.init_from(model, params, source, "stepwise", 0)
  tiny.assert_trees_equal(begun, {**source, "exit_heads": params["exit_heads"], "gates": params["gates"]})
  hidden = executors.exits(CONFIG, begun, BATCH, model.trained)
  plain = Transformer(CONFIG).apply({"params": source}, BATCH)
  np.testing.assert_allclose(model.exits.head(begun, 3, hidden[-1]), plain, rtol=1e-5, atol=1e-5)

"""Mixture-of-Depths against the slow one, in training and under the causal rule; and its limits, by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_depths
import slow_rows
import tiny

from adaptive import losses
from adaptive.backbone.transformer import Transformer
from adaptive.config import OptimizerConfig
from adaptive.methods import METHODS
from adaptive.methods.depth import mixture_of_depths as mod
from adaptive.methods.depth.mixture_of_depths import model as models
from adaptive.training import hlo, optim
from adaptive.training import state as states
from adaptive.training.step import make_step

CONFIG = tiny.model_config(num_heads=4, d_ff=16, vocab_size=16)
PAIR = dataclasses.replace(CONFIG, num_layers=2)  # the second is routed
DIALS = dict(score_shifts=(-0.4, 0.6), capacity_scales=(0.5,))
# By name: settings, and changes of the backbone.
SETTINGS = {
  "router": (dict(DIALS, capacity=0.5, router_loss=0.5), {}),
  "predictor, chunks, listed": (
    dict(
      DIALS,
      capacity=0.3,
      capacity_chunk=4,
      inference="predictor",
      gate="tanh",
      routed=(0, 3),
      score_shifts=(-0.05, 0.05),
    ),
    dict(qk_norm=True, qkv_bias=True),
  ),
  "all layers, sigmoid": (dict(DIALS, capacity=0.4, every=1, gate="sigmoid"), dict(num_layers=3, scan_unroll=3)),
  "no gate": (dict(DIALS, capacity=0.5, every=3, gate="none"), dict(num_layers=3)),
}
every_setting = pytest.mark.parametrize("name", SETTINGS)
LENGTH = 12


def build(config=CONFIG, **settings):
  return mod.build(config, mod.Config(**settings))


@functools.cache
def made(name):
  settings, backbone = SETTINGS[name]
  model = build(dataclasses.replace(CONFIG, **backbone), **settings)
  return model, tiny.random_params(model, seed=1), tiny.packed_batch(model.config, rows=3, length=LENGTH)


@functools.cache
def forward(name):
  """(batch, index) -> (logits, aux), one program for all sub-models."""
  model, params, _ = made(name)
  program = jax.jit(lambda batch, index: mod.forward(model, params, batch, index))
  return lambda batch, index: jax.tree.map(np.asarray, program(batch, jnp.int32(index)))


def loss(model, params, batch):
  return mod.loss(model, params, batch, (0,), jax.random.key(0), 0)


def train(model, params):
  return jax.jit(lambda batch: models.training_logits(model, params, batch)[0])


def real_of(batch):
  return np.asarray(batch["segment_ids"]) > 0


def weights_of(batch, vocab):
  """Of each logit in a sum; none at padding."""
  weights = np.sin(np.arange(np.prod((*batch["inputs"].shape, vocab)))).reshape(*batch["inputs"].shape, vocab)
  return np.where(real_of(batch)[..., None], weights, 0)


@every_setting
def test_the_training_pass_and_its_gradients_are_the_slow_ones(name):
  """Also: positions are those in the document, the residual stream is added once, and holes are not attended to."""
  model, params, batch = made(name)
  weights = weights_of(batch, model.config.vocab_size)

  def total(params):
    logits, found = models.training_logits(model, params, batch)
    routers = model.method.decision_loss * losses.mean(found["router_loss"]).sum()
    return jnp.sum(jnp.asarray(weights, jnp.float32) * logits) + routers, (logits, routers, found)

  grads, (logits, routers, found) = jax.jit(jax.grad(total, has_aux=True))(params)
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.complex128), params)
  slow_logits, slow_routers, taken = slow_depths.run(model, exact, batch)
  tiny.assert_trees_close(np.asarray(logits)[real_of(batch)], slow_logits[real_of(batch)].real, rtol=1e-5)
  np.testing.assert_allclose(routers, slow_routers.real, rtol=1e-5)
  real = real_of(batch)
  counts = [sum(real[i, row[r]].sum() for i, row in enumerate(taken)) for r in range(len(taken[0]))]
  assert found["gate"][1].tolist() == counts

  def slow_total(params):
    logits, routers, _ = slow_depths.run(model, params, batch)
    return np.sum(weights * logits) + routers

  rng = np.random.default_rng(7)
  for number, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
    along = rng.normal(size=grad.shape)
    expected = slow_rows.slope(slow_total, exact, number, along)
    slope, size = np.sum(np.asarray(grad, np.float64) * along), np.linalg.norm(grad)
    assert abs(slope - expected) <= 1e-5 * size + 1e-6, (jax.tree_util.keystr(path), slope, expected)
    assert size > 1e-3


@pytest.mark.parametrize("name", ["router", "predictor, chunks, listed"])
def test_the_loss_adds_the_routers_of_all_layers_to_the_cross_entropy(name):
  model, params, batch = made(name)
  value, metrics = jax.jit(lambda params: loss(model, params, batch))(params)
  logits, routers, _ = slow_depths.run(model, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), batch)
  picked = np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
  each = (np.log(np.exp(logits).sum(axis=-1)) - picked)[real_of(batch)]
  np.testing.assert_allclose(value, each.mean() + routers, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], (each.sum(), each.size), rtol=1e-5)
  assert {float(count) for key, (_, count) in metrics.items() if key not in ("loss", "gate")} == {2 * each.size}


@every_setting
def test_every_sub_model_is_the_slow_one_with_holes(name):
  model, params, batch = made(name)
  exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  real, shares = real_of(batch), []
  for index, submodel in enumerate(mod.submodels(model)):
    want, _, taken = slow_depths.run(model, exact, batch, dict(submodel.dial))
    logits, aux = forward(name)(batch, index)
    tiny.assert_trees_close(logits[real], want[real], rtol=1e-5)
    counts = [sum(len(row[r]) for row in taken) for r in range(len(model.routed))]
    assert {k: v for k, (v, _) in aux.items()} == {f"capacity/{layer}": n for layer, n in zip(model.routed, counts)}
    assert {float(n) for _, n in aux.values()} == {real.sum()}
    shares.append(sum(counts) / len(counts) / real.sum())
  fewer, more, bound, full = shares
  assert 0 < fewer < full < more < 1, "the control: thresholds that move nothing would be alike"
  assert bound < full


def test_choices_differ_between_rows_and_are_not_the_first_tokens():
  """The control of the tests above."""
  for name in SETTINGS:
    model, params, batch = made(name)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.complex128), params)
    for dial in (None, {}):
      taken = slow_depths.run(model, exact, batch, dial)[2]
      assert any(a != b and a != list(range(len(a))) for a, b in zip(taken[0], taken[1])), name


@pytest.mark.parametrize("inference", ["router", "predictor"])
def test_with_all_tokens_and_no_gate_it_is_the_dense_model(inference):
  gate = "none" if inference == "router" else "score"
  model = build(PAIR, capacity=1.0, gate=gate, inference=inference, router_loss=0.7)
  params, batch = tiny.random_params(model), tiny.packed_batch(PAIR)
  dense, plain = METHODS["dense"], Transformer(PAIR)
  backbone = {name: params[name] for name in ("embedding", "layers", "final_norm")}
  want = jax.jit(plain.apply)({"params": backbone}, batch)
  found = jax.jit(lambda params: mod.forward(model, params, batch, 0))(params)
  assert all(float(s) == float(n) for s, n in found.aux.values()), "all pass, whatever the scores say"
  if inference == "predictor":  # the score still weighs
    assert np.abs(found.logits - want).max() > 1e-2
    return
  real = real_of(batch)
  np.testing.assert_allclose(np.asarray(found.logits)[real], np.asarray(want)[real], rtol=1e-5, atol=1e-5)
  value, grads = jax.jit(jax.value_and_grad(lambda p: loss(model, p, batch)[0]))(params)
  assert np.abs(grads.pop("routers")["weight"]).max() == 0
  expected = jax.jit(jax.value_and_grad(lambda p: dense.loss(plain, p, batch, (0,), None, 0)[0]))(backbone)
  tiny.assert_trees_close((value, grads), expected)


def test_a_score_of_zero_adds_nothing_and_the_stream_goes_on_as_it_is():
  """With the residual stream added a second time, or scaled, this would be another model."""
  model = build(capacity=0.5, routed=(0, 2))
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG)
  params["routers"] = jax.tree.map(jnp.zeros_like, params["routers"])
  layers = jax.tree.map(lambda leaf: leaf[np.array([1, 3])], params["layers"])
  others = {"embedding": params["embedding"], "final_norm": params["final_norm"], "layers": layers}
  want = jax.jit(Transformer(PAIR).apply)({"params": others}, batch)
  np.testing.assert_allclose(train(model, params)(batch), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inference", ["router", "predictor"])
def test_the_router_and_its_layer_learn_from_chosen_tokens_only(inference):
  model = build(PAIR, capacity=0.5, inference=inference)
  params, batch = tiny.random_params(model, seed=1), tiny.one_document(CONFIG, rows=2, length=LENGTH)
  ((first,), (second,)) = slow_depths.run(model, jax.tree.map(np.asarray, params), batch)[2]
  chosen = np.stack([np.isin(np.arange(LENGTH), taken) for taken in (first, second)])
  assert chosen.sum() == LENGTH

  @jax.jit
  def gradient(where):
    return jax.grad(lambda p: jnp.sum(where[..., None] * models.training_logits(model, p, batch)[0] ** 2))(params)

  for where, learns in ((chosen, True), (~chosen, False)):
    grads = gradient(where)
    size = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
    assert (size(grads["routers"]) > 1e-3) == learns
    assert (size(jax.tree.map(lambda leaf: leaf[1], grads["layers"])) > 1e-3) == learns
    assert learns or size(grads["routers"]) == 0 == size(jax.tree.map(lambda leaf: leaf[1], grads["layers"]))
    assert size(jax.tree.map(lambda leaf: leaf[0], grads["layers"])) > 1e-3
    assert size(grads.get("predictors", {"none": jnp.zeros(())})) == 0


def test_a_predictor_learns_and_teaches_nothing():
  batch = tiny.packed_batch(CONFIG)
  model, without = build(PAIR, capacity=0.5, inference="predictor"), build(PAIR, capacity=0.5, router_loss=0.0)
  params = tiny.random_params(model, seed=1)
  gradient = lambda model: jax.jit(jax.grad(lambda p: loss(model, p, batch)[0]))
  grads = gradient(model)(params)
  own = grads.pop("predictors")
  assert all(np.abs(leaf).max(axis=(1, 2)).min() > 1e-5 for leaf in jax.tree.leaves(own))
  rest = {name: part for name, part in params.items() if name != "predictors"}
  tiny.assert_trees_close(grads, gradient(without)(rest), rtol=1e-6)


def test_a_predictor_is_clipped_by_itself_and_learns_ten_times_as_fast():
  """Adam's first update is the learning rate times the sign of the gradient."""
  model, batch = build(PAIR, capacity=0.5, inference="predictor"), tiny.packed_batch(CONFIG)
  settings = OptimizerConfig(warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, eps=1e-20)
  update, params = optim.make_optimizer(settings, 10, mod.learning_rates(model)), tiny.random_params(model)
  start = states.fresh(params, update)
  after = jax.jit(make_step(mod, model, update, 0, 1))(start, batch, np.array(mod.sample(model, 0, 0)))[0].params
  far = lambda name: np.median(np.abs(after[name]["weight"] - params[name]["weight"]))
  assert far("predictors") == pytest.approx(10 * far("routers"), rel=1e-3)
  assert mod.learning_rates(build()) == {}


@every_setting
def test_no_sub_model_looks_ahead(name):
  batch = tiny.one_document(made(name)[0].config, rows=3, length=LENGTH)
  for index in range(4):
    before, _ = forward(name)(batch, index)
    for position in (3, 8):
      changed = {**batch, "inputs": batch["inputs"].at[:, position:].add(1) % 16}
      after, _ = forward(name)(changed, index)
      np.testing.assert_array_equal(after[:, :position], before[:, :position])
      assert (after[:, position] != before[:, position]).any(axis=-1).all()


def test_training_looks_ahead():
  """So the test above can fail."""
  model, params, _ = made("router")
  batch, found = tiny.one_document(CONFIG, rows=3, length=LENGTH), train(model, params)
  changed = {**batch, "inputs": batch["inputs"].at[:, 8:].add(1) % 16}
  assert np.abs(found(batch) - found(changed))[:, :8].max() > 1e-3


@every_setting
def test_rows_are_as_alone_and_documents_too(name):
  model, params, batch = made(name)
  whole, real, program = train(model, params)(batch), real_of(batch), train(model, params)
  for row in range(3):
    alone = jax.tree.map(lambda x, row=row: jnp.repeat(x[row : row + 1], 3, axis=0), batch)
    np.testing.assert_allclose(program(alone)[0][real[row]], whole[row][real[row]], rtol=1e-5, atol=1e-5)
  for index in (2, 3):
    packed, _ = forward(name)(batch, index)
    for row, segment in ((0, 1), (1, 2), (2, 2)):
      where = np.flatnonzero(batch["segment_ids"][row] == segment)
      alone = {key: np.zeros((3, LENGTH), np.int32) for key in batch}
      for key, part in batch.items():
        alone[key][:, : len(where)] = part[row, where]
      alone["segment_ids"] = (alone["segment_ids"] > 0).astype(np.int32)
      logits, _ = forward(name)(alone, index)
      np.testing.assert_allclose(logits[0, : len(where)], packed[row, where], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["router"])
def test_an_int_and_a_traced_index_are_the_same_sub_model(name):
  model, params, batch = made(name)
  for index in (0, 2, 3):
    static = jax.jit(lambda params, index=index: mod.forward(model, params, batch, index))(params)
    traced = forward(name)(batch, index)
    np.testing.assert_allclose(static.logits, traced.logits, rtol=1e-4, atol=1e-5)
    tiny.assert_trees_equal(static.aux, traced.aux)


def test_layers_are_scanned_in_groups_that_repeat():
  """A pair is compiled once; what does not repeat is unrolled."""
  batch = tiny.one_document(CONFIG)
  for settings, groups in ((dict(), 2), (dict(routed=(1, 3)), 2), (dict(routed=(0, 3)), 1), (dict(every=1), 4)):
    model = build(capacity=0.5, **settings)
    program = jax.make_jaxpr(lambda p, model=model: models.training_logits(model, p, batch)[0])
    scans = [e for e in program(tiny.random_params(model)).eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in scans] == [groups]


def test_recomputing_in_the_backward_pass_changes_nothing():
  plain, again = build(PAIR, capacity=0.5), build(dataclasses.replace(PAIR, remat="full"), capacity=0.5)
  params, batch = tiny.random_params(plain, seed=1), tiny.packed_batch(CONFIG)
  gradient = lambda model: jax.grad(lambda p: loss(model, p, batch)[0])
  tiny.assert_trees_close(jax.jit(gradient(again))(params), jax.jit(gradient(plain))(params))
  program = str(jax.make_jaxpr(gradient(again))(params))
  assert program.count("prevent_cse=") == 2, "the plain layer and the routed one"


def test_bfloat16_is_finite_and_close():
  exact, half = build(PAIR, capacity=0.5), build(dataclasses.replace(PAIR, dtype="bfloat16"), capacity=0.5)
  params, batch = tiny.random_params(exact, seed=2), tiny.packed_batch(CONFIG)
  expected = float(jax.jit(lambda params: loss(exact, params, batch)[0])(params))
  (value, metrics), grads = jax.jit(jax.value_and_grad(lambda p: loss(half, p, batch), has_aux=True))(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((grads, metrics)))
  assert expected != float(value)
  np.testing.assert_allclose(value, expected, rtol=0.05)


def test_spread_rows_send_nothing():
  model, params, _ = made("router")
  mesh, batch = tiny.mesh(8, 1, 1), tiny.packed_batch(CONFIG, rows=8)
  with jax.set_mesh(mesh):
    params, batch = tiny.spread(model, params, batch, mesh)
    where, full = batch["inputs"].sharding, len(mod.submodels(model)) - 1
    passes = (lambda p, b: models.training_logits(model, p, b)[0], lambda p, b: mod.forward(model, p, b, full).logits)
    for program in passes:
      text = jax.jit(program, out_shardings=where).lower(params, batch).compile().as_text()
      assert hlo.collectives(text).totals == {}


def test_a_routed_layer_that_no_token_passes_is_not_run():
  """All of it is under a condition; what is outside are the ordinary layers, the routers and the head."""
  model = build(capacity=0.5)
  params = tiny.random_params(model)
  decoder = mod.decoder(model, params, mod.submodels(model)[-1])
  program = jax.make_jaxpr(decoder.step)(
    decoder.params, jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32), decoder.empty_cache(2, 4)
  )
  conditions = [e for e in program.eqns if e.primitive.name == "cond"]
  assert len(conditions) == len(model.routed) == 2
  for condition in conditions:
    left, run = (str(branch).count("dot_general") for branch in condition.params["branches"])
    assert (left, run) == (0, 9)
  outside = sum(e.primitive.name == "dot_general" for e in program.eqns)
  assert outside == 2 * 9 + 2 + 1


def test_a_bounded_sub_model_has_a_smaller_cache():
  model, params, _ = made("router")

  def slots(submodel):
    caches = mod.decoder(model, params, submodel).empty_cache(1, 256).layers
    return [next(leaf.shape[2] for leaf in jax.tree.leaves(cache) if leaf.ndim == 4) for cache in caches]

  (bounded,) = (s for s in mod.submodels(model) if "capacity_scale" in dict(s.dial))
  assert slots(mod.submodels(model)[-1]) == [256] * 4
  assert slots(bounded) == [256, 65, 256, 65]  # a half of the half of the tokens that training takes, and one to spare

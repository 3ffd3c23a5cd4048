import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
import tiny

from adaptive import losses
from adaptive.backbone import decoding
from adaptive.backbone.attention import apply_rope, rope_table
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import RopeScaling
from adaptive.sharding import RULES

LINEAR = RopeScaling("linear", factor=4.0)
LLAMA3 = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64)
VARIANTS = {
  "plain": tiny.model_config(),
  "untied": tiny.model_config(tied_embeddings=False, num_layers=2),
  "multi_head": tiny.model_config(num_heads=4, num_kv_heads=4, head_dim=0, ff_groups=1, num_layers=2),
  "multi_query": tiny.model_config(num_heads=4, num_kv_heads=1, num_layers=2),
  "qwen": tiny.model_config(qk_norm=True, qkv_bias=True, num_layers=2),
  "linear_rope": tiny.model_config(rope_scaling=LINEAR, rope_theta=50.0, num_layers=2),
  "llama3_rope": tiny.model_config(rope_scaling=LLAMA3, rope_theta=500.0, head_dim=12, num_layers=2),
}


def run(config, params, batch):
  return jax.jit(Transformer(config).apply)({"params": params}, batch)


@pytest.fixture(scope="module")
def model():
  """A compiled model (a function of a batch) and its config."""
  config = tiny.model_config(qkv_bias=True, qk_norm=True)
  params = tiny.random_params(config)
  apply = jax.jit(Transformer(config).apply)
  return config, params, lambda batch: np.asarray(apply({"params": params}, batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_the_slow_numpy_model(variant):
  config = VARIANTS[variant]
  params, batch = tiny.random_params(config), tiny.packed_batch(config)
  expected = numpy_transformer.logits(config, params, batch)
  np.testing.assert_allclose(run(config, params, batch), expected, rtol=0, atol=1e-5)
  assert np.abs(expected).max() > 1


@pytest.mark.parametrize("scaling", [RopeScaling(), LINEAR, LLAMA3], ids=lambda s: s.kind)
def test_rope_is_a_rotation_in_the_complex_plane(scaling):
  config = tiny.model_config(rope_scaling=scaling, head_dim=12)
  x = np.random.default_rng(0).normal(size=(1, 5, 1, 12)).astype(np.float32)
  positions = np.array([0, 1, 7, 100, 63])
  turned = apply_rope(jnp.asarray(x), *rope_table(config, jnp.asarray(positions[None])))
  expected = np.stack([numpy_transformer.rotate(config, row, p) for row, p in zip(x[0, :, 0], positions)])
  np.testing.assert_allclose(turned[0, :, 0], expected, atol=2e-5)


def test_rope_scores_depend_on_the_distance_only():
  config = tiny.model_config(head_dim=8)
  x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)

  def score(first, second):
    pair = jnp.asarray(x)[None, :, None]
    turned = apply_rope(pair, *rope_table(config, jnp.array([[first, second]])))[0, :, 0]
    return float(turned[0] @ turned[1])

  assert score(3, 10) == pytest.approx(score(23, 30), abs=1e-4)
  assert abs(score(3, 10) - score(3, 11)) > 1e-3


@pytest.mark.parametrize("position", [0, 4, 7])
def test_a_token_changes_no_logits_before_it(model, position):
  config, _, apply = model
  batch = tiny.one_document(config)
  changed = {**batch, "inputs": batch["inputs"].at[:, position].add(1) % config.vocab_size}
  before, after = apply(batch), apply(changed)
  np.testing.assert_array_equal(before[:, :position], after[:, :position])
  assert (before[:, position:] != after[:, position:]).any(axis=-1).all()


def test_documents_of_a_row_do_not_see_each_other(model):
  config, _, apply = model
  batch = tiny.packed_batch(config)
  first = batch["segment_ids"] == 1
  changed = {**batch, "inputs": jnp.where(first, batch["inputs"] + 1, batch["inputs"]) % config.vocab_size}
  before, after = apply(batch), apply(changed)
  np.testing.assert_array_equal(before[~np.asarray(first)], after[~np.asarray(first)])
  assert (before[first] != after[first]).any(axis=-1).all()


def test_padding_changes_nothing(model):
  config, _, apply = model
  batch = tiny.packed_batch(config)
  padding = batch["segment_ids"] == 0
  assert padding.any()
  changed = {**batch, "inputs": jnp.where(padding, 5, batch["inputs"]), "positions": batch["positions"] + 3 * padding}
  real = ~np.asarray(padding)
  np.testing.assert_array_equal(apply(batch)[real], apply(changed)[real])


def test_a_packed_document_equals_the_document_alone(model):
  config, params, apply = model
  batch = tiny.packed_batch(config, rows=1)
  where = np.asarray(batch["segment_ids"][0]) == 2
  alone = {name: array[:, where] for name, array in batch.items()}
  np.testing.assert_allclose(run(config, params, alone)[0], apply(batch)[0, where], atol=1e-5)


def test_cached_steps_equal_one_forward_pass(model):
  config, params, apply = model
  batch = tiny.one_document(config)
  params, empty_cache, step = decoding.dense(config, params)
  step, cache, expected, start = jax.jit(step), empty_cache(2, 11), apply(batch), 0
  for length in (1, 1, 1, 4, 1):
    tokens = batch["inputs"][:, start : start + length]
    logits, cache, _ = step(params, tokens, jnp.full((2,), length), cache)
    start += length
    np.testing.assert_allclose(logits, expected[:, start - 1], atol=1e-5)


@pytest.mark.parametrize("groups", [2, 6])
def test_feed_forward_groups_change_no_result(groups):
  one, many = tiny.model_config(ff_groups=1), tiny.model_config(ff_groups=groups)
  params, batch = tiny.random_params(one), tiny.packed_batch(one)
  mlp = {name: x.reshape(s.shape) for (name, x), s in zip(
    sorted(params["layers"]["mlp"].items()), jax.tree.leaves(nn.unbox(tiny.shapes(many))["layers"]["mlp"])
  )}  # fmt: skip
  grouped = {**params, "layers": {**params["layers"], "mlp": mlp}}
  np.testing.assert_allclose(run(many, grouped, batch), run(one, params, batch), atol=1e-5)


def gradient(config, params, batch):
  def loss(params):
    logits = Transformer(config).apply({"params": params}, batch)
    return losses.mean(losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0))

  compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
  return compiled(params), compiled.as_text().count(" dot(")


@pytest.fixture(scope="module")
def plain_gradient():
  config = tiny.model_config(num_layers=2)
  params, batch = tiny.random_params(config), tiny.packed_batch(config)
  return config, params, batch, *gradient(config, params, batch)


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}], ids=str)
def test_remat_and_unroll_change_neither_loss_nor_gradient(plain_gradient, changes):
  config, params, batch, expected, dots = plain_gradient
  found, found_dots = gradient(dataclasses.replace(config, **changes), params, batch)
  tiny.assert_trees_close(found, expected, rtol=1e-5)
  assert found_dots > dots or changes == {"remat": "dots"}, "the setting must reach the compiled program"


def test_remat_takes_less_memory():
  """As configs leave it: were the layers unrolled, it would not."""
  config = tiny.model_config(num_layers=8, scan_unroll=0)
  batch = tiny.one_document(config, rows=4, length=64)

  def scratch(remat):
    model = Transformer(dataclasses.replace(config, remat=remat))
    loss = lambda params: jnp.mean(model.apply({"params": params}, batch) ** 2)
    return jax.jit(jax.grad(loss)).lower(tiny.random_params(config)).compile().memory_analysis().temp_size_in_bytes

  assert scratch("full") < 0.4 * scratch("none")


def test_bfloat16_computes_close_to_float32_and_returns_float32_logits():
  config = tiny.model_config()
  half = dataclasses.replace(config, dtype="bfloat16")
  params, batch = tiny.random_params(config), tiny.packed_batch(config)
  logits, expected = run(half, params, batch), run(config, params, batch)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - expected).max() < 0.2


def test_parameters_are_stored_as_param_dtype():
  config = tiny.model_config(param_dtype="bfloat16", dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(nn.unbox(tiny.shapes(config)))} == {jnp.dtype("bfloat16")}
  assert decoding.empty_layer(config, 1, 4).key.dtype == jnp.bfloat16


@pytest.mark.parametrize("variant", ["plain", "untied", "qwen"])
def test_every_parameter_names_its_axes(variant):
  boxes = jax.tree.leaves(tiny.shapes(VARIANTS[variant]), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  known = {name for name, _ in RULES}
  for box in boxes:
    assert isinstance(box, nn.LogicallyPartitioned)
    assert len(box.names) == box.value.ndim
    assert set(box.names) <= known
  assert sum(box.names[0] == "layers" for box in boxes) == len(boxes) - (2 if variant != "untied" else 3)


def test_initial_residual_outputs_shrink_with_depth():
  config = tiny.model_config(num_layers=2, d_model=32, d_ff=192, head_dim=16)
  layers = nn.unbox(jax.jit(lambda: init_params(Transformer(config), jax.random.key(0)))())["layers"]
  for matrix, expected in (
    (layers["attention"]["query"], 0.02), (layers["mlp"]["up"], 0.02),
    (layers["attention"]["out"], 0.02 / 2), (layers["mlp"]["down"], 0.02 / 2),
  ):  # fmt: skip
    assert float(jnp.std(matrix)) == pytest.approx(expected, rel=0.05)

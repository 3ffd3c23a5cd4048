import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import executors
from adaptive import subnet as subnets
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.subnet import Subnet

CONFIG = tiny.model_config(qkv_bias=True)
PARAMS = tiny.random_params(CONFIG)
BATCH = tiny.packed_batch(CONFIG)
FULL = subnets.prefix(CONFIG)
FAMILY = (
  Subnet((0,), 1, 8),
  Subnet((3,), 3, 8),
  Subnet((0, 1), 3, 24),
  Subnet((0, 3), 1, 24),
  Subnet((1, 2), 2, 16),
  Subnet((0, 1, 2), 1, 8),
  Subnet((0, 2, 3), 2, 16),
  Subnet((1, 2, 3), 3, 8),
  Subnet((0, 1, 2, 3), 1, 24),
  Subnet((0, 1, 2, 3), 3, 8),
  Subnet((0, 1, 2, 3), 1, 8),
  FULL,
)
TABLE = executors.choices(CONFIG, FAMILY)
ALL = range(len(FAMILY))
name_of = lambda i: f"{FAMILY[i].layer_path}-{FAMILY[i].q_per_kv}-{FAMILY[i].d_ff}".replace(" ", "")
every_subnet = pytest.mark.parametrize("index", ALL, ids=name_of)
STATIC = (0, 2, 4, 6, 7, 8, 10, 11)  # each compiles its own program, so not all of them


def with_gradient(logits_fn):
  """Jitted (params, batch, ...) -> (logits, gradient of a loss that weighs every logit differently)."""

  def loss(params, *args):
    logits = logits_fn(params, *args)
    weights = jnp.sin(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
    return jnp.sum(jax.nn.log_softmax(logits) * weights), logits

  def run(params, *args):
    grads, logits = jax.grad(loss, has_aux=True)(params, *args)
    return logits, grads

  return jax.jit(run)


def of_family(executor):
  return with_gradient(lambda params, batch, index: executor(CONFIG, params, batch, TABLE, index))


SWITCH, MASK = of_family(executors.switch), of_family(executors.mask)


@functools.cache
def static(index):
  return with_gradient(lambda params, batch: executors.static(CONFIG, params, batch, FAMILY[index]))


def run(executor, index, params=PARAMS, batch=BATCH):
  """(logits, gradients) of a sub-network of the family."""
  if executor == "static":
    return static(index)(params, batch)
  return {"switch": SWITCH, "mask": MASK}[executor](params, batch, index)


@functools.cache
def extracted(subnet):
  return jax.jit(Transformer(subnets.config_of(CONFIG, subnet)).apply)


@every_subnet
def test_all_executors_agree_on_logits_and_gradients(index):
  logits, grads = run("mask", index)
  for executor in ("switch", "static") if index in STATIC else ("switch",):
    found, found_grads = run(executor, index)
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    tiny.assert_trees_close(found_grads, grads, rtol=1e-4, atol=1e-7)
  assert np.abs(logits).max() > 0.5


@pytest.mark.parametrize("index", [0, 2, 6, 8, 11], ids=name_of)
def test_static_equals_the_extracted_dense_model_bitwise(index):
  params = subnets.extract(CONFIG, PARAMS, FAMILY[index])
  alone = extracted(FAMILY[index])({"params": params}, BATCH)
  inside = jax.jit(lambda params: executors.static(CONFIG, params, BATCH, FAMILY[index]))(PARAMS)
  np.testing.assert_array_equal(inside, alone)


def test_the_full_sub_network_is_the_plain_model_bitwise():
  plain = extracted(FULL)({"params": PARAMS}, BATCH)
  np.testing.assert_array_equal(jax.jit(lambda p: executors.static(CONFIG, p, BATCH, FULL))(PARAMS), plain)
  for executor in (executors.switch, executors.mask):
    found = jax.jit(lambda p, e=executor: e(CONFIG, p, BATCH, TABLE, len(FAMILY) - 1))(PARAMS)
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("index", [0, 4, 6, 8], ids=name_of)
def test_cached_decoding_of_an_extracted_sub_network_equals_it_inside_the_parent(index):
  config, length = subnets.config_of(CONFIG, FAMILY[index]), 6
  batch = tiny.one_document(CONFIG, length=length)
  expected, _ = SWITCH(PARAMS, batch, index)
  params, empty_cache, step = decoding.dense(config, subnets.extract(CONFIG, PARAMS, FAMILY[index]))
  cache, start = empty_cache(2, length + 2), 0
  for tokens in (3, 1, 1, 1):
    counts = jnp.full((2,), tokens)
    logits, cache, _ = jax.jit(step)(params, batch["inputs"][:, start : start + tokens], counts, cache)
    start += tokens
    np.testing.assert_allclose(logits, expected[:, start - 1], atol=1e-5)
  shapes = [layer.key.shape for layer in cache.layers]
  assert shapes == [(2, 2, length + 2, 4)] * len(FAMILY[index].layer_path), "the parent's key/value heads"


@pytest.mark.parametrize("path", [(0, 1, 1, 2), (2, 0)], ids=str)
def test_layers_may_repeat_and_change_order_in_the_static_executor(path):
  subnet = Subnet(path, 2, 16)
  layers = jax.tree.map(lambda leaf: jnp.stack([leaf[i] for i in path]), PARAMS["layers"])
  chosen = subnets.extract(CONFIG, {**PARAMS, "layers": layers}, Subnet(tuple(range(len(path))), 2, 16))
  expected = extracted(Subnet(tuple(range(len(path))), 2, 16))({"params": chosen}, BATCH)
  found = jax.jit(lambda params: executors.static(CONFIG, params, BATCH, subnet))(PARAMS)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  with pytest.raises(ValueError, match="only the static executor"):
    executors.choices(CONFIG, [FULL, subnet])


def wrong_heads(layers):
  """The first heads of the flat head axis: all of them from the first key/value group."""
  attention = dict(layers["attention"])
  for name, at in (("query", 2), ("query_bias", 1), ("out", 1)):
    leaf = attention[name]
    flat = leaf.reshape(*leaf.shape[:at], -1, *leaf.shape[at + 2 :])
    attention[name] = jnp.expand_dims(jax.lax.slice_in_dim(flat, 0, 2, axis=at), at + 1)
  return {**layers, "attention": attention}


def wrong_channels(layers):
  """The first channels of the flat feed-forward axis: all of them from the first group."""
  first = lambda x, axis: jax.lax.slice_in_dim(x, 0, 1, axis=axis)
  gate, up, down = (layers["mlp"][name] for name in ("gate", "up", "down"))
  split = lambda x, axis: first(x, axis)[..., :8].reshape(*x.shape[:2], 2, 4)
  down = first(down, 1)[:, :, :8].reshape(down.shape[0], 2, 4, -1)
  return {**layers, "mlp": {"gate": split(gate, 2), "up": split(up, 2), "down": down}}


@pytest.mark.parametrize(("wrong", "subnet"), [
  (wrong_heads, Subnet((0, 1, 2, 3), 1, 24)), (wrong_channels, Subnet((0, 1, 2, 3), 3, 8)),
])  # fmt: skip
def test_a_slice_across_groups_would_be_noticed(wrong, subnet):
  right = subnets.extract(CONFIG, PARAMS, subnet)
  sliced = {**PARAMS, "layers": wrong(PARAMS["layers"])}
  assert jax.tree.map(jnp.shape, sliced) == jax.tree.map(jnp.shape, right)
  logits = [extracted(subnet)({"params": p}, BATCH) for p in (right, sliced)]
  assert np.abs(logits[0] - logits[1]).max() > 0.1


@every_subnet
def test_a_sub_network_reads_nothing_outside_itself(index):
  inside = tiny.inside(CONFIG, PARAMS, FAMILY[index])
  poison = lambda value: jax.tree.map(lambda p, keep: jnp.where(keep, p, value), PARAMS, inside)
  for executor, value in (("static", jnp.nan), ("switch", jnp.nan), ("mask", 1e3)):
    if executor == "static" and index not in STATIC:
      continue
    clean, poisoned = run(executor, index), run(executor, index, poison(value))
    np.testing.assert_array_equal(poisoned[0], clean[0])
    kept = jax.tree.map(lambda g, keep: jnp.where(keep, g, 0), poisoned[1], inside)
    tiny.assert_trees_close(kept, clean[1], rtol=1e-5)


@pytest.mark.parametrize(("executor", "index"), [
  *(("switch", i) for i in ALL), *(("mask", i) for i in ALL), *(("static", i) for i in STATIC),
])  # fmt: skip
def test_gradients_are_zero_outside_and_not_inside(executor, index):
  _, grads = run(executor, index)
  inside = tiny.inside(CONFIG, PARAMS, FAMILY[index])
  for (path, grad), keep in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(inside)):
    outside = np.asarray(grad)[~keep]
    np.testing.assert_array_equal(outside, np.zeros_like(outside), err_msg=jax.tree_util.keystr(path))
    assert np.mean(np.asarray(grad)[keep] != 0) > 0.99, jax.tree_util.keystr(path)


@pytest.mark.parametrize("position", [2, 7])
@pytest.mark.parametrize("executor", ["static", "switch", "mask"])
def test_every_executor_is_causal(executor, position):
  batch = tiny.one_document(CONFIG, length=12)
  changed = {**batch, "inputs": batch["inputs"].at[:, position].add(1) % CONFIG.vocab_size}
  for index in ALL if executor != "static" else (0, 4, 10):
    before, after = (np.asarray(run(executor, index, batch=b)[0]) for b in (batch, changed))
    np.testing.assert_array_equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(axis=-1).all()


def family_of_160():
  config = tiny.model_config(
    vocab_size=16, num_layers=8, d_model=8, num_heads=4, num_kv_heads=1, head_dim=2, d_ff=5, ff_groups=1
  )
  return config, [subnets.prefix(config, d, q, f) for d in range(1, 9) for q in range(1, 5) for f in range(1, 6)]


@pytest.mark.parametrize("executor", [executors.switch, executors.mask])
def test_one_program_serves_160_sub_networks(executor):
  config, family = family_of_160()
  table, params, batch = executors.choices(config, family), tiny.random_params(config), tiny.one_document(config, 1, 4)
  apply = jax.jit(lambda index: executor(config, params, batch, table, index))
  outputs = {np.asarray(apply(index)).tobytes() for index in range(160)}
  assert len(family) == len(outputs) == 160
  assert apply._cache_size() == 1


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_differentiating_through_switch_stores_no_residuals_of_layers(remat):
  """A further layer costs its input, its gradient and its share of the parameters, not the insides of all branches."""
  rows, length = 8, 64

  def memory(num_layers):
    config = tiny.model_config(num_layers=num_layers, d_model=8, num_heads=4, head_dim=8, d_ff=64, remat=remat)
    family = [subnets.prefix(config, num_layers, q, f) for q, f in ((1, 16), (2, 32), (2, 64))]
    table, batch = executors.choices(config, family), tiny.one_document(config, rows, length)
    loss = lambda params, index: jnp.sum(executors.switch(config, params, batch, table, index))
    params = jax.tree.map(jnp.zeros_like, tiny.random_params(config))
    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.int32(0)).compile()
    layer_input, layer = 4 * rows * length * config.d_model, 4 * sum(x.size for x in jax.tree.leaves(params["layers"]))
    return compiled.memory_analysis().temp_size_in_bytes, layer_input, layer / num_layers

  (few, layer_input, layer), (many, _, _) = memory(2), memory(8)
  assert many - few < 6 * 2 * (layer_input + layer)


def operations(text):
  """How often each kind of instruction that moves control or data stands in a compiled program."""
  kinds = ("conditional", "all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")
  return collections.Counter({kind: text.count(f" {kind}(") + text.count(f" {kind}-start(") for kind in kinds})


def test_switch_branches_in_the_compiled_program_and_mask_does_not():
  counts = {
    name: operations(fn.lower(PARAMS, BATCH, 0).compile().as_text())
    for name, fn in (("switch", SWITCH), ("mask", MASK))
  }
  assert counts["switch"]["conditional"] >= 2, "one in the forward pass, one in the backward pass"
  assert counts["mask"]["conditional"] == 0


@pytest.mark.parametrize(("fields", "message"), [
  (dict(layer_path=()), "needs at least one layer"),
  (dict(layer_path=(0, 4)), "not all among the model's 4"),
  (dict(layer_path=(-1,)), "not all among"),
  (dict(q_per_kv=4), "must lie in 1..3"),
  (dict(q_per_kv=0), "must lie in 1..3"),
  (dict(d_ff=7), "multiple of model.ff_groups=2"),
  (dict(d_ff=26), "at most 24"),
])  # fmt: skip
def test_an_impossible_sub_network_is_refused_in_one_line(fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    subnets.validate(CONFIG, Subnet(**{"layer_path": (0, 1), "q_per_kv": 2, "d_ff": 8, **fields}))
  assert "\n" not in str(error.value)

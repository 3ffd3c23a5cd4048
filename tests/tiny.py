"""Small models, parameters and batches for the tests, and which parameters a sub-network holds, worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import sharding
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import MeshConfig, ModelConfig


def model_config(**changes) -> ModelConfig:
  """Four layers, two groups of three query heads, and heads that do not add up to d_model."""
  fields = dict(
    vocab_size=32, num_layers=4, d_model=16, d_ff=24, num_heads=6, num_kv_heads=2, head_dim=4, ff_groups=2,
    scan_unroll=1,
  )  # fmt: skip
  return ModelConfig(**{**fields, **changes})


def shapes(model: ModelConfig | nn.Module):
  """Abstract parameters of a model, or of the plain one with this config, boxed with their logical axis names."""
  model = Transformer(model) if isinstance(model, ModelConfig) else model
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def random_params(model: ModelConfig | nn.Module, seed: int = 0):
  """Parameters large enough for every one of them to matter: no norm is 1, no bias is 0."""
  rng = np.random.default_rng(seed)

  def values(path, leaf):
    noise = rng.normal(size=leaf.shape)
    return jnp.asarray(1 + 0.2 * noise if path[-1].key == "scale" else 0.3 * noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(values, nn.unbox(shapes(model)))


def packed_batch(config: ModelConfig, rows: int = 2, length: int = 12, seed: int = 0) -> dict:
  """Rows of two documents and padding, of unequal lengths."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    first = 2 + row % (length // 2)
    for segment, (start, stop) in enumerate(((0, first), (first, length - 1 - row % 3)), start=1):
      segments[row, start:stop] = segment
      positions[row, start:stop] = np.arange(stop - start)
  tokens = rng.integers(0, config.vocab_size, (2, rows, length), np.int32)
  batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": segments, "positions": positions}
  return jax.tree.map(jnp.asarray, batch)


def labels(config: ModelConfig, batch: dict, seed: int = 0) -> dict:
  """Of a batch of questions: a random plan for every row, and an answer that begins after three quarters of it."""
  rows, length = batch["inputs"].shape
  visits = np.random.default_rng(seed).integers(0, 3, (rows, config.num_layers), np.int32)
  counts = np.broadcast_to(np.bincount(visits.ravel(), minlength=3).astype(np.int32), (rows, 3))
  scored = (np.arange(length) >= 3 * length // 4) & (np.asarray(batch["segment_ids"]) > 0)
  return jax.tree.map(jnp.asarray, {"visits": visits, "label_counts": counts, "scored": scored.astype(np.int32)})


def one_document(config: ModelConfig, rows: int = 2, length: int = 8, seed: int = 0) -> dict:
  """Rows that are one document each, without padding."""
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, rows, length), np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": np.ones_like(positions), "positions": positions}
  return jax.tree.map(jnp.asarray, batch)


def inside(config: ModelConfig, params, subnet):
  """Boolean arrays: True where a parameter belongs to the sub-network."""
  heads, channels = subnet.q_per_kv, subnet.d_ff // config.ff_groups

  def member(path, leaf):
    keep = np.ones(leaf.shape, bool)
    if path[0].key != "layers":
      return keep
    keep[[layer for layer in range(config.num_layers) if layer not in subnet.layer_path]] = False
    match path[-1].key:
      case "query":  # l d k g h
        keep[:, :, :, heads:] = False
      case "query_bias" | "out":  # l k g h [d]
        keep[:, :, heads:] = False
      case "gate" | "up":  # l d m f
        keep[:, :, :, channels:] = False
      case "down":  # l m f d
        keep[:, :, channels:] = False
    return keep

  return jax.tree_util.tree_map_with_path(member, params)


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1):
  return sharding.make_mesh(MeshConfig(data, fsdp, tensor))


def spread(model: ModelConfig | nn.Module, params, batch, on):
  """Parameters and batch on the devices of a mesh."""
  params = jax.device_put(params, sharding.state_shardings(shapes(model), on))
  return params, jax.device_put(batch, sharding.batch_sharding(on))


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
  """Leaf by leaf; `rtol` is of the largest value of the leaf, since small entries are differences of large ones."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol + rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

"""The dense model as generation runs it: rows of different lengths, a few tokens of each at a time."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone.attention import LayerCache
from adaptive.backbone.transformer import Params, Transformer
from adaptive.backbone.transformer import empty_cache as empty_layers
from adaptive.config import ModelConfig


class Cache(NamedTuple):
  """Keys and values of all layers, each [l, b, slots, k, h], and how many tokens each row holds, int32 [b]."""

  layers: LayerCache
  lengths: jax.Array


def dense(config: ModelConfig, params: Params) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step` of a dense model, in the order of `Decoder` in `adaptive.methods.contract`.

  The parameters come in the dtype that computes: a step reads every one of them, and does little else.
  """
  # Scanned layers compile in half the time of unrolled ones, and one token is no slower.
  model = Transformer(dataclasses.replace(config, remat="none", scan_unroll=1))

  def empty_cache(batch_size: int, slots: int) -> Cache:
    return Cache(empty_layers(config, batch_size, slots), jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    logits, layers = model.apply({"params": params}, tokens, cache.layers, cache.lengths, counts, method="step")
    return logits, Cache(layers, cache.lengths + counts), {}

  return jax.tree.map(lambda x: x.astype(config.dtype), params), empty_cache, step

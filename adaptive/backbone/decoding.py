"""Layers as generation runs them: rows of different lengths, a few tokens of each at a time.

Each layer has parameters and a cache of its own here. Stacked ones are shorter to compile, but a step would then copy
every layer's weights and keys out of the stack, and the keys back.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone.attention import Context, LayerCache, cache_mask, rope_table, row_slots
from adaptive.backbone.transformer import Block, Params, Transformer
from adaptive.config import ModelConfig


class Cache(NamedTuple):
  """Keys and values of each layer, and how many tokens each row holds, int32 [b]."""

  layers: tuple[LayerCache, ...]
  lengths: jax.Array


def unstack(layers: Params, dtype: str) -> tuple[Params, ...]:
  """Stacked layers [l, ...] -> l trees, in another dtype; layer by layer, so that no third copy of all is made."""
  cut = lambda i: jax.tree.map(lambda leaf: leaf[i].astype(dtype), layers)
  return tuple(cut(i) for i in range(jax.tree.leaves(layers)[0].shape[0]))


def unstacked(config: ModelConfig, params: Params, kept: Sequence[str] = ()) -> Params:
  """A model's parameters as steps read them: layers apart, everything but what is `kept` in the dtype that computes."""
  rest = {name: part for name, part in params.items() if name not in ("layers", *kept)}
  as_they_are = {name: params[name] for name in kept}
  cast = jax.tree.map(lambda x: x.astype(config.dtype), rest)
  return {**cast, **as_they_are, "layers": unstack(params["layers"], config.dtype)}


def empty_layer(config: ModelConfig, batch_size: int, slots: int) -> LayerCache:
  """One layer's cache of zeros."""
  shape = (batch_size, config.num_kv_heads, slots, config.head_size)
  return LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def run_layers(
  config: ModelConfig, layers: Sequence[Params], x: jax.Array, context: Context, caches: Sequence[LayerCache]
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
  """Layers one after the other, each with its cache: [b, t, d] -> ([b, t, d], caches)."""
  block, after = Block(config), []
  for layer, cache in zip(layers, caches, strict=True):
    x, cache = block.apply({"params": layer}, x, context, cache)
    after.append(cache)
  return x, tuple(after)


def context_of(config: ModelConfig, lengths: jax.Array, counts: jax.Array, length: int, slots: int) -> Context:
  """That of `length` tokens which follow the `lengths` [b] of each row, of which the first counts [b] are stored."""
  positions = lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  mask, written = cache_mask(lengths, length, slots), row_slots(lengths, counts, length, slots)
  return Context(*rope_table(config, positions), mask, written)


def last_of(x: jax.Array, counts: jax.Array) -> jax.Array:
  """Each row's last real token, [b, t, d] -> [b, 1, d]."""
  return jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)


def dense(config: ModelConfig, params: Params, path: Sequence[int] = ()) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step` of a dense model, in the order of `Decoder` in `adaptive.methods.contract`.

  The parameters come in the dtype that computes: a step reads every one of them, and does little else.

  Args:
    path: which of the layers run, in order; all of them unless given. One that runs twice has two caches.
  """
  model, params = Transformer(config), unstacked(config, params)
  path = tuple(path) or range(len(params["layers"]))

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = tuple(empty_layer(config, batch_size, slots) for _ in path)
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    context = context_of(config, cache.lengths, counts, tokens.shape[1], cache.layers[0].key.shape[2])
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    x, layers = run_layers(config, [params["layers"][i] for i in path], x, context, cache.layers)
    logits = model.apply({"params": params}, last_of(x, counts), method="head")[:, 0]
    return logits, Cache(layers, cache.lengths + counts), {}

  return params, empty_cache, step

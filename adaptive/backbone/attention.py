"""Grouped-query attention with rotary position embedding.

Einsum letters: b batch, t query position, s key position, d d_model, k key/value head, g query heads of one key/value
head, h head size. Weights keep k and g apart, so that fewer query heads per group is a prefix of the g axis in every
group, and k can be sharded.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.layers import RMSNorm, param, residual_init
from adaptive.config import ModelConfig, RopeScaling


class Context(NamedTuple):
  """What all layers of one forward pass share.

  Attributes:
    sin, cos: rotary table, float32 [b, t, h / 2].
    mask: which keys a query may see, bool [b, 1, t, s]; None means plain causal.
    cache_index: slot of the first token in the key/value cache, int32 []; None without a cache.
  """

  sin: jax.Array
  cos: jax.Array
  mask: jax.Array | None = None
  cache_index: jax.Array | None = None


class LayerCache(NamedTuple):
  """Keys (already rotated) and values of one layer, [b, s, k, h]; with a leading layer axis when stacked."""

  key: jax.Array
  value: jax.Array


def rope_frequencies(head_size: int, theta: float, scaling: RopeScaling) -> jax.Array:
  """Radians per position of each rotated pair, float32 [h / 2] (Su et al. 2021; scaling as in Llama 3.1)."""
  frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
  if scaling.kind == "none":
    return frequencies
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  turns = scaling.original_max_len * frequencies / (2 * jnp.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Positions [b, t] -> sin and cos, float32 [b, t, h / 2]."""
  frequencies = rope_frequencies(config.head_size, config.rope_theta, config.rope_scaling)
  angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None]
  return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + h / 2) of x, [b, t, heads, h], by a table of [b, t, h / 2]."""
  sin, cos = sin[:, :, None], cos[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def segment_mask(segment_ids: jax.Array) -> jax.Array:
  """Causal mask of packed rows: a query sees earlier keys of its own segment. [b, t] -> bool [b, 1, t, t].

  Padding (segment 0) sees itself, so that no softmax is empty; its loss is masked.
  """
  length = segment_ids.shape[1]
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return (same & jnp.tril(jnp.ones((1, length, length), bool)))[:, None]


def cache_mask(index: jax.Array, length: int, slots: int) -> jax.Array:
  """Mask of `length` queries written from slot `index` on, over a cache of `slots`; bool [1, 1, length, slots]."""
  return (jnp.arange(slots)[None] <= index + jnp.arange(length)[:, None])[None, None]


class Attention(nn.Module):
  """Causal grouped-query attention (Ainslie et al. 2023), [b, t, d] -> [b, t, d]."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None = None):
    """Returns the output and the cache with this call's keys and values written in (None without a cache)."""
    query, key, value = self._project(x, context)
    if cache is not None:
      start = (0, context.cache_index, 0, 0)
      cache = LayerCache(*(jax.lax.dynamic_update_slice(*old_new, start) for old_new in zip(cache, (key, value))))
      key, value = cache
    attended = self._attend(query, key, value, context.mask)
    c = self.config
    shape = (c.num_kv_heads, c.q_per_kv, c.head_size, c.d_model)
    out = param(self, "out", residual_init(c), shape, ("kv_heads", "q_per_kv", "head_dim", "embed"))
    return jnp.einsum("btkgh,kghd->btd", attended.reshape(*attended.shape[:2], *shape[:3]), out), cache

  def _project(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [b, t, k * g, h], rotated keys and plain values [b, t, k, h]."""
    c, init = self.config, nn.initializers.normal(self.config.init_std)
    k, g, h = c.num_kv_heads, c.q_per_kv, c.head_size
    q_axes, kv_axes = ("kv_heads", "q_per_kv", "head_dim"), ("kv_heads", "head_dim")
    query = jnp.einsum("btd,dkgh->btkgh", x, param(self, "query", init, (c.d_model, k, g, h), ("embed", *q_axes)))
    key = jnp.einsum("btd,dkh->btkh", x, param(self, "key", init, (c.d_model, k, h), ("embed", *kv_axes)))
    value = jnp.einsum("btd,dkh->btkh", x, param(self, "value", init, (c.d_model, k, h), ("embed", *kv_axes)))
    if c.qkv_bias:
      zeros = nn.initializers.zeros
      query += param(self, "query_bias", zeros, (k, g, h), q_axes)[None, None]
      key += param(self, "key_bias", zeros, (k, h), kv_axes)[None, None]
      value += param(self, "value_bias", zeros, (k, h), kv_axes)[None, None]
    if c.qk_norm:
      query = RMSNorm(c, "head_dim", name="query_norm")(query)
      key = RMSNorm(c, "head_dim", name="key_norm")(key)
    query = query.reshape(*query.shape[:2], k * g, h)  # head n = (k, g) in that order: group n // g, as in GQA
    return apply_rope(query, context.sin, context.cos), apply_rope(key, context.sin, context.cos), value

  def _attend(self, query, key, value, mask) -> jax.Array:
    """softmax(q k / sqrt(h)) v, [b, t, k * g, h]. The scale is the head size's, which no sub-model changes."""
    return jax.nn.dot_product_attention(
      query, key, value, mask=mask, is_causal=mask is None, implementation=self.config.attention
    )

"""Grouped-query attention with rotary position embedding.

Einsum letters: b batch, t query position, s key position, d d_model, k key/value head, g query heads of one key/value
head, h head size. Weights keep k and g apart, so that fewer query heads per group is a prefix of the g axis in every
group, and k can be sharded.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.layers import RMSNorm, param, project_out, residual_init
from adaptive.config import ModelConfig, RopeScaling

_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # of a score; finite, for a row that sees nothing


class Context(NamedTuple):
  """What all layers of one forward pass share.

  Attributes:
    sin, cos: rotary table, float32 [b, t, h / 2].
    mask: which keys a query may see, bool [b, 1, t, s]; None means plain causal.
    slots: where in the key/value cache this call's keys and values go: the slot of the first token, int32 [], the
      others follow; or each token's own, int32 [b, t], where a slot past the end stores nothing. None with a cache:
      keys and values are there already, and no new ones are computed.
  """

  sin: jax.Array
  cos: jax.Array
  mask: jax.Array | None = None
  slots: jax.Array | None = None


class LayerCache(NamedTuple):
  """Keys (already rotated) and values of one layer, [b, k, s, h]; with a leading layer axis when stacked.

  Heads come before slots, as the products of a decoding step read them: the other order costs a transposed copy.
  """

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
  """Mask of `length` queries written from each row's slot index [b] on, over `slots`: bool [b, 1, length, slots]."""
  query = index[:, None, None, None] + jnp.arange(length)[None, None, :, None]
  return jnp.arange(slots)[None, None, None] <= query


def row_slots(index: jax.Array, counts: jax.Array, length: int, slots: int) -> jax.Array:
  """Slots of `length` tokens of each row, int32 [b, length]: from index[row] on; none for those after counts[row]."""
  offset = jnp.arange(length)[None]
  return jnp.where(offset < counts[:, None], index[:, None] + offset, slots)


def write(cache: LayerCache, new: LayerCache, slots: jax.Array) -> LayerCache:
  """The cache with new keys and values [b, t, k, h] in it; `slots` as in `Context`."""
  new = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), new)
  if slots.ndim == 0:
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice(old, x, (0, 0, slots, 0)), cache, new)
  if slots.size == 1:
    # XLA makes a slice update of a scatter of one, and on a CPU does it twice, for the product and for the result: four
    # copies of the cache. A second entry that stores nothing keeps it a scatter, which works in place.
    slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=cache.key.shape[2])
    new = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))), new)
  # vmap, not an index per row: the partitioner then sees that rows stay on their devices.
  put = jax.vmap(lambda old, x, slot: old.at[:, slot].set(x, mode="drop"))
  return jax.tree.map(lambda old, x: put(old, x, slots), cache, new)


def attend_cache(query: jax.Array, cache: LayerCache, mask: jax.Array) -> jax.Array:
  """softmax(q k / sqrt(h)) v over a cache, [b, t, k * g, h]; the mask is [b, 1, t, s].

  The queries of a key head are the rows of one product per head and row. For a single token on a CPU
  `jax.nn.dot_product_attention` becomes slower ones.
  """
  (b, t, _, h), (k, s) = query.shape, cache.key.shape[1:3]
  rows = jnp.moveaxis(query.reshape(b, t, k, -1, h), 1, 3)  # b k g t h
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  scores = product("bkqh,bksh->bkqs", rows.reshape(b, k, -1, h), cache.key).reshape(*rows.shape[:4], s)
  weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores / math.sqrt(h), _MASKED), axis=-1).astype(query.dtype)
  attended = product("bkqs,bksh->bkqh", weights.reshape(b, k, -1, s), cache.value).reshape(rows.shape)
  return jnp.moveaxis(attended.astype(query.dtype), 3, 1).reshape(query.shape)


class Attention(nn.Module):
  """Causal grouped-query attention (Ainslie et al. 2023), [b, t, d] -> [b, t, d]."""

  config: ModelConfig

  def setup(self):
    c = self.config
    shape, heads = (c.num_kv_heads, c.q_per_kv, c.head_size), ("kv_heads", "q_per_kv", "head_dim")
    init, zeros = nn.initializers.normal(c.init_std), nn.initializers.zeros
    one, axes = (c.num_kv_heads, c.head_size), ("kv_heads", "head_dim")
    self.query = param(self, "query", init, (c.d_model, *shape), ("embed", *heads))
    if c.qkv_bias:
      self.query_bias = param(self, "query_bias", zeros, shape, heads)
    self.key = param(self, "key", init, (c.d_model, *one), ("embed", *axes))
    self.value = param(self, "value", init, (c.d_model, *one), ("embed", *axes))
    if c.qkv_bias:
      self.key_bias, self.value_bias = (param(self, name, zeros, one, axes) for name in ("key_bias", "value_bias"))
    if c.qk_norm:
      self.query_norm, self.key_norm = RMSNorm(c, "head_dim"), RMSNorm(c, "head_dim")
    self.out = param(self, "out", residual_init(c), (*shape, c.d_model), (*heads, "embed"))

  def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None = None):
    """Returns the output and the cache with this call's keys and values written in (None without a cache)."""
    query = self._query(x, context)
    if cache is None:
      attended = self._attend(query, *self.key_value(x, context), context.mask)
    else:
      if context.slots is not None:
        cache = write(cache, LayerCache(*self.key_value(x, context)), context.slots)
      attended = self._attend_cache(query, cache, context.mask)
    attended = attended.reshape(*attended.shape[:2], *self.out.shape[:3])
    return project_out(attended, self.out, flat=cache is not None), cache

  def _query(self, x: jax.Array, context: Context) -> jax.Array:
    """Rotated queries [b, t, k * g, h]."""
    query = jnp.einsum("btd,dkgh->btkgh", x, self.query)
    if self.config.qkv_bias:
      query += self.query_bias[None, None]
    if self.config.qk_norm:
      query = self.query_norm(query)
    # Head n = (k, g) in that order: group n // g, as in grouped-query attention.
    return apply_rope(query.reshape(*query.shape[:2], -1, query.shape[-1]), context.sin, context.cos)

  def key_value(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
    """Rotated keys and plain values, [b, t, k, h]."""
    key, value = (jnp.einsum("btd,dkh->btkh", x, weight) for weight in (self.key, self.value))
    if self.config.qkv_bias:
      key, value = key + self.key_bias[None, None], value + self.value_bias[None, None]
    if self.config.qk_norm:
      key = self.key_norm(key)
    return apply_rope(key, context.sin, context.cos), value

  def _attend_cache(self, query: jax.Array, cache: LayerCache, mask: jax.Array) -> jax.Array:
    if self.config.attention == "xla" or query.shape[1] == 1:
      return attend_cache(query, cache, mask)
    key, value = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), cache)
    return self._attend(query, key, value, mask)

  def _attend(self, query, key, value, mask) -> jax.Array:
    """softmax(q k / sqrt(h)) v, [b, t, k * g, h]. The scale is the head size's, which no sub-model changes."""
    return jax.nn.dot_product_attention(
      query, key, value, mask=mask, is_causal=mask is None, implementation=self.config.attention
    )

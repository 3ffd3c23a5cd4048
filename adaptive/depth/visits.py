"""Which layers a token visits, and what those that stay away leave there for later tokens to attend to.

A visit is one run of one layer; a layer that runs twice for a token is two visits, each with keys and values of its
own: caches are keyed by (layer, visit). A token that stays away from a visit keeps its residual stream, and

| rule      | its keys and values there are                                        | of |
|-----------|----------------------------------------------------------------------|----|
| `project` | the layer's own projections of the stream that it keeps              | CALM, SEC |
| `copy`    | those of the last visit that it made                                 | Unified Layer Skipping, MuE |
| `latest`  | those of its last visit to the same layer                            | recurrent depth |
| `hole`    | none: no token attends to it                                         | Mixture-of-Depths, FiRST |

Each rule has two faces that compute the same. `one_shot` runs whole rows: every token is computed, what stays away is
masked, and it can be differentiated. `step` runs a few new tokens of each row on caches, and leaves a visit out, but
for its keys, when none of the new tokens makes it.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import Context, LayerCache, write
from adaptive.backbone.transformer import REMAT_POLICIES, Block, Params
from adaptive.config import ModelConfig

Rule = Literal["project", "copy", "hole"]
KeyValues = Literal["project", "copy", "latest", "hole", "exact", "recompute"]


EMPTY = jnp.iinfo(jnp.int32).max  # a place that no query has reached


class Cache(NamedTuple):
  """Of one visit.

  Attributes:
    kv: keys and values [b, k, s, h].
    index: under `hole`, which stores tokens one after the other and needs no more room than so many make the visit:
      the place in its row of the token in each slot, int32 [b, s], `EMPTY` where there is none. Else None: a token's
      slot is its place.
  """

  kv: LayerCache
  index: jax.Array | None


def key_value(config: ModelConfig, layer: Params, x: jax.Array, context: Context) -> LayerCache:
  """A layer's keys and values of tokens [b, t, d], and nothing else of the layer."""
  return Block(config).apply({"params": layer}, x, context, method="key_value")


def nothing(config: ModelConfig, x: jax.Array) -> LayerCache:
  """Keys and values [b, k, t, h] of tokens that have made no visit yet: zeros."""
  shape = (x.shape[0], config.num_kv_heads, x.shape[1], config.head_size)
  return LayerCache(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))


def rule_of(kv: KeyValues) -> Rule:
  """The rule that visits know: `latest` is `copy` with a book for each layer (`sharing_a_book`)."""
  return "copy" if kv == "latest" else kv


def books(config: ModelConfig, x: jax.Array, path: Sequence[int], kv: KeyValues) -> tuple[LayerCache, ...]:
  """Where tokens [b, t, d] keep what `copy` copies: one for all layers, or under `latest` one for each."""
  return (nothing(config, x),) * (1 + max(path) if kv == "latest" else 1)


def sharing_a_book(path: Sequence[int], start: int, stop: int, kv: KeyValues) -> list[tuple[slice, int]]:
  """The layers start .. stop - 1 of a path in pieces that share a book, and which that is."""
  if kv != "latest":
    return [(slice(start, stop), 0)]
  return [(slice(layer, layer + 1), path[layer]) for layer in range(start, stop)]


def _where(active: jax.Array, new: LayerCache, old: LayerCache) -> LayerCache:
  return jax.tree.map(lambda a, b: jnp.where(active[:, None, :, None], a, b), new, old)


def one_shot(
  config: ModelConfig, layers: Params, x: jax.Array, context: Context, active: jax.Array, rule: Rule, last: LayerCache
) -> tuple[jax.Array, LayerCache]:
  """One visit of each of some stacked layers, in order, by the active tokens of whole rows.

  Args:
    layers: parameters stacked [n, ...]. x: residual stream [b, t, d]. active: bool [b, t].
    last: keys and values of each token's last visit, from `nothing` or from here; only `copy` needs them.

  Returns:
    The stream, where the inactive are as they were, and `last`.
  """
  block = Block(config, parent=None)

  def layer(carry, weights):
    x, last = carry
    if rule == "copy":
      last = _where(active, key_value(config, weights, x, context), last)
      y, _ = block.apply({"params": weights}, x, context._replace(slots=None), last)
    else:
      seen = context if rule == "project" else context._replace(mask=context.mask & visible(active))
      y, _ = block.apply({"params": weights}, x, seen)
    return (jnp.where(active[..., None], y, x), last), None

  if config.remat != "none":
    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat])
  number = jax.tree.leaves(layers)[0].shape[0]
  return jax.lax.scan(layer, (x, last), layers, unroll=config.unroll(number))[0] if number else (x, last)


def visible(active: jax.Array) -> jax.Array:
  """Keys that a hole leaves, bool [b, 1, t, t]: those of active tokens, and one's own, so that no softmax is empty."""
  return (active[:, None, :] | jnp.eye(active.shape[1], dtype=bool)[None])[:, None]


def empty(config: ModelConfig, rule: Rule, batch_size: int, slots: int) -> Cache:
  """Of one visit, with nothing in it; under `hole`, with room for so many tokens that make it."""
  index = jnp.full((batch_size, slots), EMPTY) if rule == "hole" else None
  return Cache(decoding.empty_layer(config, batch_size, slots), index)


def room(share: float, slots: int) -> int:
  """Slots under `hole` for at most a share of `slots` tokens; all of them from 1 on."""
  return min(slots, math.ceil(min(share, 1.0) * slots) + 1)  # one to spare, since budgets are computed in float32


def cut_back(cache: Cache, start: jax.Array) -> Cache:
  """With nothing in it from place `start` [b] on: what was refused may be another visit's when it comes again."""
  return cache._replace(index=jnp.where(cache.index < start[:, None], cache.index, EMPTY))


def step(
  config: ModelConfig,
  layers: Sequence[Params],
  x: jax.Array,
  context: Context,
  active: jax.Array,
  rule: Rule,
  caches: Sequence[Cache],
  last: LayerCache,
) -> tuple[jax.Array, tuple[Cache, ...], LayerCache]:
  """One visit of each of some layers by the active ones of a few new tokens [b, t, d]; what `one_shot` computes.

  Args:
    context: of the new tokens on the caches' slots, as `decoding.context_of` makes it.
    active: bool [b, t]. Where none is, the layers are not run at all.
  """

  def run(x, caches, last):
    after = []
    for layer, cache in zip(layers, caches, strict=True):
      x, cache, last = _visit(config, layer, x, context, active, rule, cache, last)
      after.append(cache)
    return x, tuple(after), last, [nothing(config, x)] * len(left)

  # Keys that are left are written outside: a conditional that stores in both of its branches copies the caches.
  left = {"project": layers, "copy": layers, "hole": ()}[rule]

  def leave(x, caches, last):
    of = lambda layer: key_value(config, layer, x, context) if rule == "project" else last
    return x, caches, last, [of(layer) for layer in left]

  entered = jnp.any(active)
  x, caches, last, kvs = jax.lax.cond(entered, run, leave, x, tuple(caches), last)
  if not left:
    return x, caches, last
  slots = jnp.where(entered, caches[0].kv.key.shape[2], context.slots)
  written = [write(cache.kv, _swap(kv), slots) for cache, kv in zip(caches, kvs, strict=True)]
  return x, tuple(cache._replace(kv=kv) for cache, kv in zip(caches, written)), last


def _swap(kv: LayerCache) -> LayerCache:
  """[b, k, t, h] <-> [b, t, k, h], the order in which `write` takes new tokens."""
  return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), kv)


def _visit(config, layer, x, context: Context, active, rule: Rule, cache: Cache, last: LayerCache):
  block, (kv, index) = Block(config), cache
  if rule == "copy":
    last = _where(active, key_value(config, layer, x, context), last)
    kv = write(kv, _swap(last), context.slots)
    y, kv = block.apply({"params": layer}, x, context._replace(slots=None), kv)
  elif rule == "project":
    y, kv = block.apply({"params": layer}, x, context, kv)
  else:
    inside, index = _enter(context, active, index)
    y, kv = block.apply({"params": layer}, x, inside, kv)
  return jnp.where(active[..., None], y, x), Cache(kv, index), last


def _enter(context: Context, active: jax.Array, index: jax.Array) -> tuple[Context, jax.Array]:
  """The next free slots for the active tokens, with what they may see; and the places in the slots with theirs in."""
  used = jnp.sum(index != EMPTY, axis=1, keepdims=True)
  slots = jnp.where(active, used + jnp.cumsum(active, axis=1) - 1, index.shape[1])
  put = jax.vmap(lambda row, slot, place: row.at[slot].set(place, mode="drop"))
  index = put(index, slots, context.slots)
  seen = index[:, None, :] <= context.slots[:, :, None]
  return context._replace(slots=slots, mask=seen[:, None]), index

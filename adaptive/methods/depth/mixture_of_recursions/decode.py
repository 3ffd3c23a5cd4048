"""Token by token: a cache for each recursion, of each row's own length, and recursions that nobody needs left out.

With `recursion_wise` keys a recursion's cache holds the tokens that passed it, one after the other, with their
positions; `shared` has one cache for all recursions, and `hybrid` one for each, with the first's keys where a token did
not pass (Section 2.2.2 of the paper).
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import recursion
from adaptive.backbone import decoding
from adaptive.backbone.attention import Context, LayerCache
from adaptive.methods.contract import Decoder, Metrics, Params
from adaptive.methods.depth.mixture_of_recursions import causal
from adaptive.methods.depth.mixture_of_recursions.causal import Rule

EMPTY = jnp.iinfo(jnp.int32).max  # a position that no query has reached


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    lengths: tokens of each row, int32 [b].
    before, after: keys and values of each layer around the loop.
    block: of each layer of the shared block, by recursion.
    index: position of the token in each slot, int32 [b, slots], by recursion; with `recursion_wise` keys only.
    counts: tokens that passed each recursion, int32 [r, b].
  """

  lengths: jax.Array
  before: tuple[LayerCache, ...]
  after: tuple[LayerCache, ...]
  block: tuple[tuple[LayerCache, ...], ...]
  index: tuple[jax.Array, ...]
  counts: jax.Array

  @property
  def room(self) -> int:
    """Slots of the layers that every token passes."""
    return (self.before or self.block[0])[0].key.shape[2]


def slots_of(model: nn.Module, rule: Rule, which: int, slots: int) -> int:
  """Tokens that a recursion has to have room for, when a row may have `slots`."""
  alone = model.method.kv_cache == "recursion_wise"
  share = min(1.0, model.method.bound(which, rule.capacity_scale)) if alone else 1.0
  return min(slots, math.ceil(share * slots) + 1)  # one to spare, since the bound is computed in float32


def empty_cache(model: nn.Module, rule: Rule, batch_size: int, slots: int) -> Cache:
  def layers(number: int, room: int) -> tuple[LayerCache, ...]:
    return tuple(decoding.empty_layer(model.config, batch_size, room) for _ in range(number))

  alone = model.method.kv_cache == "recursion_wise"
  caches = 1 if model.method.kv_cache == "shared" else rule.recursions
  rooms = [slots_of(model, rule, which, slots) for which in range(caches)]
  ends = int(model.sharing.middle)
  return Cache(
    lengths=jnp.zeros((batch_size,), jnp.int32),
    before=layers(ends, slots),
    after=layers(ends, slots),
    block=tuple(layers(model.sharing.block_size, room) for room in rooms),
    index=tuple(jnp.full((batch_size, room), EMPTY, jnp.int32) for room in rooms) if alone else (),
    counts=jnp.zeros((model.method.num_recursions, batch_size), jnp.int32),
  )


def decoder(model: nn.Module, params: Params, rule: Rule) -> Decoder:
  """The sub-model of a rule, of plain numbers."""

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, Metrics]:
    return step_of(model, rule, params, tokens, counts, cache)

  empty = lambda batch_size, slots: empty_cache(model, rule, batch_size, slots)
  return Decoder(params_of(model, params), empty, step)


def params_of(model: nn.Module, params: Params) -> Params:
  """Parameters as steps read them: layers apart, those before the loop, of its block and after it.

  A step reads every parameter and does little else, so they come in the dtype that computes; routers stay float32.
  """
  dtype = model.config.dtype
  layers = tuple(decoding.unstack(part, dtype) for part in recursion.split(model.sharing, params["layers"]))
  as_they_are = {name: part for name, part in params.items() if name in ("router", "aux_router")}
  rest = {name: part for name, part in params.items() if name not in ("router", "aux_router", "layers")}
  return {**jax.tree.map(lambda leaf: leaf.astype(dtype), rest), **as_they_are, "layers": layers}


class Position(NamedTuple):
  """Where the new tokens of a step are.

  Attributes:
    context: of the layers in which every token takes part: rotary table, mask, slots.
    positions: int32 [b, t]. real: bool [b, t].
  """

  context: Context
  positions: jax.Array
  real: jax.Array


def step_of(model, rule: Rule, params: Params, tokens, counts, cache: Cache) -> tuple[jax.Array, Cache, Metrics]:
  """`Decoder.step`; the cache may have more room than the rule needs."""
  length, slots = tokens.shape[1], cache.room
  positions = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  real = jnp.arange(length)[None] < counts[:, None]
  context = decoding.context_of(model.config, cache.lengths, counts, length, slots)
  at = Position(context, positions, real)
  layers = params["layers"]

  x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
  x, before = decoding.run_layers(model.config, layers[0], x, context, cache.before)
  run = lambda which, x, keep, cache: recursion_of(model, layers[1], which, x, keep, cache, at)
  new = causal.New(positions, real, cache.counts)
  x, keeps, cache = causal.recur(model, params, x, new, rule, run, cache)
  x, after = decoding.run_layers(model.config, layers[2], x, context, cache.after)

  logits = model.apply({"params": params}, decoding.last_of(x, counts), method="head")[:, 0]
  cache = cache._replace(lengths=cache.lengths + counts, before=before, after=after)
  return logits, cache, causal.realised(model, keeps, real)


def recursion_of(
  model, layers: tuple[Params, ...], which: int, x: jax.Array, keep: jax.Array, cache: Cache, at: Position
) -> tuple[jax.Array, Cache]:
  """The shared block on those of the new tokens that are kept; nothing at all when none is."""
  kind = model.method.kv_cache
  own = cache.block[0 if kind == "shared" else which]
  index = cache.index[which] if kind == "recursion_wise" else None
  if kind == "hybrid" and which > 0:
    own = _with_new(own, cache.block[0], at)

  def run(x, own, index):
    context = at.context
    if kind == "recursion_wise":
      context, index = _compact(cache.counts[which], keep, index, at)
    elif which > 0:
      slots = None if kind == "shared" else jnp.where(keep, at.positions, own[0].key.shape[2])
      context = context._replace(slots=slots)
    return *decoding.run_layers(model.config, layers, x, context, own), index

  output, own, index = jax.lax.cond(jnp.any(keep), run, lambda x, own, index: (x, own, index), x, own, index)
  block, indices = list(cache.block), list(cache.index)
  if kind != "shared" or which == 0:
    block[which] = own
  if kind == "recursion_wise":
    indices[which] = index
  counts = cache.counts.at[which].add(jnp.sum(keep, axis=1, dtype=jnp.int32))
  return output, cache._replace(block=tuple(block), index=tuple(indices), counts=counts)


def _compact(count: jax.Array, keep: jax.Array, index: jax.Array, at: Position) -> tuple[Context, jax.Array]:
  """The next free slots for the kept tokens, and the slots' positions with them in."""
  room = index.shape[1]
  slots = jnp.where(keep, count[:, None] + jnp.cumsum(keep, axis=1) - 1, room)
  index = jax.vmap(lambda row, slot, position: row.at[slot].set(position, mode="drop"))(index, slots, at.positions)
  mask = (index[:, None, :] <= at.positions[:, :, None])[:, None]
  return at.context._replace(slots=slots, mask=mask), index


def _with_new(own: tuple[LayerCache, ...], base: tuple[LayerCache, ...], at: Position) -> tuple[LayerCache, ...]:
  """A recursion's caches with the first one's keys and values for the new tokens."""
  slots = jnp.arange(own[0].key.shape[2])
  new = jnp.any((slots[None, None] == at.positions[:, :, None]) & at.real[:, :, None], axis=1)
  return jax.tree.map(lambda mine, theirs: jnp.where(new[:, None, :, None], theirs, mine), own, base)

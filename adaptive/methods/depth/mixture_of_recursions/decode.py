"""Token by token: a cache for each recursion, of each row's own length, and recursions that nobody needs left out.

A recursion is a visit of the shared block. With `recursion_wise` keys it leaves a hole where a token does not pass, and
its cache has room for those that may; with `hybrid` ones a copy of the first recursion's keys. `shared` has one cache
for all recursions (Section 2.2.2 of the paper).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import recursion
from adaptive.backbone import decoding
from adaptive.backbone.attention import Context, LayerCache
from adaptive.depth import visits
from adaptive.methods.contract import Decoder, Metrics, Params
from adaptive.methods.depth.mixture_of_recursions import causal
from adaptive.methods.depth.mixture_of_recursions.causal import Rule


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    lengths: tokens of each row, int32 [b].
    before, after: keys and values of each layer around the loop.
    block: of each layer of the shared block, by recursion.
    counts: tokens that passed each recursion, int32 [r, b].
  """

  lengths: jax.Array
  before: tuple[LayerCache, ...]
  after: tuple[LayerCache, ...]
  block: tuple[tuple[visits.Cache, ...], ...]
  counts: jax.Array

  @property
  def room(self) -> int:
    """Slots of the layers that every token passes."""
    return max(leaf.shape[2] for leaf in jax.tree.leaves((self.before, self.block)) if leaf.ndim == 4)


def empty_cache(model: nn.Module, rule: Rule, batch_size: int, slots: int) -> Cache:
  def around() -> tuple[LayerCache, ...]:
    return tuple(decoding.empty_layer(model.config, batch_size, slots) for _ in range(ends))

  def own(which: int) -> tuple[visits.Cache, ...]:
    room = visits.room(model.method.bound(which, rule.capacity_scale), slots) if rule_of == "hole" else slots
    return tuple(visits.empty(model.config, rule_of, batch_size, room) for _ in range(model.sharing.block_size))

  kind, ends = model.method.kv_cache, int(model.sharing.middle)
  rule_of = "hole" if kind == "recursion_wise" else "project"
  return Cache(
    lengths=jnp.zeros((batch_size,), jnp.int32),
    before=around(),
    after=around(),
    block=tuple(own(which) for which in range(1 if kind == "shared" else rule.recursions)),
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
  model: nn.Module, layers: tuple[Params, ...], which: int, x: jax.Array, keep: jax.Array, cache: Cache, at: Position
) -> tuple[jax.Array, Cache]:
  """The shared block on those of the new tokens that are kept; nothing at all, but for keys, when none is.

  The first recursion of `shared` and `hybrid` takes all tokens. What it leaves later ones read, or copy.
  """
  kind, block = model.method.kv_cache, cache.block
  if kind == "shared" and which > 0:
    x = _read(model, layers, x, keep, block[0], at)
  else:
    rule = "hole" if kind == "recursion_wise" else "copy" if which else "project"
    own = []
    for layer, mine, first in zip(layers, block[which], block[0], strict=True):
      last = _entries(first.kv, at.positions) if rule == "copy" else visits.nothing(model.config, x)
      x, (mine,), _ = visits.step(model.config, (layer,), x, at.context, keep, rule, (mine,), last)
      own.append(mine)
    block = (*block[:which], tuple(own), *block[which + 1 :])
  counts = cache.counts.at[which].add(jnp.sum(keep, axis=1, dtype=jnp.int32))
  return x, cache._replace(block=block, counts=counts)


def _read(model: nn.Module, layers: tuple[Params, ...], x, keep, first: tuple[visits.Cache, ...], at: Position):
  """The block where it has no keys of its own: those of the first recursion are seen."""
  context = at.context._replace(slots=None)
  run = lambda x: decoding.run_layers(model.config, layers, x, context, [cache.kv for cache in first])[0]
  return jax.lax.cond(jnp.any(keep), run, lambda x: x, x)


def _entries(cache: LayerCache, positions: jax.Array) -> LayerCache:
  """Keys and values [b, k, t, h] of the tokens at positions [b, t]; those of padding mean nothing."""
  at = jnp.minimum(positions, cache.key.shape[2] - 1)[:, None, :, None]
  return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, at, axis=2), cache)

"""Fewer recursions draft for all of them: the stages of the model for self-speculative decoding, under expert choice.

A stage is the recursions up to where a draft leaves. The layers before the loop belong to the first stage, those after
it to the last, and to every draft, which has caches of its own for them. Tokens that were refused leave no trace: a
recursion's cache is first cut back to where the new tokens begin.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import LayerCache
from adaptive.depth import visits
from adaptive.depth.ladder import At, Ladder
from adaptive.methods.contract import Params
from adaptive.methods.depth.mixture_of_recursions import causal, decode
from adaptive.methods.depth.mixture_of_recursions.causal import Rule


class Stream(NamedTuple):
  """Between two recursions: residual stream [b, t, d], and which tokens have passed all so far, bool [b, t]."""

  x: jax.Array
  active: jax.Array


class Cache(NamedTuple):
  """The model's, and of the layers after the loop as each draft runs them."""

  model: decode.Cache
  tails: tuple[tuple[LayerCache, ...], ...]


def ladder(model: nn.Module, params: Params, recursions: Sequence[int]) -> Ladder:
  """Drafts of so many recursions each, increasing and fewer than the model's."""
  rule = Rule(model.method.num_recursions)
  size, ends = model.sharing.block_size, 2 * int(model.sharing.middle)
  bounds = (0, *recursions, rule.recursions)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    made = decode.empty_cache(model, rule, batch_size, slots)
    return Cache(made, tuple(made.after for _ in recursions))

  def embed(params: Params, tokens: jax.Array) -> Stream:
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    return Stream(x, jnp.ones(tokens.shape, bool))

  def climb(params: Params, stream: Stream, at: At, cache: Cache, low: int, high: int):
    own, place, layers = cache.model, _place(model, stream.x, at, cache.model), params["layers"]
    x, active = stream.x, stream.active & place.real
    if low == 0:
      x, before = decoding.run_layers(model.config, layers[0], x, place.context, own.before)
      own = own._replace(before=before)
    for which in range(bounds[low], bounds[high]):
      own = _cut_back(own, which, at.start)
      new = causal.New(place.positions, place.real, own.counts)
      run = lambda which, x, keep, own: decode.recursion_of(model, layers[1], which, x, keep, own, place)
      x, active, own = causal.recur_once(model, params, which, x, active, new, rule, run, own)
    if high == len(bounds) - 1:
      x, after = decoding.run_layers(model.config, layers[2], x, place.context, own.after)
      own = own._replace(after=after)
    return Stream(x, active), cache._replace(model=own)

  def tail(params: Params, draft: int, stream: Stream, at: At, cache: Cache):
    place = _place(model, stream.x, at, cache.model)
    x, after = decoding.run_layers(model.config, params["layers"][2], stream.x, place.context, cache.tails[draft])
    tails = (*cache.tails[:draft], after, *cache.tails[draft + 1 :])
    return stream._replace(x=x), cache._replace(tails=tails)

  return Ladder(
    params=decode.params_of(model, params),
    rungs=tuple(range(1, len(recursions) + 1)),
    layers=tuple(ends + number * size for number in (*recursions, rule.recursions)),
    tails=(int(model.sharing.middle),) * len(recursions),
    empty_cache=empty_cache,
    embed=embed,
    climb=climb,
    tail=tail,
    head=lambda params, draft, stream: model.apply({"params": params}, stream.x, method="head"),
    one_head=False,
  )


def _place(model: nn.Module, x: jax.Array, at: At, cache: decode.Cache) -> decode.Position:
  """Where new tokens are."""
  length = x.shape[1]
  offsets = jnp.arange(length, dtype=jnp.int32)[None]
  context = decoding.context_of(model.config, at.start, at.counts, length, cache.room)
  return decode.Position(context, at.start[:, None] + offsets, offsets < at.counts[:, None])


def _cut_back(cache: decode.Cache, which: int, start: jax.Array) -> decode.Cache:
  """A recursion's cache with nothing in it from position `start` [b] on."""
  if cache.block[0][0].index is None:
    return cache
  own = tuple(visits.cut_back(layer, start) for layer in cache.block[which])
  counts = cache.counts.at[which].set(jnp.sum(own[0].index != visits.EMPTY, axis=1, dtype=jnp.int32))
  return cache._replace(block=(*cache.block[:which], own, *cache.block[which + 1 :]), counts=counts)

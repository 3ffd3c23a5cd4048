"""A model in stages, as self-speculative decoding runs it: cheap drafts, and the rest of the model on the same states.

A draft leaves the model at a rung: what it ran up to there is what the whole model runs too, with the same keys and
values, and is not run again. What a draft runs after its rung is its own: nothing but a head where it is an early exit,
some layers more where it skips layers or repeats a shared block fewer times.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.transformer import Params, Transformer
from adaptive.config import ModelConfig
from adaptive.depth import climb as climbing
from adaptive.depth import exits as exiting

Cache = Any


class At(NamedTuple):
  """Where new tokens are: the position of each row's first, and how many of a row's are real, int32 [b] both.

  Slots of a cache from `start` on may hold tokens that were refused; they are written again before anyone reads them.
  """

  start: jax.Array
  counts: jax.Array


class Ladder(NamedTuple):
  """A model and its drafts, all functions traced.

  Attributes:
    params: for the other functions.
    rungs: after how many stages each draft leaves, not decreasing; the model itself has one stage more than the last.
    layers: that each draft runs, and at last the model.
    tails: layers of its own that each draft has after its rung.
    empty_cache: (batch_size, slots) -> a cache.
    embed: (params, tokens int32 [b, t]) -> x, the residual stream [b, t, d], or a tree of arrays [b, t, ...] with what
      else a stage hands on to the next.
    climb: (params, x, at, cache, low, high) -> (x, cache): the stages low .. high - 1 (static).
    tail: (params, draft, x, at, cache) -> (x, cache): a draft's own layers.
    head: (params, draft, x) -> float32 logits [b, t, v]; of the model itself where draft is len(rungs).
    one_head: whether that is the same for all.
  """

  params: Params
  rungs: tuple[int, ...]
  layers: tuple[int, ...]
  tails: tuple[int, ...]
  empty_cache: Callable[[int, int], Cache]
  embed: Callable[[Params, jax.Array], jax.Array]
  climb: Callable[[Params, jax.Array, At, Cache, int, int], tuple[jax.Array, Cache]]
  tail: Callable[[Params, int, jax.Array, At, Cache], tuple[jax.Array, Cache]]
  head: Callable[[Params, int, jax.Array], jax.Array]
  one_head: bool

  @property
  def stages(self) -> int:
    """Of the model itself."""
    return max(self.rungs) + 1

  def calls(self, draft: int, tokens: int) -> int:
    """Layers that a round runs one after the other: for each drafted token and the one before them, and to check."""
    below = self.layers[draft] - self.tails[draft]
    return (tokens + 1) * self.layers[draft] + self.layers[-1] - below

  def layer_tokens(self, draft: int, tokens: int) -> int:
    """Layers times tokens that a round runs, which no draft makes fewer than the model alone does."""
    return (tokens + 1) * (self.layers[-1] + self.tails[draft])


def shared_layers(full: Sequence[int], draft: Sequence[int]) -> int:
  """How many layers two paths begin with in common."""
  same = [a == b for a, b in zip(full, draft)]
  return same.index(False) if False in same else len(same)


def of_paths(
  config: ModelConfig,
  params: Params,
  full: Sequence[int],
  drafts: Sequence[Sequence[int]],
  head: Callable[[Params, int, jax.Array], jax.Array] | None = None,
) -> Ladder:
  """A ladder of layer paths: each is a list of indices of `params["layers"]`, in the order in which they run.

  Args:
    drafts: in order of what they share with `full`.
    head: (params, draft, x) -> logits; the model's own for all drafts unless given.
  """
  model, params = Transformer(config), decoding.unstacked(config, params)
  shared = [shared_layers(full, draft) for draft in drafts]
  bounds = sorted({0, *shared, len(full)})
  own = [list(draft[common:]) for draft, common in zip(drafts, shared)]

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = lambda number: tuple(decoding.empty_layer(config, batch_size, slots) for _ in range(number))
    return layers(len(full)), tuple(layers(len(path)) for path in own)

  def context_of(x: jax.Array, at: At, cache: Cache):
    slots = cache[0][0].key.shape[2]
    return decoding.context_of(config, at.start, at.counts, x.shape[1], slots)

  def climb(params: Params, x: jax.Array, at: At, cache: Cache, low: int, high: int):
    start, stop = bounds[low], bounds[high]
    layers, caches = [params["layers"][i] for i in full[start:stop]], cache[0][start:stop]
    x, caches = decoding.run_layers(config, layers, x, context_of(x, at, cache), caches)
    return x, ((*cache[0][:start], *caches, *cache[0][stop:]), cache[1])

  def tail(params: Params, draft: int, x: jax.Array, at: At, cache: Cache):
    layers = [params["layers"][i] for i in own[draft]]
    x, caches = decoding.run_layers(config, layers, x, context_of(x, at, cache), cache[1][draft])
    return x, (cache[0], (*cache[1][:draft], caches, *cache[1][draft + 1 :]))

  apply = lambda params, *args, **kwargs: model.apply({"params": params}, *args, **kwargs)
  return Ladder(
    params=params,
    rungs=tuple(bounds.index(common) for common in shared),
    layers=(*map(len, drafts), len(full)),
    tails=tuple(map(len, own)),
    empty_cache=empty_cache,
    embed=lambda params, tokens: apply(params, tokens, method=lambda m, t: m.embedding.encode(t)),
    climb=climb,
    tail=tail,
    head=head or (lambda params, draft, x: apply(params, x, method="head")),
    one_head=head is None,
  )


class Between(NamedTuple):
  """Of a loop, between two of its passes: the state, and the stream after the layers before it, [b, t, d] both."""

  x: jax.Array
  e: jax.Array


def of_loop(exits: exiting.Exits, params: Params, drafts: Sequence[int]) -> Ladder:
  """A ladder of a shared block whose passes begin with more than layers (`exits.Loop`).

  Args:
    drafts: depths of exits, increasing, less than the model's.
  """
  config, model, layers = exits.config, exits.model, exits.layers
  exits = exits._replace(how=exiting.DEFAULT)  # nobody leaves on the way
  bounds = (0, *(1 + exits.depths.index(depth) for depth in drafts), len(exits.depths))

  def empty_cache(batch_size: int, slots: int) -> Cache:
    return tuple(decoding.empty_layer(config, batch_size, slots) for _ in layers)

  def embed(params: Params, tokens: jax.Array) -> Between:
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    return Between(x, x)

  def climb(params: Params, between: Between, at: At, cache: Cache, low: int, high: int):
    length = between.x.shape[1]
    context = decoding.context_of(config, at.start, at.counts, length, cache[0].key.shape[2])

    def span(start: int, stop: int, x: jax.Array, alive: jax.Array, caches: Cache):
      here = [params["layers"][layer] for layer in layers[start:stop]]
      x, after = decoding.run_layers(config, here, x, context, caches[start:stop])
      return x, (*caches[:start], *after, *caches[stop:])

    run = climbing.run_of(exits, params, at.start[:, None] + jnp.arange(length, dtype=jnp.int32)[None], span)
    x, state = between.x, (cache, between.e)
    for which in range(bounds[low], bounds[high]):
      x, state = run(which, x, jnp.ones(x.shape[:2], bool), state)
    return Between(x, state[1]), state[0]

  return Ladder(
    params=decoding.unstacked(exits.config, params, exits.kept),
    rungs=tuple(range(1, len(drafts) + 1)),
    layers=(*drafts, exits.depths[-1]),
    tails=(0,) * len(drafts),
    empty_cache=empty_cache,
    embed=embed,
    climb=climb,
    tail=lambda params, draft, between, at, cache: (between, cache),
    head=lambda params, draft, between: model.apply({"params": params}, between.x, method="head"),
    one_head=False,
  )

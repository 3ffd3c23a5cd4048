"""Lazy resume: decoding with early exits and exactly the full model's keys, at no more than the full model's work.

A token that leaves at a layer leaves its residual stream behind. When a later token of its row runs that layer, it
takes along all that wait below it: they go up together, in the same products, and their keys and values are those of a
model without exits. A layer is run for a token at most once. These are the keys of FREE (arXiv 2310.05424), which has
two exits; its threshold, found while it decodes, is not here.

At most `wait` tokens of a row wait; with no place left, the next token goes all the way and takes all of them along.
While there is a place for all, no token runs above the deepest that it or a later one reaches: the layer-tokens are
sum over t of max over t' >= t of depth(t'). In a long text whose tokens all leave early they come near the full
model's, and must: all but the last `wait` run every layer one day, whoever goes first. What is saved is time. To take
all along reads the weights above the exits once in wait + 1 tokens; to finish only the oldest, which alone needs no
other's keys and frees a place too, would read them with every token, for at most `wait` tokens' layers less.

With `again` those that wait begin at the bottom with every token, as EE-LLM recomputes them (arXiv 2312.04916, Section
4): the same keys, for more work, which may be more than the full model's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import Context, LayerCache, rope_table
from adaptive.backbone.transformer import Params
from adaptive.depth import walk
from adaptive.depth.exits import Exits, Rule


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    layers: keys and values of each layer. lengths: tokens of each row, int32 [b].
    x: residual streams of tokens that wait, [b, w, d]. positions: theirs, int32 [b, w]; past the end where none waits.
    depths: how many layers they have run, int32 [b, w]; all of them where none waits.
    embedded: what they begin with if they begin again, [b, w, d]; else None.
  """

  layers: tuple[LayerCache, ...]
  lengths: jax.Array
  x: jax.Array
  positions: jax.Array
  depths: jax.Array
  embedded: jax.Array | None = None


NOBODY = jnp.iinfo(jnp.int32).max  # the position of a place where no token waits


def decoder(
  exits: Exits, params: Params, rule: Rule, wait: int, again: bool = False
) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them.

  Args:
    wait: tokens of a row that may wait. A step computes as many more at every layer that it runs.
    again: whether they begin anew with every token.
  """
  config, full = exits.config, exits.depths[-1]
  params = decoding.unstacked(config, params, exits.kept)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    waiting = jnp.zeros((batch_size, wait, config.d_model), config.dtype)
    return Cache(
      layers=tuple(decoding.empty_layer(config, batch_size, slots) for _ in range(full)),
      lengths=jnp.zeros((batch_size,), jnp.int32),
      x=waiting,
      positions=jnp.full((batch_size, wait), NOBODY, jnp.int32),
      depths=jnp.full((batch_size, wait), full, jnp.int32),
      embedded=waiting if again else None,
    )

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    """A prompt goes all the way up: its tokens' own exits decide what is read, and nothing waits."""
    if again:
      cache = cache._replace(x=cache.embedded, depths=jnp.where(cache.positions == NOBODY, full, 0))
    worked = jnp.zeros(())
    if tokens.shape[1] > 1:
      cache, worked = _flush(exits, params, cache)
    slots = cache.layers[0].key.shape[2]
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions, real = cache.lengths[:, None] + offsets, offsets < counts[:, None]
    x = exits.model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    prompt = tokens.shape[1] > 1
    # With no place left the new token goes all the way, and takes all along.
    crowded = jnp.all(cache.positions != NOBODY, axis=1)

    def run(which: int, x: jax.Array, alive: jax.Array, state: tuple[Cache, jax.Array, jax.Array, jax.Array]):
      """The layers before an exit; the state is the cache, the new tokens, their depths, and the layer-tokens run."""
      start, stop = exits.segments[which]
      goes = real if prompt else real & (alive | crowded[:, None])

      def climb(cache, new_x, new_depth, worked):
        for layer in range(start, stop):
          # A token that waits goes along with its row's new one.
          along = (cache.depths == layer) & jnp.any(goes, axis=1)[:, None]
          both = jnp.concatenate([cache.x, new_x], axis=1)
          moving = jnp.concatenate([along, goes], axis=1)
          where = jnp.concatenate([cache.positions, positions], axis=1)
          context = _context(config, jnp.where(moving, where, NOBODY), slots)
          y, (own,) = decoding.run_layers(
            config, (params["layers"][exits.layers[layer]],), both, context, (cache.layers[layer],)
          )
          both = jnp.where(moving[..., None], y, both)
          waiting, new_x = both[:, :wait], both[:, wait:]
          depths = jnp.where(along, layer + 1, cache.depths)
          layers = (*cache.layers[:layer], own, *cache.layers[layer + 1 :])
          cache = cache._replace(layers=layers, x=waiting, depths=depths)
          new_depth = jnp.where(goes, layer + 1, new_depth)
          worked += jnp.sum(moving, dtype=jnp.float32)
        return cache, new_x, new_depth, worked

      state = jax.lax.cond(jnp.any(goes), climb, lambda *state: state, *state)
      # Those that have left, and go on for others only, are not asked again.
      return jnp.where(alive[..., None], state[1], x), state

    embedded, state = x[:, -1], (cache, x, jnp.zeros_like(positions), worked)
    logits, ran, (cache, x, depth, worked) = walk.leave(exits, params, x, positions, real, rule, run, state)
    cache = _leave_behind(cache, x[:, -1], embedded, positions[:, -1], depth[:, -1], real[:, -1], full)
    found = walk.realised(exits, ran, real)
    found |= {"layer_tokens": (worked, jnp.sum(real, dtype=jnp.float32))}
    logits = decoding.last_of(logits, counts)[:, 0]
    return logits, cache._replace(lengths=cache.lengths + counts), found

  return params, empty_cache, step


def _context(config, positions: jax.Array, slots: int) -> Context:
  """Of tokens anywhere, by their positions [b, n], which are their slots too: each sees what lies before it."""
  mask = jnp.arange(slots)[None, None] <= positions[:, :, None]
  return Context(*rope_table(config, jnp.minimum(positions, slots)), mask[:, None], jnp.minimum(positions, slots))


def _leave_behind(cache: Cache, x: jax.Array, embedded: jax.Array, position, depth, real, full: int) -> Cache:
  """The new token takes the first free place, if it has not run all layers; those that have free theirs. All [b]."""
  done = cache.depths >= full
  positions = jnp.where(done, NOBODY, cache.positions)
  place = jnp.argmax(positions == NOBODY, axis=1)
  stays = real & (depth < full) & jnp.any(positions == NOBODY, axis=1)
  here = (jnp.arange(positions.shape[1])[None] == place[:, None]) & stays[:, None]
  return cache._replace(
    x=jnp.where(here[..., None], x[:, None], cache.x),
    positions=jnp.where(here, position[:, None], positions),
    depths=jnp.where(here, depth[:, None], jnp.where(done, full, cache.depths)),
    embedded=None if cache.embedded is None else jnp.where(here[..., None], embedded[:, None], cache.embedded),
  )


def _flush(exits: Exits, params: Params, cache: Cache) -> tuple[Cache, jax.Array]:
  """All that wait go all the way up; and the layer-tokens that this takes."""
  config, full, slots = exits.config, len(cache.layers), cache.layers[0].key.shape[2]

  def climb(cache: Cache) -> tuple[Cache, jax.Array]:
    layers, x, depths = list(cache.layers), cache.x, cache.depths
    worked = jnp.sum(full - depths, dtype=jnp.float32)
    for layer in range(full):
      moving = depths == layer
      context = _context(config, jnp.where(moving, cache.positions, NOBODY), slots)
      y, (layers[layer],) = decoding.run_layers(
        config, (params["layers"][exits.layers[layer]],), x, context, (layers[layer],)
      )
      x, depths = jnp.where(moving[..., None], y, x), jnp.where(moving, layer + 1, depths)
    positions = jnp.full_like(cache.positions, NOBODY)
    return cache._replace(layers=tuple(layers), x=x, positions=positions, depths=depths), worked

  return jax.lax.cond(jnp.any(cache.positions != NOBODY), climb, lambda cache: (cache, jnp.zeros(())), cache)

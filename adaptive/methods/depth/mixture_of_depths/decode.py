"""Token by token: a cache for each layer, a routed one's with room for the tokens that may pass it; a routed layer that
no new token passes is not run.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import LayerCache
from adaptive.depth import visits
from adaptive.methods.contract import Decoder, Metrics, Params
from adaptive.methods.depth.mixture_of_depths.model import ROUTERS, Rule, decide, realised, weigh


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    layers: keys and values of each layer, and of routed ones also whose they are. lengths: tokens, int32 [b].
    counts: tokens that passed each routed layer, int32 [b] each.
  """

  layers: tuple[LayerCache | visits.Cache, ...]
  lengths: jax.Array
  counts: tuple[jax.Array, ...]


def decoder(model: nn.Module, params: Params, rule: Rule) -> Decoder:
  """The sub-model of a rule, of plain numbers."""
  config = model.config

  def empty_cache(batch_size: int, slots: int) -> Cache:
    plain, passing = decoding.empty_layer(config, batch_size, slots), model.method.bound(rule.capacity_scale)
    hole = visits.empty(config, "hole", batch_size, visits.room(passing, slots))
    nothing = jnp.zeros((batch_size,), jnp.int32)
    layers = tuple(hole if layer in model.routed else plain for layer in range(config.num_layers))
    return Cache(layers, nothing, (nothing,) * len(model.routed))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache) -> tuple[jax.Array, Cache, Metrics]:
    length = tokens.shape[1]
    slots = max(leaf.shape[2] for leaf in jax.tree.leaves(cache.layers) if leaf.ndim == 4)
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    positions, real = cache.lengths[:, None] + offsets, offsets < counts[:, None]
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    layers, keeps, passed = [], [], []
    for index, (layer, own) in enumerate(zip(params["layers"], cache.layers)):
      if index in model.routed:
        which = len(keeps)
        routers = jax.tree.map(lambda leaf, i=which: leaf[i : i + 1], {n: params[n] for n in ROUTERS if n in params})
        scores, keep, count = decide(model.method, routers, x, positions, real, rule, cache.counts[which])
        y, (own,), _ = visits.step(config, (layer,), x, context, keep, "hole", (own,), visits.nothing(config, x))
        x = weigh(model.method, x, y, scores)
        keeps.append(keep)
        passed.append(count)
      else:
        x, (own,) = decoding.run_layers(config, (layer,), x, context, (own,))
      layers.append(own)
    logits = model.apply({"params": params}, decoding.last_of(x, counts), method="head")[:, 0]
    cache = Cache(tuple(layers), cache.lengths + counts, tuple(passed))
    return logits, cache, realised(model, keeps, real)

  # Routers stay float32: a tie decides a token's path.
  routers = [name for name in ROUTERS if name in params]
  return Decoder(decoding.unstacked(config, params, routers), empty_cache, step)

"""Recorded decisions played again: for tests, for oracles, and to compare rules on the same decisions.

`visits` [l, b, t] says how often each token runs each layer before the next one: 0 skips it, 2 repeats it, and zeros
from some layer on are an exit. Every layer's first visit is followed by its second, whoever makes it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.transformer import Batch, Params, Transformer
from adaptive.config import ModelConfig
from adaptive.depth import visits as parts
from adaptive.depth.climb import Cache


def one_shot(
  config: ModelConfig, params: Params, batch: Batch, visits: jax.Array, rule: parts.Rule, most: int = 1
) -> jax.Array:
  """Float32 logits [b, t, v] of whole rows.

  Args:
    visits: int32 [l, b, t], of which those beyond `most` are not made.
  """
  model = Transformer(config)
  x, context = model.apply({"params": params}, batch, method="embed")
  last = parts.nothing(config, x)
  for layer in range(config.num_layers):
    weights = jax.tree.map(lambda leaf, i=layer: leaf[i : i + 1], params["layers"])
    for visit in range(most):
      x, last = parts.one_shot(config, weights, x, context, visits[layer] > visit, rule, last)
  return model.apply({"params": params}, x, method="head")


def decoder(
  config: ModelConfig, params: Params, visits: jax.Array, rule: parts.Rule, most: int = 1
) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them.

  Args:
    visits: of the token at each slot, int32 [l, b, slots].
  """
  model, params = Transformer(config), decoding.unstacked(config, params)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    """A cache for every visit of every layer."""
    made = (parts.empty(config, rule, batch_size, slots) for _ in range(config.num_layers * most))
    return Cache(tuple(made), jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.layers[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    positions = cache.lengths[:, None] + jnp.arange(length)[None]
    real = jnp.arange(length)[None] < counts[:, None]
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    last, caches = parts.nothing(config, x), []
    for layer, weights in enumerate(params["layers"]):
      number = jnp.take_along_axis(visits[layer], jnp.minimum(positions, visits.shape[2] - 1), axis=1)
      for visit in range(most):
        active, own = real & (number > visit), cache.layers[layer * most + visit]
        x, (own,), last = parts.step(config, (weights,), x, context, active, rule, (own,), last)
        caches.append(own)
    logits = model.apply({"params": params}, decoding.last_of(x, counts), method="head")[:, 0]
    return logits, Cache(tuple(caches), cache.lengths + counts), {}

  return params, empty_cache, step

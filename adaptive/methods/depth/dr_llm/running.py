"""Layers that each prompt skips, executes or repeats: whole rows, and token by token on caches.

Two visits of a layer keep keys and values of their own (`adaptive.depth.visits`). A row's tokens all make a visit or
none does, so no token misses a key; where later tokens decide again, each for itself, keys of those that stayed away
are not there (`hole`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import Context
from adaptive.backbone.transformer import Batch, Block, Params, Transformer
from adaptive.config import ModelConfig
from adaptive.depth import visits as parts
from adaptive.losses import SumCount
from adaptive.methods.depth.dr_llm import router

MOST = 2  # visits of a layer

Rows = jax.Array  # how often each token runs a layer, int32 [b, t]


class Decisions(NamedTuple):
  """Who decides, and when.

  Attributes:
    cut: (prompt bool [b, t]) -> its windows.
    weights: position of the dial, as `router.dial` gives it; may be traced.
    per_step: whether tokens after the prompt decide again.
  """

  cut: Callable[[jax.Array], router.Windows]
  weights: tuple[float, ...] | jax.Array
  per_step: bool


def one_shot(
  config: ModelConfig, params: Params, batch: Batch, choose: Callable[[jax.Array, jax.Array, Params], Rows]
) -> tuple[jax.Array, jax.Array]:
  """Whole rows; a visit that no row makes is not computed.

  Args:
    choose: (number of the layer, stream that enters it [b, t, d], its router's parameters) -> who runs it how often.

  Returns:
    Float32 logits [b, t, v], and how often each layer was run, int32 [l, b, t].
  """
  x, rows = _layers(config, params, batch, lambda *inputs: (choose(*inputs),) * 2)
  return Transformer(config).apply({"params": params}, x, method="head"), rows


def along(config: ModelConfig, params: Params, batch: Batch, choose: Callable) -> jax.Array:
  """What `choose` says beside who runs a layer how often, of all layers, [l, ...]; no logits are computed."""
  return _layers(config, params, batch, choose)[1]


def _layers(config: ModelConfig, params: Params, batch: Batch, choose: Callable) -> tuple[jax.Array, jax.Array]:
  x, context = Transformer(config).apply({"params": params}, batch, method="embed")
  nothing, real = parts.nothing(config, x), batch["segment_ids"] > 0

  def visit(x: jax.Array, weights: Params, active: jax.Array) -> jax.Array:
    stacked = jax.tree.map(lambda leaf: leaf[None], weights)
    run = lambda x: parts.one_shot(config, stacked, x, context, active, "hole", nothing)[0]
    return jax.lax.cond(jnp.any(active), run, lambda x: x, x)

  def layer(x, inputs):
    which, weights, own = inputs
    rows, said = choose(which, x, own)
    for number in range(MOST):
      x = visit(x, weights, real & (rows > number))  # padding makes no visit, whatever its router says
    return x, said

  return jax.lax.scan(layer, x, (jnp.arange(config.num_layers), params["layers"], params["routers"]))


def chooser(made: Decisions, prompt: jax.Array) -> Callable[[jax.Array, jax.Array, Params], Rows]:
  """The routers' choice for `one_shot`, given which tokens are each row's prompt, bool [b, t]."""
  cut = made.cut(prompt)

  def choose(which: jax.Array, x: jax.Array, own: Params) -> Rows:
    rows = router.decide(router.prompt_logits(own, x, cut), made.weights)[:, None]
    if not made.per_step:
      return jnp.broadcast_to(rows, prompt.shape)
    later = router.decide(router.logits(own, x.astype(jnp.float32)), made.weights)
    return jnp.where(prompt, rows, later)

  return choose


class Cache(NamedTuple):
  """What the past left behind.

  Attributes:
    visits: of each visit of each layer, in order. decided: how often each row runs each layer, int32 [l, b].
    lengths: tokens that each row holds, int32 [b].
  """

  visits: tuple[parts.Cache, ...]
  decided: jax.Array
  lengths: jax.Array


def decoder(config: ModelConfig, params: Params, made: Decisions) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them.

  The tokens of a row's first step are its prompt: they decide, once.
  """
  model, params = Transformer(config), decoding.unstacked(config, params, ("routers",))
  rule = "hole" if made.per_step else "project"  # the latter keeps a token's slot at its place

  def empty_cache(batch_size: int, slots: int) -> Cache:
    number = config.num_layers * MOST
    layers = tuple(parts.empty(config, rule, batch_size, slots) for _ in range(number))
    decided = jnp.zeros((config.num_layers, batch_size), jnp.int32)
    return Cache(layers, decided, jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.visits[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    real, fresh = jnp.arange(length)[None] < counts[:, None], (cache.lengths == 0) & (counts > 0)
    cut = made.cut(real & fresh[:, None])
    x = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    caches, decided, ran = [], [], []
    for which, weights in enumerate(params["layers"]):
      own = jax.tree.map(lambda leaf, i=which: leaf[i], params["routers"])
      rows = _decide(made, own, x, cut, fresh, cache.decided[which])
      decided.append(rows)
      each = jnp.broadcast_to(rows[:, None], real.shape)
      if made.per_step:
        later = router.decide(router.logits(own, x.astype(jnp.float32)), made.weights)
        each = jnp.where(fresh[:, None], each, later)
      ran.append(each)
      for number in range(MOST):
        active, past = real & (each > number), cache.visits[which * MOST + number]
        x, past = _visit(config, weights, x, context, active, made.per_step, past)
        caches.append(past)
    logits = model.apply({"params": params}, decoding.last_of(x, counts), method="head")[:, 0]
    after = Cache(tuple(caches), jnp.stack(decided), cache.lengths + counts)
    return logits, after, realised(jnp.stack(ran), real)

  return params, empty_cache, step


def _decide(made: Decisions, own: Params, x: jax.Array, cut: router.Windows, fresh: jax.Array, before: jax.Array):
  """Rows that begin decide; the others keep what they decided. No router is asked when none begins."""
  ask = lambda x, before: jnp.where(fresh, router.decide(router.prompt_logits(own, x, cut), made.weights), before)
  return jax.lax.cond(jnp.any(fresh), ask, lambda x, before: before, x, before)


def _visit(config, weights: Params, x, context: Context, active: jax.Array, per_step: bool, past: parts.Cache):
  if per_step:
    x, (past,), _ = parts.step(config, (weights,), x, context, active, "hole", (past,), parts.nothing(config, x))
    return x, past

  # Who stays away stays away for good: what is written for it is never read.
  def run(x, kv):
    y, kv = Block(config).apply({"params": weights}, x, context, kv)
    return jnp.where(active[..., None], y, x), kv

  x, kv = jax.lax.cond(jnp.any(active), run, lambda x, kv: (x, kv), x, past.kv)
  return x, parts.Cache(kv, None)


def realised(rows: jax.Array, real: jax.Array) -> Mapping[str, SumCount]:
  """Layers that a token ran, and the shares of tokens that skipped and repeated each layer, `skipped/<layer>`, ...

  Args:
    rows: how often tokens ran each layer, int32 [l, b, t]. real: which of them are no padding, bool [b, t].
  """
  number = jnp.sum(real, dtype=jnp.float32)
  count = lambda mask: jnp.sum(mask & real, dtype=jnp.float32)
  found = {"layers": (jnp.sum(rows * real[None], dtype=jnp.float32), number)}
  for which in range(rows.shape[0]):
    found[f"skipped/{which}"] = count(rows[which] == 0), number
    found[f"repeated/{which}"] = count(rows[which] == MOST), number
  return found

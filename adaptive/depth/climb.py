"""Tokens taken up from exit to exit: `one_shot` on whole rows, where all is computed and what has left is masked, and
`decoder` token by token, where layers that no row needs are left out. Both give the same logits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive import subnet
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Batch, Params
from adaptive.depth import exit_costs, visits, walk
from adaptive.depth.exits import FULL_KEYS, Exits, KeyValues, Rule
from adaptive.depth.walk import Run, leave
from adaptive.losses import SumCount

# (first layer, last + 1, x [b, t, d], who runs them [b, t], state) -> (x, state)
Span = Callable[[int, int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def run_of(exits: Exits, params: Params, positions: jax.Array, span: Span) -> Run:
  """The layers before an exit, whatever runs some layers, with what a loop does around them.

  The state is a pair: that of `span`, and e of the loop, whatever it is before it begins.
  """

  def run(which: int, x: jax.Array, alive: jax.Array, state: tuple[Any, jax.Array]):
    (start, stop), loop, (inner, e) = exits.segments[which], exits.loop, state
    if loop is None:
      x, inner = span(start, stop, x, alive, inner)
      return x, (inner, e)
    if which == 0:
      e, inner = span(start, loop.lead, x, alive, inner) if loop.lead else (x, inner)
      x, start = loop.start(params, e, positions), loop.lead
    enter = lambda x, e: loop.enter(params, x, e)
    if exits.how.kv == "project":  # then those that stay away need it too, for their keys
      y = enter(x, e)
    else:
      y = jax.lax.cond(jnp.any(alive), enter, lambda x, e: x, x, e)
    y, inner = span(start, stop, y, alive, inner)
    return jnp.where(alive[..., None], y, x), (inner, e)

  return run


def one_shot(exits: Exits, params: Params, batch: Batch, rule: Rule) -> tuple[jax.Array, Mapping[str, SumCount]]:
  """Logits [b, t, v] of whole rows, each token's of the exit where it leaves; and what was realised."""
  exact = exits.how.kv in FULL_KEYS
  x, climb, state = whole_rows(exits, params, batch, "project" if exact else exits.how.kv)
  everyone = jnp.ones(x.shape[:2], bool)  # padding too, which nobody sees, as in the plain model
  run = (lambda which, x, alive, state: climb(which, x, everyone, state)) if exact else climb
  logits, ran, _ = leave(exits, params, x, batch["positions"], everyone, rule, run, state)
  return logits, realised(exits, ran, batch["segment_ids"])


def realised(exits: Exits, ran: Sequence[jax.Array], segment_ids: jax.Array) -> Mapping[str, SumCount]:
  """What tokens of whole rows ran, given who ran the layers before each exit, bool [b, t] each.

  With the full model's keys `layer_tokens` too: layers run for a token, those for others that waited included.
  """
  found = walk.realised(exits, ran, segment_ids > 0)
  if exits.how.kv in FULL_KEYS:
    found["layer_tokens"] = exit_costs.layers_run(exits, ran, segment_ids), found["layers"][1]
  return found


def whole_rows(exits: Exits, params: Params, batch: Batch, kv: KeyValues) -> tuple[jax.Array, Run, Any]:
  """Embedded tokens [b, t, d] of whole rows, what takes them up, and the state with which it begins."""
  x, context = exits.model.apply({"params": params}, batch, method="embed")

  def span(start: int, stop: int, x: jax.Array, alive: jax.Array, books: tuple):
    for piece, book in visits.sharing_a_book(exits.layers, start, stop, kv):
      layers = subnet.pick(params["layers"], exits.layers[piece])
      x, own = visits.one_shot(exits.config, layers, x, context, alive, visits.rule_of(kv), books[book])
      books = (*books[:book], own, *books[book + 1 :])
    return x, books

  return x, run_of(exits, params, batch["positions"], span), (visits.books(exits.config, x, exits.layers, kv), x)


def streams(exits: Exits, params: Params, batch: Batch) -> list[jax.Array]:
  """Residual stream at every exit, [b, t, d] each, when nobody leaves."""
  x, run, state = whole_rows(exits, params, batch, "project")
  everyone, found = jnp.ones(x.shape[:2], bool), []
  for which in range(len(exits.depths)):
    x, state = run(which, x, everyone, state)
    found.append(x)
  return found


class Cache(NamedTuple):
  """Of each layer, and how many tokens each row holds, int32 [b]."""

  layers: tuple[visits.Cache, ...]
  lengths: jax.Array


def decoder(exits: Exits, params: Params, rule: Rule) -> tuple[Params, Callable, Callable]:
  """Parameters, `empty_cache` and `step`, as `adaptive.methods.contract.Decoder` has them."""
  config, kv, rule_of_visits = exits.config, exits.how.kv, visits.rule_of(exits.how.kv)
  params = decoding.unstacked(config, params, exits.kept)

  def empty_cache(batch_size: int, slots: int) -> Cache:
    layers = tuple(visits.empty(config, rule_of_visits, batch_size, slots) for _ in range(exits.depths[-1]))
    return Cache(layers, jnp.zeros((batch_size,), jnp.int32))

  def step(params: Params, tokens: jax.Array, counts: jax.Array, cache: Cache):
    length, slots = tokens.shape[1], cache.layers[0].kv.key.shape[2]
    context = decoding.context_of(config, cache.lengths, counts, length, slots)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    real = offsets < counts[:, None]

    def span(start: int, stop: int, x: jax.Array, alive: jax.Array, state):
      caches, books = state
      for piece, book in visits.sharing_a_book(exits.layers, start, stop, kv):
        layers = [params["layers"][layer] for layer in exits.layers[piece]]
        x, after, own = visits.step(config, layers, x, context, alive, rule_of_visits, caches[piece], books[book])
        caches = (*caches[: piece.start], *after, *caches[piece.stop :])
        books = (*books[:book], own, *books[book + 1 :])
      return x, (caches, books)

    x = exits.model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
    positions = cache.lengths[:, None] + offsets
    run, state = run_of(exits, params, positions, span), ((cache.layers, visits.books(config, x, exits.layers, kv)), x)
    logits, ran, ((layers, _), _) = leave(exits, params, x, positions, real, rule, run, state)
    logits = decoding.last_of(logits, counts)[:, 0]
    return logits, Cache(layers, cache.lengths + counts), walk.realised(exits, ran, real)

  return params, empty_cache, step

"""Depth-wise batching: one pass of the shared block for many requests, each at its own recursion (Appendix E).

A slot is a request. In a tick every slot that is under way takes its next pass, with the keys of its own recursion;
slots whose token wants no more passes are ready for the layers after the loop, and free to begin their next token. So
no slot waits for the deepest token of the batch. The paper's system was not released; its measurement leaves out the
cache, the embedding and the layers around the loop, which are all here.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone import decoding
from adaptive.backbone.attention import Context, LayerCache, rope_table
from adaptive.config import require
from adaptive.methods.contract import Params, Ticker
from adaptive.methods.depth.mixture_of_recursions import causal, decode
from adaptive.methods.depth.mixture_of_recursions.blocks import gate
from adaptive.methods.depth.mixture_of_recursions.causal import Rule

IDLE = -1


class Slots(NamedTuple):
  """Requests under way, one per slot.

  Attributes:
    x: residual stream of each slot's token, [b, d].
    which: recursion that it takes next, int32 [b]; the number of recursions when it takes none, -1 when idle.
    weight: gate of that recursion, float32 [b].
    lengths: tokens, the one under way included, int32 [b].
    before, after: keys and values of each layer around the loop, [b, k, s, h].
    block: of each layer of the shared block, [b, k, r * s, h], each recursion's in a part of its own; with shared keys
      [b, k, s, h]. A tick then reads and writes them where they lie; to choose a recursion's part would be to copy it.
    index: position of each of the keys in `block`, int32 [b, r * s]; with shared keys [b, 0].
    counts: tokens that passed each recursion, int32 [r, b].
  """

  x: jax.Array
  which: jax.Array
  weight: jax.Array
  lengths: jax.Array
  before: tuple[LayerCache, ...]
  after: tuple[LayerCache, ...]
  block: tuple[LayerCache, ...]
  index: jax.Array
  counts: jax.Array


def ticker(model: nn.Module, params: Params, rule: Rule) -> Ticker:
  """Raises ConfigError for models whose tokens do not decide pass by pass."""
  config = model.method
  require(config.expert_choice, "depth-wise batching needs method.routing='expert_choice'")
  require(config.kv_cache != "hybrid", "depth-wise batching needs method.kv_cache 'recursion_wise' or 'shared'")
  return Ticker(
    params=decode.params_of(model, params),
    empty=lambda slots, room: _empty(model, slots, room),
    advance=lambda params, slots: _advance(model, rule, params, slots),
    under_way=lambda slots: (slots.which >= 0) & (slots.which < config.num_recursions),
    ready=lambda slots: slots.which == config.num_recursions,
    lengths=lambda slots: slots.lengths,
    finish=lambda params, slots, chosen: _finish(model, params, slots, chosen),
    feed=lambda params, slots, chosen, tokens, valid: _feed(model, rule, params, slots, chosen, tokens, valid),
    leave=_leave,
    prefill=lambda params, slots, chosen, tokens, counts: _prefill(model, rule, params, slots, chosen, tokens, counts),
  )


def _empty(model: nn.Module, slots: int, room: int) -> Slots:
  everything = Rule(model.method.num_recursions)  # room for any rule
  cache = decode.empty_cache(model, everything, slots, room)
  parts = _parts(model)
  return Slots(
    x=jnp.zeros((slots, model.config.d_model), model.config.dtype),
    which=jnp.full((slots,), IDLE, jnp.int32),
    weight=jnp.zeros((slots,)),
    lengths=cache.lengths,
    before=cache.before,
    after=cache.after,
    block=tuple(decoding.empty_layer(model.config, slots, parts * room) for _ in range(model.sharing.block_size)),
    index=jnp.full((slots, parts * room if parts > 1 else 0), decode.EMPTY, jnp.int32),
    counts=cache.counts,
  )


def _parts(model: nn.Module) -> int:
  """Recursions that have keys of their own."""
  return model.method.num_recursions if model.method.kv_cache == "recursion_wise" else 1


def _room(model: nn.Module, slots: Slots) -> int:
  """Tokens that a slot has room for."""
  return slots.block[0].key.shape[2] // _parts(model)


def _advance(model: nn.Module, rule: Rule, params: Params, slots: Slots) -> Slots:
  """The next pass of every slot that is under way, and what it decides after that."""
  number, rows, room = model.method.num_recursions, jnp.arange(slots.x.shape[0]), _room(model, slots)
  active = (slots.which >= 0) & (slots.which < number)
  which, position = jnp.clip(slots.which, 0, number - 1), slots.lengths - 1
  places, index = jnp.arange(_parts(model) * room)[None], slots.index
  if _parts(model) > 1:
    target = jnp.where(active, which * room + slots.counts[which, rows], places.size)
    index = index.at[rows, target].set(position, mode="drop")
    seen = (index <= position[:, None]) & (places // room == which[:, None])
  else:  # every recursion reads the keys of the first, which alone stores its token's
    target = jnp.where(active & (which == 0), position, places.size)
    seen = places <= position[:, None]
  x, block = _run(model, params["layers"][1], slots.x, position, seen, target, slots.block)
  if model.method.gating == "weighted":
    x = (slots.weight[:, None] * x).astype(x.dtype)
  x = jnp.where(active[:, None], slots.x + x, slots.x)
  counts = slots.counts.at[which, rows].add(active.astype(jnp.int32))
  slots = slots._replace(x=x, which=slots.which + active, block=block, index=index, counts=counts)
  return _decide(model, rule, params, slots)


def _decide(model: nn.Module, rule: Rule, params: Params, slots: Slots) -> Slots:
  """Which slots take the pass that is next for them, and its gate; the others are ready."""
  number, position = model.method.num_recursions, (slots.lengths - 1)[:, None]
  which, weight = slots.which, slots.weight
  for each in range(number):
    here = slots.which == each
    scores, decisions = causal.scores(model, params, each, slots.x[:, None], position)
    want = causal.passes(model, each, decisions, rule) & (each < rule.recursions)
    new = causal.New(position, here[:, None], slots.counts)
    stays = causal.bound(model, each, want, new, rule)[:, 0]
    which = jnp.where(here & ~stays, number, which)
    weight = jnp.where(here, gate(model.method, scores[..., None])[:, 0, 0], weight)
  return slots._replace(which=which, weight=weight)


def _finish(model: nn.Module, params: Params, slots: Slots, chosen: jax.Array) -> tuple[jax.Array, Slots]:
  """Layers after the loop and the head for the chosen slots: logits [c, v] of their next tokens.

  Of those that are not ready they mean nothing; the keys that they leave are written over when they are.
  """
  room, position = _room(model, slots), slots.lengths - 1
  seen, position = jnp.arange(room)[None] <= position[:, None], position[chosen]
  target = jnp.where(position < 0, room, position)  # of a slot that never held a request
  x, after = _run(model, params["layers"][2], slots.x[chosen], position, seen, target, slots.after, chosen)
  return model.apply({"params": params}, x[:, None], method="head")[:, 0], slots._replace(after=after)


def _feed(model: nn.Module, rule: Rule, params: Params, slots: Slots, chosen, tokens, valid) -> Slots:
  """Begins the next token [c] of the chosen slots, where valid [c]."""
  seen = jnp.arange(_room(model, slots))[None] <= slots.lengths[:, None]
  x = model.apply({"params": params}, tokens[:, None], method=lambda m, t: m.embedding.encode(t))[:, 0]
  position, begins = slots.lengths[chosen], jnp.where(valid, chosen, slots.which.shape[0])
  x, before = _run(model, params["layers"][0], x, position, seen, position, slots.before, begins)
  begun = slots._replace(
    x=slots.x.at[begins].set(x, mode="drop"),
    which=slots.which.at[begins].set(0, mode="drop"),
    lengths=slots.lengths.at[begins].add(1, mode="drop"),
    before=before,
  )
  decided = _decide(model, rule, params, begun)
  # Only those that begin decide here; the others have done so when they advanced.
  fresh = jnp.zeros(slots.which.shape, bool).at[begins].set(True, mode="drop")
  return decided._replace(
    which=jnp.where(fresh, decided.which, slots.which), weight=jnp.where(fresh, decided.weight, slots.weight)
  )


def _leave(slots: Slots, chosen: jax.Array, valid: jax.Array) -> Slots:
  leaves = jnp.where(valid, chosen, slots.which.shape[0])
  return slots._replace(which=slots.which.at[leaves].set(IDLE, mode="drop"))


def _prefill(model: nn.Module, rule: Rule, params: Params, slots: Slots, chosen, tokens, counts):
  """Prompts [c, t] of `counts` tokens into the chosen slots, which stay idle until they are fed; those of 0 are none.

  Returns:
    Logits [c, v] of what follows, and the slots.
  """
  (number, length), room = tokens.shape, _room(model, slots)
  cache = decode.empty_cache(model, Rule(model.method.num_recursions), number, length)  # not the slots' whole room
  logits, cache, _ = decode.step_of(model, rule, params, tokens, counts, cache)
  target = jnp.where(counts > 0, chosen, slots.which.shape[0])

  def fill(old: tuple[LayerCache, ...], new: tuple[LayerCache, ...], start: int = 0) -> tuple[LayerCache, ...]:
    # Behind the prompt lie keys of the slot's last request, which no query sees: their positions are later, or none.
    return jax.tree.map(lambda x, y: x.at[target, :, start : start + length].set(y, mode="drop"), old, new)

  block, index = slots.block, slots.index
  for part, new in enumerate(cache.block):
    block = fill(block, new, part * room)
  if cache.index:
    rows = [jnp.pad(row, ((0, 0), (0, room - length)), constant_values=decode.EMPTY) for row in cache.index]
    index = index.at[target].set(jnp.concatenate(rows, axis=1), mode="drop")
  return logits, slots._replace(
    which=slots.which.at[target].set(IDLE, mode="drop"),
    lengths=slots.lengths.at[target].set(cache.lengths, mode="drop"),
    before=fill(slots.before, cache.before),
    after=fill(slots.after, cache.after),
    block=block,
    index=index,
    counts=slots.counts.at[:, target].set(cache.counts, mode="drop"),
  )


def _run(
  model: nn.Module,
  layers: tuple[Params, ...],
  x: jax.Array,
  position: jax.Array,
  seen: jax.Array,
  target: jax.Array,
  caches: tuple[LayerCache, ...],
  rows: jax.Array | None = None,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
  """Layers on one token of some slots, [c, d], whose keys and values go to place `target` [c]; `seen` is [b, s]."""
  table = rope_table(model.config, position[:, None])
  context = Context(*table, seen[:, None, None], target[:, None], rows)
  x, caches = decoding.run_layers(model.config, layers, x[:, None], context, caches)
  return x[:, 0], caches

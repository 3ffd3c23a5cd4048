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
from adaptive.depth import visits
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
    block: of each layer of the shared block, [r, b, k, s, h], with r = 1 when recursions share them.
    index: position of the token in each slot of `block`, int32 [r, b, s]. counts: tokens that passed, int32 [r, b].
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

  @property
  def room(self) -> int:
    return self.block[0].key.shape[3]


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
    finish=lambda params, slots: _finish(model, params, slots),
    feed=lambda params, slots, tokens, valid: _feed(model, rule, params, slots, tokens, valid),
    leave=_leave,
    prefill=lambda params, slots, chosen, tokens, counts: _prefill(model, rule, params, slots, chosen, tokens, counts),
  )


def _empty(model: nn.Module, slots: int, room: int) -> Slots:
  everything = Rule(model.method.num_recursions)  # room for any rule
  cache = decode.empty_cache(model, everything, slots, room)
  block, index = _by_layer(cache)
  return Slots(
    x=jnp.zeros((slots, model.config.d_model), model.config.dtype),
    which=jnp.full((slots,), IDLE, jnp.int32),
    weight=jnp.zeros((slots,)),
    lengths=cache.lengths,
    before=cache.before,
    after=cache.after,
    block=block,
    index=jnp.zeros((0, slots, room), jnp.int32) if index is None else index,
    counts=cache.counts,
  )


def _by_layer(cache: decode.Cache) -> tuple[tuple[LayerCache, ...], jax.Array | None]:
  """The block's caches by layer, with the recursions stacked; and the places in their slots, the same in each layer."""
  stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *cache.block)
  return tuple(layer.kv for layer in stacked), stacked[0].index


def _advance(model: nn.Module, rule: Rule, params: Params, slots: Slots) -> Slots:
  """The next pass of every slot that is under way, and what it decides after that."""
  number, rows = model.method.num_recursions, jnp.arange(slots.x.shape[0])
  active = (slots.which >= 0) & (slots.which < number)
  which = jnp.clip(slots.which, 0, number - 1)
  if model.method.kv_cache == "shared":
    x, block, index = *_with_first_keys(model, params, slots, active & (which == 0)), slots.index
  else:
    x, block, index = _with_own_keys(model, params, slots, which, active)
  if model.method.gating == "weighted":
    x = (slots.weight[:, None] * x).astype(x.dtype)
  x = jnp.where(active[:, None], slots.x + x, slots.x)
  counts = slots.counts.at[which, rows].add(active.astype(jnp.int32))
  slots = slots._replace(x=x, which=slots.which + active, block=block, index=index, counts=counts)
  return _decide(model, rule, params, slots, range(1, number))


def _with_first_keys(model: nn.Module, params: Params, slots: Slots, first: jax.Array):
  """The block where every recursion reads the keys of the first, which stores its tokens', in place."""
  position = slots.lengths - 1
  target, seen = jnp.where(first, position, slots.room), jnp.arange(slots.room)[None] <= position[:, None]
  own = jax.tree.map(lambda leaf: leaf[0], slots.block)
  x, own = _run(model, params["layers"][1], slots.x, position, seen, target, own)
  return x, jax.tree.map(lambda leaf: leaf[None], own)


def _with_own_keys(model: nn.Module, params: Params, slots: Slots, which: jax.Array, active: jax.Array):
  """The block with the keys of each slot's own recursion, to which its token's are added."""
  rows, position = jnp.arange(len(which)), slots.lengths - 1
  target = jnp.where(active, slots.counts[which, rows], slots.room)
  index = slots.index.at[which, rows, target].set(position, mode="drop")
  seen = index[which, rows] <= position[:, None]
  own = jax.tree.map(lambda leaf: _select(leaf, which), slots.block)
  x, own = _run(model, params["layers"][1], slots.x, position, seen, target, own)
  put = lambda leaf, new: leaf.at[which, rows, :, target].set(_entry(new, target), mode="drop")
  return x, jax.tree.map(put, slots.block, own), index


def _select(leaf: jax.Array, which: jax.Array) -> jax.Array:
  """leaf[which[b], b] of [r, b, ...]; quicker so than by a gather, which a CPU does element by element."""
  chosen = leaf[0]
  for each in range(1, leaf.shape[0]):
    chosen = jnp.where(jnp.reshape(which == each, (-1, *[1] * (chosen.ndim - 1))), leaf[each], chosen)
  return chosen


def _decide(model: nn.Module, rule: Rule, params: Params, slots: Slots, following: range) -> Slots:
  """Which slots take the pass that is next for them, one of `following`, and its gate; the others are ready."""
  number, position = model.method.num_recursions, (slots.lengths - 1)[:, None]
  which, weight = slots.which, slots.weight
  for each in following:
    here = slots.which == each
    scores, decisions = causal.scores(model, params, each, slots.x[:, None], position)
    want = causal.passes(model, each, decisions, rule) & (each < rule.recursions)
    new = causal.New(position, here[:, None], slots.counts)
    stays = causal.bound(model, each, want, new, rule)[:, 0]
    which = jnp.where(here & ~stays, number, which)
    weight = jnp.where(here, gate(model.method, scores[..., None])[:, 0, 0], weight)
  return slots._replace(which=which, weight=weight)


def _finish(model: nn.Module, params: Params, slots: Slots) -> tuple[jax.Array, Slots]:
  """Layers after the loop and the head: logits [b, v] of the next tokens; of slots that are not ready, of nothing."""
  ready = slots.which == model.method.num_recursions
  x, after = _around(model, params["layers"][2], slots.x, slots.lengths - 1, slots.after, ready)
  return model.apply({"params": params}, x[:, None], method="head")[:, 0], slots._replace(after=after)


def _feed(model: nn.Module, rule: Rule, params: Params, slots: Slots, tokens: jax.Array, valid: jax.Array) -> Slots:
  """Begins the next token [b] of the slots where it is valid [b]."""
  x = model.apply({"params": params}, tokens[:, None], method=lambda m, t: m.embedding.encode(t))[:, 0]
  x, before = _around(model, params["layers"][0], x, slots.lengths, slots.before, valid)
  begun = slots._replace(
    x=jnp.where(valid[:, None], x, slots.x),
    which=jnp.where(valid, 0, slots.which),
    lengths=slots.lengths + valid,
    before=before,
  )
  decided = _decide(model, rule, params, begun, range(1))
  # Only those that begin decide here; the others have done so when they advanced.
  return decided._replace(
    which=jnp.where(valid, decided.which, slots.which), weight=jnp.where(valid, decided.weight, slots.weight)
  )


def _leave(slots: Slots, valid: jax.Array) -> Slots:
  return slots._replace(which=jnp.where(valid, IDLE, slots.which))


def _prefill(model: nn.Module, rule: Rule, params: Params, slots: Slots, chosen, tokens, counts):
  """Prompts [c, t] of `counts` tokens into the chosen slots, which stay idle until they are fed; those of 0 are none.

  Returns:
    Logits [c, v] of what follows, and the slots.
  """
  rows, length = tokens.shape
  cache = decode.empty_cache(model, Rule(model.method.num_recursions), rows, length)  # not the slots' whole room
  logits, cache, _ = decode.step_of(model, rule, params, tokens, counts, cache)
  target = jnp.where(counts > 0, chosen, slots.which.shape[0])
  # Behind the prompt lie keys of the slot's last request. No query sees them: positions there are later, or empty.
  fill = lambda leaf, new: leaf.at[target, :, :length].set(new, mode="drop")
  fill_each = lambda leaf, new: leaf.at[:, target, :, :length].set(new, mode="drop")
  block, places = _by_layer(cache)
  index = slots.index
  if places is not None:
    places = jnp.pad(places, ((0, 0), (0, 0), (0, slots.room - length)), constant_values=visits.EMPTY)
    index = index.at[:, target].set(places, mode="drop")
  return logits, slots._replace(
    which=slots.which.at[target].set(IDLE, mode="drop"),
    lengths=slots.lengths.at[target].set(cache.lengths, mode="drop"),
    before=jax.tree.map(fill, slots.before, cache.before),
    after=jax.tree.map(fill, slots.after, cache.after),
    block=jax.tree.map(fill_each, slots.block, block),
    index=index,
    counts=slots.counts.at[:, target].set(cache.counts, mode="drop"),
  )


def _around(model: nn.Module, layers: tuple[Params, ...], x, position, caches: tuple[LayerCache, ...], storing):
  """Layers around the loop for a token [b, d] of every slot; those that store nothing run them for nothing.

  So no cache is picked out of the others, which would copy it.
  """
  if not layers:
    return x, caches
  room, position = caches[0].key.shape[2], jnp.maximum(position, 0)  # a slot that never held a request has none
  seen = jnp.arange(room)[None] <= position[:, None]
  return _run(model, layers, x, position, seen, jnp.where(storing, position, room), caches)


def _run(model: nn.Module, layers: tuple[Params, ...], x, position, seen, target, own: tuple[LayerCache, ...]):
  """Layers on one token of each row, [b, d], whose keys and values go to slot `target`."""
  table = rope_table(model.config, position[:, None])
  context = Context(*table, seen[:, None, None], target[:, None])
  x, own = decoding.run_layers(model.config, layers, x[:, None], context, own)
  return x[:, 0], own


def _entry(leaf: jax.Array, target: jax.Array) -> jax.Array:
  """What slot `target` [b] of each row holds, [b, k, h]."""
  return leaf[jnp.arange(leaf.shape[0]), :, jnp.clip(target, 0, leaf.shape[2] - 1)]

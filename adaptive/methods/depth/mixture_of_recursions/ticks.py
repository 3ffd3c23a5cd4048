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

from adaptive import recursion
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
    before, after: keys and values of the layers around the loop, stacked [e, b, s, k, h].
    block: of the shared block, [j, r, b, s, k, h], with r = 1 when recursions share them.
    index: position of the token in each slot of `block`, int32 [r, b, s]. counts: tokens that passed, int32 [r, b].
  """

  x: jax.Array
  which: jax.Array
  weight: jax.Array
  lengths: jax.Array
  before: LayerCache
  after: LayerCache
  block: LayerCache
  index: jax.Array
  counts: jax.Array

  @property
  def room(self) -> int:
    return self.block.key.shape[3]


def ticker(model: nn.Module, params: Params, rule: Rule) -> Ticker:
  """Raises ConfigError for models whose tokens do not decide pass by pass."""
  config = model.method
  require(config.expert_choice, "depth-wise batching needs method.routing='expert_choice'")
  require(config.kv_cache != "hybrid", "depth-wise batching needs method.kv_cache 'recursion_wise' or 'shared'")
  return Ticker(
    params=decode.decoder(model, params, rule).params,
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
  index = jnp.stack(cache.index) if cache.index else jnp.zeros((0, slots, room), jnp.int32)
  return Slots(
    x=jnp.zeros((slots, model.config.d_model), model.config.dtype),
    which=jnp.full((slots,), IDLE, jnp.int32),
    weight=jnp.zeros((slots,)),
    lengths=cache.lengths,
    before=cache.before,
    after=cache.after,
    block=jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *cache.block),
    index=index,
    counts=cache.counts,
  )


def _advance(model: nn.Module, rule: Rule, params: Params, slots: Slots) -> Slots:
  """The next pass of every slot that is under way, and what it decides after that."""
  number, rows = model.method.num_recursions, jnp.arange(slots.x.shape[0])
  active = (slots.which >= 0) & (slots.which < number)
  which, position = jnp.clip(slots.which, 0, number - 1), slots.lengths - 1
  alone = model.method.kv_cache == "recursion_wise"
  # With shared keys a recursion reads those of the first, which alone stores its token's.
  place = slots.counts[which, rows] if alone else position
  stored = active if alone else active & (which == 0)
  target = jnp.where(stored, place, slots.room)
  layer = which if alone else jnp.zeros_like(which)
  own = jax.tree.map(lambda leaf: leaf[:, layer, rows], slots.block)
  index = slots.index
  if alone:
    index = index.at[layer, rows, target].set(position, mode="drop")
    seen = index[layer, rows] <= position[:, None]
  else:
    seen = jnp.arange(slots.room)[None] <= position[:, None]
  x, entry = _run(model, _layers(model, params)[1], slots.x, position, seen, target, own)
  block = jax.tree.map(lambda leaf, new: leaf.at[:, layer, rows, target].set(new, mode="drop"), slots.block, entry)
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
  position = slots.lengths[chosen] - 1
  target = jnp.where(position < 0, slots.room, position)  # of a slot that never held a request
  x, after = _around(model, _layers(model, params)[2], slots.x[chosen], position, slots.after, chosen, target)
  return model.apply({"params": params}, x[:, None], method="head")[:, 0], slots._replace(after=after)


def _feed(model: nn.Module, rule: Rule, params: Params, slots: Slots, chosen, tokens, valid) -> Slots:
  """Begins the next token [c] of the chosen slots, where valid [c]."""
  position = slots.lengths[chosen]
  x = model.apply({"params": params}, tokens[:, None], method=lambda m, t: m.embedding.encode(t))[:, 0]
  target, begins = jnp.where(valid, position, slots.room), jnp.where(valid, chosen, slots.which.shape[0])
  x, before = _around(model, _layers(model, params)[0], x, position, slots.before, chosen, target)
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
  cache = decode.empty_cache(model, Rule(model.method.num_recursions), tokens.shape[0], slots.room)
  logits, cache, _ = decode.step_of(model, rule, params, tokens, counts, cache)
  target = jnp.where(counts > 0, chosen, slots.which.shape[0])

  def put(leaf, rows, axis: int):
    where = (slice(None),) * axis + (target,)
    return leaf.at[where].set(rows, mode="drop")

  block = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *cache.block)
  index = put(slots.index, jnp.stack(cache.index), 1) if cache.index else slots.index
  return logits, slots._replace(
    which=slots.which.at[target].set(IDLE, mode="drop"),
    lengths=put(slots.lengths, cache.lengths, 0),
    before=jax.tree.map(lambda leaf, rows: put(leaf, rows, 1), slots.before, cache.before),
    after=jax.tree.map(lambda leaf, rows: put(leaf, rows, 1), slots.after, cache.after),
    block=jax.tree.map(lambda leaf, rows: put(leaf, rows, 2), slots.block, block),
    index=index,
    counts=put(slots.counts, cache.counts, 1),
  )


def _layers(model: nn.Module, params: Params):
  return recursion.split(model.sharing, params["layers"])


def _around(model: nn.Module, layers: Params, x, position, caches: LayerCache, chosen, target):
  """Layers around the loop for the chosen slots, whose caches grow by a token."""
  own = jax.tree.map(lambda leaf: leaf[:, chosen], caches)
  seen = jnp.arange(caches.key.shape[2])[None] <= position[:, None]
  x, entry = _run(model, layers, x, position, seen, target, own)
  put = lambda leaf, new: leaf.at[:, chosen, target].set(new, mode="drop")
  return x, jax.tree.map(put, caches, entry)


def _run(model: nn.Module, layers: Params, x, position, seen, target, own: LayerCache):
  """Layers on one token of each row, [b, d]; and the token's own keys and values, each [l, b, k, h]."""
  table = rope_table(model.config, position[:, None])
  context = Context(*table, seen[:, None, None], target[:, None])
  x, caches = recursion.run_layers(model.config, layers, x[:, None], context, own)
  place = jnp.clip(target, 0, own.key.shape[2] - 1)
  entry = jax.tree.map(lambda leaf: leaf[:, jnp.arange(leaf.shape[1]), place], caches)
  return x[:, 0], entry

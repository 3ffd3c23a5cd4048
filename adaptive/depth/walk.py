"""Tokens at a model's exits, whatever takes them from one to the next: who leaves where, and with which logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive.backbone.transformer import Params
from adaptive.depth.exits import Exiting, Exits, Rule
from adaptive.depth.signals import Seen
from adaptive.losses import SumCount


class Walk(NamedTuple):
  """What is known of the tokens on their way up.

  Attributes:
    x: residual stream [b, t, d]. alive: which have not left, bool [b, t]. logits: of those that have, [b, t, v].
    previous: stream and logits at the exit before.
    memory: of the signal, float32 [b, t]. mean: of the streams so far, [b, t, d]; None where the signal averages none.
  """

  x: jax.Array
  alive: jax.Array
  logits: jax.Array
  previous: tuple[jax.Array, jax.Array]
  memory: jax.Array
  mean: jax.Array | None


def begin(exits: Exits, x: jax.Array, real: jax.Array) -> Walk:
  """Of tokens [b, t, d] below all layers, those that are no padding, bool [b, t]."""
  vocab = jnp.zeros((*x.shape[:2], exits.config.vocab_size), jnp.float32)
  mean = jnp.zeros_like(x) if exits.signal({}, 0).averages else None
  return Walk(x, real, vocab, (x, vocab), jnp.zeros(real.shape, jnp.float32), mean)


def look(
  exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
  """What an early exit says of tokens that have come there.

  Returns:
    The signal [b, t], logits [b, t, v] if it reads them, what the head reads of a token that leaves [b, t, d], and what
    the mean is for one that stays.
  """
  signal, (before, previous) = exits.signal(params, which), walk.previous
  logits = exits.head(params, which, walk.x) if signal.reads_logits else None
  value = signal.value(Seen(logits, previous if which else None, walk.x, before, positions, walk.memory))
  if not signal.averages:
    return value, logits, walk.x, walk.mean
  grown = signal.remember(value, walk.memory) - walk.memory
  return value, logits, _added(walk, 1 - walk.memory), _added(walk, grown)


def _added(walk: Walk, weight: jax.Array) -> jax.Array:
  """The mean with the present stream in it."""
  return walk.mean + weight[..., None].astype(walk.x.dtype) * walk.x


def last_read(walk: Walk) -> jax.Array:
  """What the model's own head reads of tokens that have come to it."""
  return walk.x if walk.mean is None else _added(walk, 1 - walk.memory)


# (exit, x [b, t, d], alive [b, t], state) -> (x after the layers before that exit, state)
Run = Callable[[int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def leave(
  exits: Exits, params: Params, x: jax.Array, positions: jax.Array, real: jax.Array, rule: Rule, run: Run, state: Any
) -> tuple[jax.Array, list[jax.Array], Any]:
  """Tokens [b, t, d] on their way up, until each has left.

  Args:
    positions: int32 [b, t]. real: no padding, bool [b, t]. run: the layers before an exit; `state` is what it hands on.

  Returns:
    Logits [b, t, v] of the exit where each left, which tokens ran the layers before each exit (bool [b, t] each), and
    the last state.
  """
  walk, ran = begin(exits, x, real), []
  for which in range(len(exits.depths)):
    ran.append(walk.alive)
    x, state = run(which, walk.x, walk.alive, state)
    walk = walk._replace(x=x)
    # When all have left there is nobody to ask, so the head is not run either.
    ask = lambda walk, which=which: _ask(exits, params, which, walk, positions, rule)
    walk = jax.lax.cond(jnp.any(walk.alive), ask, lambda walk: walk, walk)
  return walk.logits, ran, state


def _ask(exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array, rule: Rule) -> Walk:
  """Lets those leave at an exit that are sure, or end their text; at the last one, all."""
  over = _over(exits, params, which, walk, positions, rule)
  if which == len(exits.depths) - 1:
    logits = _spoken(exits, over, exits.head(params, which, last_read(walk)))
    return walk._replace(logits=jnp.where(walk.alive[..., None], logits, walk.logits), alive=jnp.zeros_like(walk.alive))
  value, logits, read, mean = look(exits, params, which, walk, positions)
  limit = jnp.asarray(rule.thresholds, jnp.float32)[which] * decay(exits.how, positions)
  sure = (value > limit) & may_leave(exits, positions)
  goes = walk.alive & (sure | (exits.depths[which] >= rule.depth) | over)
  spoken = lambda logits: jnp.where(goes[..., None], _spoken(exits, over, logits), walk.logits)
  if logits is None:  # the head is for those that leave, if any does
    out = jax.lax.cond(jnp.any(goes), lambda: spoken(exits.head(params, which, read)), lambda: walk.logits)
  else:
    out = spoken(logits)
  previous = walk.previous[1] if logits is None else logits
  memory = exits.signal(params, which).remember(value, walk.memory)
  return Walk(walk.x, walk.alive & ~goes, out, (walk.x, previous), memory, mean)


def may_leave(exits: Exits, positions: jax.Array) -> jax.Array:
  """Which tokens at positions [b, t] may leave by what they see, bool [b, t]."""
  return positions > 0 if exits.first_stays else jnp.ones(positions.shape, bool)


def _over(exits: Exits, params: Params, which: int, walk: Walk, positions: jax.Array, rule: Rule) -> jax.Array:
  """Which tokens end their text at an exit, bool [b, t]; none where the rule lets none leave by what is seen."""
  if exits.ends is None:
    return jnp.zeros_like(walk.alive)
  asks = jnp.any(jnp.asarray(rule.thresholds, jnp.float32) < jnp.inf)
  return asks & exits.ends.says(params, which, walk.x, positions)


def _spoken(exits: Exits, over: jax.Array, logits: jax.Array) -> jax.Array:
  """Logits [b, t, v] with no choice left where a text ends, at any temperature that is of use."""
  if exits.ends is None:
    return logits
  certain = jnp.where(jnp.arange(logits.shape[-1]) == exits.ends.token, 0.0, -1e4)
  return jnp.where(over[..., None], certain[None, None], logits)


def decay(how: Exiting, positions: jax.Array) -> jax.Array | float:
  """Factor of a threshold at positions [b, t] (CALM, Section 3.3)."""
  if not how.decay:
    return 1.0
  return 1 - how.decay + how.decay * jnp.exp(-how.decay_rate * positions / how.decay_length)


def realised(exits: Exits, ran: Sequence[jax.Array], real: jax.Array) -> Mapping[str, SumCount]:
  """Share of the tokens that ran the layers before each exit, `ran/<depth>`, and layers of a token, `layers`."""
  number = jnp.sum(real, dtype=jnp.float32)
  tokens = [jnp.sum(some & real, dtype=jnp.float32) for some in ran]
  layers = sum((stop - start) * some for (start, stop), some in zip(exits.segments, tokens))
  return {f"ran/{depth}": (some, number) for depth, some in zip(exits.depths, tokens)} | {"layers": (layers, number)}

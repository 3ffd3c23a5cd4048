"""Token-choice routing: every token is given its number of passes before the first (Section 2.2.1 of the paper).

    p = gate(router(H_1)),  depth = argmax(p + bias),  a token of depth i passes through the shared block i + 1 times

The router looks at nothing but the token, so training and inference do the same. `recur` computes all tokens in each
recursion and keeps what is wanted; `recur_gathered` computes a bounded number of them.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import routing
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.depth.mixture_of_recursions.blocks import Block, gate


class Routes(NamedTuple):
  """What the router says of each token.

  Attributes:
    logits, gates: float32 [b, t, r].
    depth: passes after the first, int32 [b, t].
  """

  logits: jax.Array
  gates: jax.Array
  depth: jax.Array


def route(model: nn.Module, params: Params, x: jax.Array, most: int | jax.Array) -> Routes:
  """Routes of the tokens whose residual stream before the first recursion is x [b, t, d]; at most `most` passes."""
  config = model.method
  logits = routing.router_logits(params["router"], 0, x, config.temperature)
  gates = gate(config, logits)
  # The bias of loss-free balancing decides, and does not weigh (Wang et al. 2024).
  preference = gates + params["router"]["bias"][None, None] if config.balance == "loss_free" else gates
  return Routes(logits, gates, jnp.minimum(jnp.argmax(preference, axis=-1), most - 1))


def compose(model: nn.Module, routes: Routes, start: jax.Array, state: jax.Array) -> jax.Array:
  """The residual stream after the recursions: the one before them, plus what the last pass of each token left."""
  if model.method.composition == "last":
    state = weigh(routes.gates, routes.depth, state)
  return start + state.astype(start.dtype)


def passed(model: nn.Module, routes: Routes, which: int, output: jax.Array) -> jax.Array:
  """The state of the tokens that pass recursion `which`, from the block's output [b, n, d] for them."""
  return weigh(routes.gates, which, output).astype(output.dtype) if model.method.composition == "every" else output


def weigh(gates: jax.Array, which: int | jax.Array, x: jax.Array) -> jax.Array:
  index = jnp.broadcast_to(jnp.asarray(which, jnp.int32), gates.shape[:2])
  return jnp.take_along_axis(gates, index[..., None], axis=-1) * x


def recur(model: nn.Module, block: Block, x: jax.Array, routes: Routes) -> jax.Array:
  """All recursions, each computed for all tokens: exact, and saves nothing. [b, t, d] -> [b, t, d]."""
  state, base, real = x, None, block.everyone.real
  for which in range(model.method.num_recursions):
    keep = real & (routes.depth >= which)
    output, base = block(which, state, block.everyone, base, keep)
    state = jnp.where(keep[..., None], passed(model, routes, which, output), state)
  return compose(model, routes, x, state)


def recur_gathered(
  model: nn.Module, block: Block, x: jax.Array, routes: Routes, capacities: tuple[int, ...]
) -> tuple[jax.Array, Routes]:
  """The same, but recursion r computes `capacities[r]` tokens of each row: those late in the row leave early.

  Returns:
    The residual stream [b, t, d], and the routes that were taken.
  """
  state, base, everyone = x, None, block.everyone
  for which, capacity in enumerate(capacities):
    keep = everyone.real & (routes.depth >= which)
    index = routing.first(keep, capacity)
    valid = routing.take(keep, index)
    late = keep & ~routing.at(index, keep.shape[1])
    routes = routes._replace(depth=jnp.where(late, which - 1, routes.depth))
    tokens = everyone.take(index)
    # What only fills the places up becomes padding, which no token sees.
    tokens = tokens._replace(segment_ids=jnp.where(valid, tokens.segment_ids, 0))
    some = Routes(*(routing.take(part, index) for part in routes))
    before = routing.take(state, index)
    output, base = block(which, before, tokens, base, valid)
    after = jnp.where(valid[..., None], passed(model, some, which, output), before)
    state = routing.put(state, index, after)
  return compose(model, routes, x, state), routes


def balance(model: nn.Module, routes: Routes, real: jax.Array) -> tuple[jax.Array, Metrics]:
  """Balancing and z losses, and the share of each depth as chosen: `load/i`, which `control` reads."""
  config = model.method
  number = jnp.maximum(jnp.sum(real), 1)
  chosen = jax.nn.one_hot(routes.depth, config.num_recursions) * real[..., None]
  loads = jnp.sum(chosen, axis=(0, 1))
  metrics = {f"load/{i + 1}": (loads[i], number.astype(jnp.float32)) for i in range(config.num_recursions)}
  metrics["balance_loss"] = (_balance_loss(routes, loads / number, real, number), jnp.ones(()))
  total, count = routing.z_loss(routes.logits, real)
  loss = config.z_loss * total / jnp.maximum(count, 1.0)
  return loss + (config.balance_loss * metrics["balance_loss"][0] if config.balance == "loss" else 0.0), metrics


def share(some: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Booleans [b, t] as a (sum, count) pair over the tokens that are no padding."""
  return jnp.sum(some & real, dtype=jnp.float32), jnp.sum(real, dtype=jnp.float32)


def _balance_loss(routes: Routes, shares: jax.Array, real: jax.Array, number: jax.Array) -> jax.Array:
  return routing.balance_loss(shares, jnp.sum(routes.gates * real[..., None], axis=(0, 1)) / number)


def balanced(model: nn.Module, bias: jax.Array, metrics: Metrics) -> jax.Array:
  """Loss-free balancing (Wang et al. 2024): the bias of each depth after an update with these loads, [r]."""
  loads = jnp.stack([metrics[f"load/{i + 1}"][0] for i in range(model.method.num_recursions)])
  step = model.method.balance_rate * jnp.sign(jnp.mean(loads) - loads)
  return bias + step.astype(bias.dtype)

"""Expert-choice routing in training: each recursion takes its top-k tokens of the row (Section 2.2.1 of the paper).

    s_r = router_r(H),  chosen_r = the k_r highest among chosen_{r-1},  H[chosen_r] += alpha f(s_r) Phi(H[chosen_r])

Phi is the whole shared block with its own residuals. Chosen tokens are gathered, run, and scattered back, so a
recursion costs what its tokens cost.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import losses, routing
from adaptive.backbone.attention import LayerCache
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.depth.mixture_of_recursions.blocks import Block, gate
from adaptive.methods.depth.mixture_of_recursions.config import Config
from adaptive.routing import Tokens


class Candidates(NamedTuple):
  """What goes from one recursion to the next: the tokens that it may choose from, and the first one's keys."""

  x: jax.Array
  tokens: Tokens
  base: LayerCache | None


def recur(
  model: nn.Module, params: Params, block: Block, x: jax.Array, capacities: tuple[int, ...], key: jax.Array
) -> tuple[jax.Array, jax.Array, Metrics]:
  """All recursions of the shared block.

  Args:
    x: residual stream of all tokens, [b, t, d].
    capacities: tokens of each recursion. key: of a random router.

  Returns:
    The residual stream after them, the router losses to be added to the training loss, and metrics by recursion.
  """
  config, length = model.method, x.shape[1]
  chunks = length // config.capacity_chunk if config.capacity_chunk else 1
  router_losses, metrics = [], {}

  def recursion(which: int, candidates: Candidates) -> jax.Array:
    x, tokens, base = candidates
    scores = _scores(config, params, which, x, key)
    capacity, everyone = capacities[which], capacities[which] == x.shape[1]
    # Padding is chosen last. What a sort decides has no gradient.
    order = jax.lax.stop_gradient(jnp.where(tokens.real, scores, -jnp.inf))
    chosen = None if everyone else routing.top(order, capacity, chunks)
    loss, found = _judge(config, params, which, x, tokens.real, scores, chosen)
    router_losses.append(loss)
    metrics.update({f"{name}/{which + 1}": pair for name, pair in found.items()})
    picked, some, weight = x, tokens, gate(config, scores[..., None])
    if not everyone:
      picked, some, weight = routing.take(x, chosen), tokens.take(chosen), routing.take(weight, chosen)
    output, base = block(which, picked, some, base)
    after = picked + (output if config.gating == "additive" else (weight * output).astype(x.dtype))
    if which + 1 < config.num_recursions:
      after = recursion(which + 1, Candidates(after, some, base))
    return after if everyone else routing.put(x, chosen, after)

  x = recursion(0, Candidates(x, block.everyone, None))
  return x, sum(router_losses), metrics


def _scores(config: Config, params: Params, which: int, x: jax.Array, key: jax.Array) -> jax.Array:
  """Float32 [b, n]."""
  if config.router == "random":
    return jax.random.uniform(jax.random.fold_in(key, which), x.shape[:2])
  return routing.router_logits(params["router"], which, x, config.temperature)[..., 0]


def _judge(
  config: Config, params: Params, which: int, x: jax.Array, real: jax.Array, scores: jax.Array, chosen: jax.Array | None
) -> tuple[jax.Array, Metrics]:
  """Loss of whoever decides at inference, and of the size of the scores; and how right it would have been.

  The target is whether the token was chosen, over the candidates alone.
  """
  everyone = chosen is None
  targets = jnp.ones(real.shape, bool) if everyone else routing.at(chosen, real.shape[1])
  metrics = {"gate": losses.masked_sum(gate(config, scores[..., None])[..., 0], targets & real)}
  if config.router == "random":
    return jnp.zeros(()), metrics
  decisions, weight = scores, config.router_loss
  if config.inference == "aux_router":
    features = jax.lax.stop_gradient(x)
    decisions = routing.router_logits(params["aux_router"], which, features, config.temperature)[..., 0]
    weight = 1.0  # nothing else trains it, and it trains nothing else
  task = losses.binary_cross_entropy(decisions, targets, real)
  size = routing.z_loss(scores[..., None], real)
  metrics["router_loss"] = task
  metrics["router_accuracy"] = losses.masked_sum((decisions > 0) == targets, real)
  metrics["passing"] = losses.masked_sum(decisions > 0, real)
  return weight * losses.mean(task) + config.z_loss * losses.mean(size), metrics

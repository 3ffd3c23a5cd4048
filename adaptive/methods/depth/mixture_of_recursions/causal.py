"""What decides at inference, where no token may look ahead: thresholds on the routers' scores (Section 5.2, App. A.2).

The recursions here run on all tokens that they are given, with what is not kept masked: exact for any number of kept
tokens, and the reference for the gathered forms. `forward` has all tokens of a batch, `decode` those that are new.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import routing
from adaptive.depth import chance
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.depth.mixture_of_recursions import token_choice
from adaptive.methods.depth.mixture_of_recursions.blocks import Block, gate
from adaptive.routing import Tokens

_RANDOM_ROUTER = 0  # the random router's seed at inference


class Rule(NamedTuple):
  """The dial of a sub-model; numbers, or traced arrays [].

  Attributes:
    recursions: at most so many.
    score_shift: added to the score by which a token passes a recursion.
    capacity_scale: at most this times the capacity of a document's tokens so far pass; inf is no limit.
  """

  recursions: int | jax.Array
  score_shift: float | jax.Array = 0.0
  capacity_scale: float | jax.Array = float("inf")


class New(NamedTuple):
  """The tokens that a causal pass is for.

  Attributes:
    positions: in their documents, int32 [b, t]. real: no padding, bool [b, t].
    counts: tokens of their documents that passed each recursion before them, int32 [r, b].
  """

  positions: jax.Array
  real: jax.Array
  counts: jax.Array


# (recursion, x [b, t, d], keep [b, t], state) -> (the block's output [b, t, d], state)
Run = Callable[[int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# (recursion, scores [b, t], candidates [b, t]) -> keep [b, t]
Choose = Callable[[int, jax.Array, jax.Array], jax.Array]


def all_of(model: nn.Module, batch: dict[str, jax.Array], tokens: Tokens) -> New:
  """All tokens of a batch of whole rows."""
  counts = jnp.zeros((model.method.num_recursions, tokens.index.shape[0]), jnp.int32)
  return New(batch["positions"], tokens.real, counts)


def recur(
  model: nn.Module,
  params: Params,
  x: jax.Array,
  new: New,
  rule: Rule,
  run: Run,
  state: Any,
  choose: Choose | None = None,
) -> tuple[jax.Array, list[jax.Array], Any]:
  """The recursions of some tokens, [b, t, d] -> [b, t, d].

  Args:
    run: the shared block on tokens, of which those kept matter; `state` is what it hands on between recursions.
    choose: decides in place of the thresholds, for comparison.

  Returns:
    The residual stream, which tokens each recursion kept (bool [b, t] each), and the last state.
  """
  keeps = []
  if not model.method.expert_choice:
    routes, start = token_choice.route(model, params, x, rule.recursions), x
    for which in range(_most(model, rule)):
      keep = new.real & (routes.depth >= which)
      output, state = run(which, x, keep, state)
      x = jnp.where(keep[..., None], token_choice.passed(model, routes, which, output), x)
      keeps.append(keep)
    return token_choice.compose(model, routes, start, x), keeps, state
  active = new.real
  for which in range(_most(model, rule)):
    x, active, state = recur_once(model, params, which, x, active, new, rule, run, state, choose)
    keeps.append(active)
  return x, keeps, state


def recur_once(
  model: nn.Module,
  params: Params,
  which: int,
  x: jax.Array,
  active: jax.Array,
  new: New,
  rule: Rule,
  run: Run,
  state: Any,
  choose: Choose | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
  """Recursion `which` of expert choice, by those of the tokens that passed the one before, bool [b, t].

  Returns:
    The residual stream, which tokens passed, and the state.
  """
  weights, decisions = scores(model, params, which, x, new.positions)
  chosen = choose(which, weights, active) if choose else passes(model, which, decisions, rule)
  active &= chosen & (which < rule.recursions)
  active = bound(model, which, active, new, rule)
  output, state = run(which, x, active, state)
  if model.method.gating == "weighted":
    output = (gate(model.method, weights[..., None]) * output).astype(x.dtype)
  return jnp.where(active[..., None], x + output, x), active, state


def _most(model: nn.Module, rule: Rule) -> int:
  return rule.recursions if isinstance(rule.recursions, int) else model.method.num_recursions


def scores(model: nn.Module, params: Params, which: int, x: jax.Array, positions: jax.Array):
  """Scores that weigh, and scores that decide; float32 [b, t] each."""
  config = model.method
  if config.router == "random":
    key = jax.random.fold_in(jax.random.key(_RANDOM_ROUTER), which)
    scores = jax.vmap(jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p))))(positions)
    return scores, scores
  logits = lambda name: routing.router_logits(params[name], which, x, config.temperature)[..., 0]
  scores = logits("router")
  return scores, logits("aux_router") if config.inference == "aux_router" else scores


def passes(model: nn.Module, which: int, decisions: jax.Array, rule: Rule) -> jax.Array:
  """Whether tokens want recursion `which`, from the scores that decide."""
  shares = (1.0, *model.method.shares)
  if shares[which + 1] == shares[which]:  # as in training, there is nothing to choose
    return jnp.ones(decisions.shape, bool)
  if model.method.router == "random":
    return decisions > 1 - shares[which + 1] / shares[which]
  return decisions + rule.score_shift > 0


def bound(model: nn.Module, which: int, want: jax.Array, new: New, rule: Rule) -> jax.Array:
  """Those of the tokens that want recursion `which` for which the rule's capacity has room."""
  share = model.method.bound(which, rule.capacity_scale)
  if isinstance(share, float) and share >= 1:
    return want
  return routing.within_budget(want, new.positions, share, new.counts[which])[0]


def one_shot(block: Block) -> Run:
  """Runs the shared block on all tokens of the batch; the state is the first recursion's keys and values."""
  return lambda which, x, keep, base: block(which, x, block.everyone, base, keep)


def top_k(capacities: tuple[int, ...], chunks: int = 1) -> Choose:
  """Chooses as training does, which looks ahead."""

  def choose(which: int, scores: jax.Array, candidates: jax.Array) -> jax.Array:
    index = routing.top(jnp.where(candidates, scores, -jnp.inf), capacities[which], chunks)
    return routing.at(index, scores.shape[1]) & candidates

  return choose


def by_chance(rates: jax.Array, places: jax.Array) -> Choose:
  """Lets a share [r] of the candidates pass each recursion, whichever they are; `places` [b, t] are the tokens'."""
  return lambda which, scores, candidates: chance.noise(places, which) < rates[which]


def realised(model: nn.Module, keeps: list[jax.Array], real: jax.Array) -> Metrics:
  """Share of the tokens that each recursion kept: `capacity/1` to `capacity/r`, zero where there was none."""
  number = jnp.sum(real, dtype=jnp.float32)
  kept = [jnp.sum(keep & real, dtype=jnp.float32) for keep in keeps]
  kept += [jnp.zeros(())] * (model.method.num_recursions - len(kept))
  return {f"capacity/{which + 1}": (total, number) for which, total in enumerate(kept)}

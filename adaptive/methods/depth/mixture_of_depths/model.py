"""The model: the backbone's parameters and routers; and how its layers run, in training and under the causal rule.

    r = w x,   y = x + g(r) (layer(x) - x) for those that a routed layer takes,   y = x for the others

`layer` is a whole block, attention and feed-forward, with its own residuals, so `layer(x) - x` is what it adds. Those
that it takes attend to each other only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import losses, routing
from adaptive.backbone.attention import Context
from adaptive.backbone.transformer import REMAT_POLICIES, Block, Transformer
from adaptive.depth import chance, visits
from adaptive.methods.contract import Batch, Metrics, Params
from adaptive.methods.depth.mixture_of_depths.config import Config

ROUTERS = ("routers", "predictors")
CHANCE = "chance"  # what is scanned along with the routers where chance decides


class Rule(NamedTuple):
  """The dial of a sub-model; numbers, or traced arrays [].

  Attributes:
    score_shift: added to the score by which a token passes.
    capacity_scale: at most this times the capacity of a document's tokens so far pass; inf is no limit.
  """

  score_shift: float | jax.Array = 0.0
  capacity_scale: float | jax.Array = float("inf")


class MixtureOfDepths(Transformer):
  """Parameters: the backbone's; `routers`, and `predictors` where there are, stacked over the routed layers.

  Called on a batch it computes the logits of the full model under the causal rule.

  Attributes:
    chance: of a baseline: for every sub-model the share of the tokens that pass each routed layer, whichever they are.
  """

  method: Config = Config()
  chance: tuple[tuple[float, ...], ...] = ()

  @property
  def routed(self) -> tuple[int, ...]:
    """Indices of the routed layers."""
    return self.method.layers(self.config)

  def setup(self):
    super().setup()
    self.routers = routing.Router(self.config, "linear", len(self.routed), 1)
    if self.method.inference == "predictor":
      self.predictors = routing.Router(self.config, "small_mlp", len(self.routed), 1)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the token after each position."""
    if not self.is_initializing():
      return causal_logits(self.clone(parent=None), nn.unbox(self.variables["params"]), batch, Rule())[0]
    self.routers()
    if self.method.inference == "predictor":
      self.predictors()
    return super().__call__(batch)


# (a layer's parameters, its routers [1, ...], x [b, t, d]) -> (x, what was found of the layer)
Routed = Callable[[Params, Params, jax.Array], tuple[jax.Array, Any]]


def run_layers(model: nn.Module, params: Params, x: jax.Array, context: Context, routed: Routed) -> tuple:
  """All layers, [b, t, d] -> [b, t, d]; and what was found of the routed ones, stacked [r, ...].

  The scan is over the shortest stretch of layers that repeats, a pair where every other layer is routed.
  """
  config, block = model.config, Block(model.config, parent=None)
  kinds = [layer in model.routed for layer in range(config.num_layers)]
  groups = max(n for n in range(1, len(kinds) + 1) if kinds == kinds[: len(kinds) // n] * n)
  kinds = kinds[: len(kinds) // groups]
  unroll = max(config.unroll(config.num_layers) // len(kinds), 1)
  plain = lambda layer, x: block.apply({"params": layer}, x, context)[0]
  if config.remat != "none":  # outside of a loop, which one iteration is not, XLA could merge what is computed twice
    settings = dict(policy=REMAT_POLICIES[config.remat], prevent_cse=unroll >= groups)
    plain, routed = (jax.checkpoint(function, **settings) for function in (plain, routed))

  def group(x: jax.Array, layers_and_routers):
    layers, routers = layers_and_routers
    found = []
    for i, is_routed in enumerate(kinds):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      if is_routed:
        which = len(found)
        own = jax.tree.map(lambda leaf, i=which: leaf[i : i + 1], routers)
        x, one = routed(layer, own, x)
        found.append(one)
      else:
        x = plain(layer, x)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

  by_group = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), tree)
  routers = {name: params[name] for name in (*ROUTERS, CHANCE) if name in params}
  x, found = jax.lax.scan(group, x, (by_group(params["layers"]), by_group(routers)), unroll=unroll)
  return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def scores_of(config: Config, routers: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scores that choose and weigh, and scores that decide at inference; float32 [b, t] each."""
  scores = routing.router_logits(routers["routers"], 0, x)[..., 0]
  if config.inference == "router":
    return scores, scores
  return scores, routing.router_logits(routers["predictors"], 0, jax.lax.stop_gradient(x))[..., 0]


def wants(config: Config, decisions: jax.Array, rule: Rule) -> jax.Array:
  """Whether tokens want to pass, bool [b, t], from the scores that decide."""
  return jnp.ones(decisions.shape, bool) if config.capacity == 1 else decisions + rule.score_shift > 0


def gate(config: Config, scores: jax.Array) -> jax.Array:
  """g(r), float32."""
  functions = {"score": lambda r: r, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "none": jnp.ones_like}
  return functions[config.gate](scores)


def weigh(config: Config, x: jax.Array, y: jax.Array, scores: jax.Array) -> jax.Array:
  """x + g(r) (y - x), [b, n, d]: y is a layer's output, in which the residual stream x is already."""
  if config.gate == "none":
    return y
  added = y.astype(jnp.float32) - x
  return (x + gate(config, scores)[..., None] * added).astype(x.dtype)


def training_logits(model: nn.Module, params: Params, batch: Batch) -> tuple[jax.Array, Metrics]:
  """Logits under top-k, which looks ahead; and of each routed layer what its router did, (sums [r], counts [r]).

  A routed layer takes its tokens out of the row, runs on them alone, and puts them back.
  """
  config, length = model.method, batch["inputs"].shape[1]
  capacity, chunks = config.tokens(length), config.chunks(length)
  x, context = model.apply({"params": params}, batch, method="embed")
  everyone, block = routing.tokens_of(batch, context), Block(model.config, parent=None)

  def routed(layer: Params, routers: Params, x: jax.Array):
    scores, decisions = scores_of(config, routers, x)
    # Padding is chosen last. What a sort decides has no gradient.
    order = jax.lax.stop_gradient(jnp.where(everyone.real, scores, -jnp.inf))
    chosen = routing.top(order, capacity, chunks)
    some, before = everyone.take(chosen), routing.take(x, chosen)
    seen = Context(some.sin, some.cos, routing.visible(some, some))
    after, _ = block.apply({"params": layer}, before, seen)
    after = weigh(config, before, after, routing.take(scores, chosen))
    return routing.put(x, chosen, after), judge(config, scores, decisions, routing.at(chosen, length), everyone.real)

  x, found = run_layers(model, params, x, context, routed)
  return model.apply({"params": params}, x, method="head"), found


def judge(config: Config, scores: jax.Array, decisions: jax.Array, chosen: jax.Array, real: jax.Array) -> Metrics:
  """Loss of whoever decides at inference, how right it would have been, and how much it would let pass; all [b, t]."""
  passing = wants(config, decisions, Rule())
  return {
    "router_loss": losses.binary_cross_entropy(decisions, chosen, real),
    "router_accuracy": losses.masked_sum(passing == chosen, real),
    "passing": losses.masked_sum(passing, real),
    "gate": losses.masked_sum(gate(config, scores), chosen & real),
  }


def decide(
  config: Config, routers: Params, x: jax.Array, positions: jax.Array, real: jax.Array, rule: Rule, count: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Who passes a routed layer, without a look ahead.

  Args:
    x: residual stream [b, t, d]. positions: in the tokens' documents, int32 [b, t]. real: no padding, bool [b, t].
    count: tokens of their documents that passed before these, int32 [b].

  Returns:
    Scores that weigh [b, t]; who passes, bool [b, t]; and the count after them.
  """
  scores, decisions = scores_of(config, routers, x)
  want, share = real & wants(config, decisions, rule), config.bound(rule.capacity_scale)
  if isinstance(share, float) and share >= 1:
    return scores, want, count
  return scores, *routing.within_budget(want, positions, share, count)


def causal_logits(
  model: nn.Module, params: Params, batch: Batch, rule: Rule, rates: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Logits under the causal rule, and who passed the routed layers, bool [r, b, t]. All is computed, and masked.

  Args:
    rates: shares of the tokens, [r], that chance lets pass in place of the rule.
  """
  params = params if rates is None else {**params, CHANCE: (rates, jnp.arange(len(model.routed)))}
  config, nobody = model.method, jnp.zeros((batch["inputs"].shape[0],), jnp.int32)
  positions, real = batch["positions"], batch["segment_ids"] > 0
  x, context = model.apply({"params": params}, batch, method="embed")
  places = chance.places(x, positions)

  def who_passes(routers: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if rates is None:
      return decide(config, routers, x, positions, real, rule, nobody)[:2]
    rate, which = routers[CHANCE]
    return scores_of(config, routers, x)[0], real & (chance.noise(places, which[0]) < rate[0])

  def routed(layer: Params, routers: Params, x: jax.Array):
    scores, keep = who_passes(routers, x)
    one = jax.tree.map(lambda leaf: leaf[None], layer)
    y, _ = visits.one_shot(model.config, one, x, context, keep, "hole", visits.nothing(model.config, x))
    return weigh(config, x, y, scores), keep

  x, keeps = run_layers(model, params, x, context, routed)
  return model.apply({"params": params}, x, method="head"), keeps


def realised(model: nn.Module, keeps: jax.Array | list[jax.Array], real: jax.Array) -> Metrics:
  """Share of the tokens that passed each routed layer, `capacity/<layer>`."""
  return {f"capacity/{layer}": losses.masked_sum(keep, real) for layer, keep in zip(model.routed, keeps)}

"""The model: the backbone's parameters with fewer layers, and routers; and its forward passes from batch to logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import recursion
from adaptive.backbone.transformer import Transformer
from adaptive.methods.contract import Batch, Metrics, Params
from adaptive.methods.depth.mixture_of_recursions import causal, expert_choice, token_choice
from adaptive.methods.depth.mixture_of_recursions.blocks import Block
from adaptive.methods.depth.mixture_of_recursions.causal import Choose, Rule
from adaptive.methods.depth.mixture_of_recursions.config import Config, capacity_tokens
from adaptive.routing import Router, tokens_of


class MixtureOfRecursions(Transformer):
  """Parameters: `embedding`, `layers` (unique ones, stacked), `final_norm`, `router` and `aux_router` where there are.

  Called on a batch it computes the logits of the full model under the causal rule.

  Attributes:
    chance: of a baseline: for every sub-model the share of the candidates that pass each recursion, whichever they are.
  """

  method: Config = Config()
  chance: tuple[tuple[float, ...], ...] = ()

  @property
  def sharing(self) -> recursion.Sharing:
    return self.method.sharing_of(self.config)

  @property
  def stacked(self) -> int:
    return self.sharing.unique

  def setup(self):
    super().setup()
    method = self.method
    sizes = dict(number=method.num_recursions, outputs=1)
    if not method.expert_choice:
      sizes = dict(number=1, outputs=method.num_recursions, balanced=method.balance == "loss_free")
    if method.router != "random":
      self.router = Router(self.config, method.router, **sizes)
    if method.inference == "aux_router":
      self.aux_router = Router(self.config, method.router, **sizes)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the token after each position."""
    if not self.is_initializing():
      params, unbound = nn.unbox(self.variables["params"]), self.clone(parent=None)
      return causal_logits(unbound, params, batch, Rule(self.method.num_recursions))[0]
    if self.method.router != "random":
      self.router()
    if self.method.inference == "aux_router":
      self.aux_router()
    return super().__call__(batch)


def _around(model: MixtureOfRecursions, params: Params, batch: Batch, recur) -> tuple:
  """Embedding, layers before, `recur(block, x)`, layers after, head; logits and what else `recur` returned."""
  x, context = model.apply({"params": params}, batch, method="embed")
  before, shared, after = recursion.split(model.sharing, params["layers"])
  x, _ = recursion.run_layers(model.config, before, x, context)
  block = Block(model.config, model.method.kv_cache, shared, tokens_of(batch, context), model.method.remat_recursions)
  x, *rest = recur(block, x)
  x, _ = recursion.run_layers(model.config, after, x, context)
  return model.apply({"params": params}, x, method="head"), *rest


def training_logits(
  model: MixtureOfRecursions, params: Params, batch: Batch, stage: int | None, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, Metrics]:
  """Logits as training computes them (expert choice: top-k, which looks ahead), the routers' losses, and metrics.

  Args:
    stage: of the capacity warm-up. key: of a random router. step: updates so far.
  """
  config, seq_len = model.method, batch["inputs"].shape[1]

  def choose_tokens(block: Block, x: jax.Array):
    return expert_choice.recur(model, params, block, x, capacity_tokens(config, seq_len, stage), key)

  def choose_depths(block: Block, x: jax.Array):
    routes = token_choice.route(model, params, x, config.num_recursions)
    loss, metrics = token_choice.balance(model, routes, block.everyone.real)  # of what the router wants, not of warm-up
    if config.balance_warmup_steps:
      deepest = jnp.full_like(routes.depth, config.num_recursions - 1)
      routes = routes._replace(depth=jnp.where(step < config.balance_warmup_steps, deepest, routes.depth))
    if not config.capacities:
      return token_choice.recur(model, block, x, routes), loss, metrics
    x, taken = token_choice.recur_gathered(model, block, x, routes, capacity_tokens(config, seq_len))
    late = (taken.depth < routes.depth) & block.everyone.real
    return x, loss, {**metrics, "left_early": token_choice.share(late, block.everyone.real)}

  return _around(model, params, batch, choose_tokens if config.expert_choice else choose_depths)


def causal_logits(
  model: MixtureOfRecursions, params: Params, batch: Batch, rule: Rule, choose: Choose | None = None
) -> tuple[jax.Array, list[jax.Array]]:
  """Logits under the causal rule, or as `choose` decides; and the tokens that each recursion kept, bool [b, t]."""

  def recur(block: Block, x: jax.Array):
    new, run = causal.all_of(model, batch, block.everyone), causal.one_shot(block)
    return causal.recur(model, params, x, new, rule, run, None, choose)[:2]

  return _around(model, params, batch, recur)

"""Settings of Mixture-of-Recursions, and what cannot be combined."""

import dataclasses
import math
from typing import Literal

import jax

from adaptive import routing
from adaptive.config import ModelConfig, require, require_range
from adaptive.recursion import Sharing

KeyValues = Literal["recursion_wise", "shared", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of Mixture-of-Recursions.

  Attributes:
    num_recursions: most passes of a token through the shared block (N_r in the paper).
    sharing: which layers are shared, see `adaptive.recursion`.
    routing: `expert_choice`: each recursion takes its top-k tokens among those of the one before. `token_choice`: each
      token is given its number of passes before the first.
    router: parameters of the router; `random` scores at random, an ablation that costs surprisingly little.
    gate: function of a router's score; a softmax is over the recursions and belongs to token choice. alpha: its factor.
    gating: `weighted` adds alpha f(s) times the block's output to a chosen token, `additive` the output itself.
    temperature: divides what the routers read.
    capacities: for each recursion the share of the whole row that it takes, not increasing; empty is
      (N_r, N_r - 1, ..., 1) / N_r. In token choice: a bound on the tokens of each recursion in training, beyond which
      those late in the row leave early; empty computes all tokens and saves nothing.
    capacity_chunk: expert choice takes its tokens within pieces of so many tokens; bounds how far it looks ahead. 0: in
      the whole row.
    capacity_multiple: rounds the number of tokens to a multiple of this, such as 128.
    warmup_steps, warmup_stages: capacities fall from 1 to their values along half a cosine over so many steps, in so
      many stages, each a program of its own.
    kv_cache: `recursion_wise`: the tokens of a recursion attend to each other. `shared`: all recursions use keys and
      values of the first. `hybrid`: the same, but for tokens of the recursion their fresh ones.
    inference: what decides at inference, where top-k would look ahead: the `router` itself, which then learns to tell
      whether it will choose a token (the paper's auxiliary loss), or an `aux_router`, which learns that apart from the
      model, from features without gradient.
    router_loss: weight of the router's cross entropy, per update whatever the number of micro-batches.
    z_loss: weight of the squared logsumexp of the scores.
    balance: of token choice: `loss` weighs f_i P_i by `balance_loss`; `loss_free` moves a bias of the choice by
      `balance_rate` after each update. balance_warmup_steps: all tokens go all the way until then.
    composition: of token choice: `last` multiplies the output of a token's last pass by its gate (the released code),
      `every` that of each pass (the paper's Equation 2.2).
    remat_recursions: the backward pass keeps the residual stream between recursions only.
    recursions, score_shifts, capacity_scales: sub-models beside the full one, at inference: fewer recursions (empty
      means each number); so much added to the scores that decide, so that more tokens pass, or fewer; no more than
      scale x capacity of a document's tokens so far (those of the first recursion all pass, where its capacity is 1).
  """

  num_recursions: int = 3
  sharing: Literal["cycle", "middle_cycle"] = "middle_cycle"
  routing: Literal["expert_choice", "token_choice"] = "expert_choice"
  router: Literal["linear", "mlp", "wide_mlp", "random"] = "linear"
  gate: Literal["sigmoid", "tanh", "softmax"] = "sigmoid"
  alpha: float = 0.1
  gating: Literal["weighted", "additive"] = "weighted"
  temperature: float = 1.0
  capacities: tuple[float, ...] = ()
  capacity_chunk: int = 0
  capacity_multiple: int = 1
  warmup_steps: int = 0
  warmup_stages: int = 4
  kv_cache: KeyValues = "recursion_wise"
  inference: Literal["router", "aux_router"] = "router"
  router_loss: float = 0.001
  z_loss: float = 0.0
  balance: Literal["loss", "loss_free"] = "loss"
  balance_loss: float = 0.1
  balance_rate: float = 0.001
  balance_warmup_steps: int = 0
  composition: Literal["last", "every"] = "last"
  remat_recursions: bool = False
  recursions: tuple[int, ...] = ()
  score_shifts: tuple[float, ...] = ()
  capacity_scales: tuple[float, ...] = ()

  @property
  def expert_choice(self) -> bool:
    return self.routing == "expert_choice"

  @property
  def shares(self) -> tuple[float, ...]:
    """Of the row, by recursion. Token choice without capacities counts as even use of all depths."""
    return self.capacities or tuple((self.num_recursions - r) / self.num_recursions for r in range(self.num_recursions))

  def bound(self, which: int, scale: float | jax.Array) -> float | jax.Array:
    """Share of a document's tokens that may pass a recursion. One that takes all tokens is never bounded."""
    share = self.shares[which]
    return 1.0 if share == 1 else scale * share

  @property
  def fewer(self) -> tuple[int, ...]:
    """Numbers of recursions of the sub-models that have fewer than all."""
    return self.recursions or tuple(range(1, self.num_recursions))

  def sharing_of(self, model: ModelConfig) -> Sharing:
    return Sharing(self.sharing, model.num_layers, self.num_recursions)


def check(model: ModelConfig, config: Config) -> None:
  """Raises ConfigError for settings that cannot be."""
  config.sharing_of(model)
  _check_ranges(config)
  _check_capacities(config)
  if config.expert_choice:
    require(config.gate != "softmax", "method.gate='softmax' needs method.routing='token_choice'")
    require(config.balance == "loss", "method.balance='loss_free' needs method.routing='token_choice'")
  else:
    require(config.gate != "tanh", "method.gate='tanh' needs method.routing='expert_choice'")
    require(config.router != "random", "method.router='random' needs method.routing='expert_choice'")
    for name, default in (("inference", "router"), ("gating", "weighted"), ("warmup_steps", 0), ("capacity_chunk", 0)):
      value = getattr(config, name)
      require(value == default, f"method.{name}={value!r} means nothing to method.routing='token_choice'")
    for name in ("score_shifts", "capacity_scales"):
      require(not getattr(config, name), f"method.{name} means nothing to method.routing='token_choice'")
  require(
    config.router != "random" or not (config.score_shifts or config.inference == "aux_router"),
    "method.router='random' has no threshold to shift and no aux_router",
  )


def _check_ranges(config: Config) -> None:
  require_range(config, "method.", "alpha temperature balance_rate", 0, above=True)
  require_range(config, "method.", "router_loss z_loss balance_loss", 0)
  require_range(config, "method.", "warmup_steps balance_warmup_steps capacity_chunk", 0)
  require_range(config, "method.", "capacity_multiple warmup_stages", 1)
  most = config.num_recursions
  require(
    list(config.recursions) == sorted(set(config.recursions)) and all(0 < r < most for r in config.recursions),
    f"method.recursions={config.recursions} must increase and be fewer than method.num_recursions={most}",
  )
  routing.check_dials(config.score_shifts, config.capacity_scales)


def _check_capacities(config: Config) -> None:
  shares = config.shares
  require(
    len(shares) == config.num_recursions,
    f"method.capacities has {len(shares)} entries for {config.num_recursions} recursions",
  )
  require(
    all(0 < c <= 1 for c in shares) and list(shares) == sorted(shares, reverse=True),
    f"method.capacities={shares} must lie in (0, 1] and not increase",
  )
  require(
    shares[0] == 1 or (config.expert_choice and config.kv_cache == "recursion_wise"),
    f"method.capacities begins with {shares[0]}: method.kv_cache={config.kv_cache!r} and token choice need all tokens "
    "in the first recursion",
  )


def capacity_tokens(config: Config, seq_len: int, stage: int | None = None) -> tuple[int, ...]:
  """Tokens of a row that each recursion of expert choice takes in training.

  Args:
    stage: of the capacity warm-up; None is after it.

  Raises:
    ConfigError: the row does not divide into chunks.
  """
  shares = config.shares if stage is None else warmed(config, stage)
  sizes = config.capacity_chunk, config.capacity_multiple
  counts = [routing.capacity_tokens(share, seq_len, *sizes) for share in shares]
  return tuple(min(counts[: i + 1]) for i in range(len(counts)))


def warmed(config: Config, stage: int) -> tuple[float, ...]:
  """Capacities in a stage of the warm-up: those that the cosine schedule has in the middle of it."""
  done = min((stage + 0.5) / config.warmup_stages, 1.0)
  rest = 0.5 * (1 + math.cos(math.pi * done))
  return tuple(c + (1 - c) * rest for c in config.shares)


def stage_of(config: Config, step: int) -> int | None:
  """The stage of the capacity warm-up that a step belongs to; None after it."""
  return step * config.warmup_stages // config.warmup_steps if step < config.warmup_steps else None

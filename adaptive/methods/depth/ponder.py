"""Pondering: a shared block runs again for a token until a halting unit says that it is enough.

PonderNet (Banino et al., arXiv 2107.05407) learns a distribution over the number of passes: the loss is expected under
it, and it is held to a prior. Adaptive computation time (Graves, arXiv 1603.08983), for tokens of a transformer as in
Universal Transformers (Dehghani et al., arXiv 1807.03819), adds halting probabilities up to 1, reads the mean of the
states that they weigh, and pays for the passes. Where a trained model halts is `method.exit`, `adaptive.depth.exits`.

Departures, with reasons:
- PonderNet halts where the probability of having halted is above a threshold (the paper draws a Bernoulli variable in
  each pass): it is the same in every run, and thresholds are a dial;
- the number of passes is bounded, and the last takes the rest of the prior too, so that the divergence is that of two
  distributions over the same passes;
- the task loss and the divergence, or the ponder cost, are means over tokens, so that a learning rate fits any batch;
- no pass is told its number (Universal Transformers add an embedding of it): the full PonderNet is a plain transformer;
- ACT's token that has halted leaves its last state to the others, as in Universal Transformers, not the mean;
- ACT without a threshold weighs no pass after the sum of probabilities has reached 1.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive import losses, recursion
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require, require_range
from adaptive.depth import climb as climbing
from adaptive.depth import exits as exiting
from adaptive.depth import objectives
from adaptive.depth import walk as walking
from adaptive.depth.signals import Signal
from adaptive.methods.contract import Batch, Metrics, Params
from adaptive.methods.defaults import batch_parts, check_training, control, learning_rates, static_choice, ticker
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, sample, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

HALTED = exiting.Exiting(signal="learned", thresholds=(0.5, 0.9, 0.99))


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of pondering.

  Attributes:
    halting: `pondernet`, or `act`, adaptive computation time.
    num_recursions: passes through the shared block at most. prelude: layers of their own before it; all layers after
      these are passes of the block.
    initial_halting: probability of halting in a pass that an untrained model has; small, so that all passes learn.
    prior: of halting in a pass, the geometric distribution to which PonderNet is held (lambda_p in the paper).
    kl_weight: of PonderNet's divergence from it (beta).
    epsilon: ACT is trained to halt where its probabilities add up to more than 1 - epsilon; `exit.thresholds` should
      have that number.
    ponder_cost: price of a pass in ACT's loss, in nats (tau).
    exit: how the trained model leaves. Thresholds of the signal `learned` are of the probability of having halted
      (PonderNet), or of the sum of probabilities (ACT).
  """

  halting: Literal["pondernet", "act"] = "pondernet"
  num_recursions: int = 4
  prelude: int = 0
  initial_halting: float = 0.1
  prior: float = 0.4
  kl_weight: float = 0.01
  epsilon: float = 0.01
  ponder_cost: float = 0.01
  exit: exiting.Exiting = HALTED

  def __post_init__(self):
    require_range(self, "method.", "num_recursions", 2)
    require_range(self, "method.", "prelude kl_weight ponder_cost", 0)
    for name in ("initial_halting", "prior", "epsilon"):
      value = getattr(self, name)
      require(0 < value < 1, f"method.{name}={value} must lie between 0 and 1")
    signal, depths = self.exit.signal, self.exit.depths
    require(
      self.halting != "act" or signal == "learned",
      f"method.exit.signal={signal!r}: the head of method.halting='act' reads its means",
    )
    require(signal != "learned" or not depths, f"method.exit.depths={depths}: what is learned adds up over every pass")


class HaltingUnit(nn.Module):
  """Declares a linear map of the stream to a number, float32 whatever the model is stored in: it decides."""

  config: ModelConfig
  initial: float

  @nn.compact
  def __call__(self) -> None:
    declare = lambda name, init, size: self.param(name, nn.with_logical_partitioning(init, (None,)), size, jnp.float32)
    declare("weight", nn.initializers.normal(self.config.init_std), (self.config.d_model,))
    declare("bias", nn.initializers.constant(logit(self.initial)), (1,))


class Ponder(Transformer):
  """Parameters: the backbone's, with the unique layers in `layers`, and `halting`."""

  method: Config = Config()

  def setup(self):
    super().setup()
    self.halting = HaltingUnit(self.config, self.method.initial_halting)

  @property
  def looped(self) -> recursion.Looped:
    method, depth = self.method, self.config.num_layers
    return recursion.Looped(method.prelude, (depth - method.prelude) // method.num_recursions, method.num_recursions)

  @property
  def stacked(self) -> int:
    return self.looped.unique

  @property
  def exits(self) -> exiting.Exits:
    return self.exits_of(self.method.exit)

  def exits_of(self, how: exiting.Exiting) -> exiting.Exits:
    """A token may leave after any pass."""
    looped, width = self.looped, self.config.d_model
    return exiting.Exits(
      self.clone(parent=None),
      how,
      exiting.check(self.config, how, looped.depths, learned=True, repeats=True),
      learned=self._signal,
      path=looped.layer_path,
      shown=lambda depth: ("recursions", looped.passes(depth)),
      added_params=width + 1,
      learned_flops=2.0 * width,
      kept=("halting",),
    )

  def _signal(self, params: Params, which: int) -> Signal:
    """The probability of having halted, remembered from pass to pass."""
    halts = lambda seen: jax.nn.sigmoid(halting_logits(params, seen.x))
    if self.method.halting == "act":
      value = lambda seen: jnp.minimum(seen.memory + halts(seen), 1.0)
    else:
      value = lambda seen: 1 - (1 - seen.memory) * (1 - halts(seen))
    return Signal(value, False, lambda value, memory: value, averages=self.method.halting == "act")

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing():
      self.halting()
      return super().__call__(batch)
    model, params = self.clone(parent=None), nn.unbox(self.variables["params"])
    return forward(model, params, batch, len(submodels(model)) - 1).logits


def build(model_config: ModelConfig, config: Config) -> Ponder:
  repeats, looped = config.num_recursions, model_config.num_layers - config.prelude
  below = config.prelude + max(looped, 0) // repeats * repeats
  near = " and ".join(str(depth) for depth in (below, below + repeats) if depth > config.prelude)
  require(
    looped > 0 and looped % repeats == 0,
    f"model.num_layers={model_config.num_layers} is not method.prelude={config.prelude} + {repeats} x J for "
    f"method.num_recursions={repeats}; nearest: {near}",
  )
  model = Ponder(model_config, method=config)
  exiting.check(model_config, config.exit, model.looped.depths, learned=True, repeats=True)  # refuses what cannot be
  return model


def logit(probability: float) -> float:
  return math.log(probability) - math.log1p(-probability)


def halting_logits(params: Params, x: jax.Array) -> jax.Array:
  """What the halting unit says of streams [..., d]: float32 [...], of which the sigmoid is a probability."""
  unit = params["halting"]
  return jnp.einsum("...d,d->...", x.astype(jnp.float32), unit["weight"]) + unit["bias"][0]


def log_distribution(logits: jax.Array) -> jax.Array:
  """ln p_n = ln lambda_n + sum_{j < n} ln(1 - lambda_j) from logits of lambda, [r - 1, ...] -> [r, ...].

  The last pass takes what is left, so that the p_n add up to 1.
  """
  nothing = jnp.zeros_like(logits[:1])
  not_before = jnp.concatenate([nothing, jnp.cumsum(jax.nn.log_sigmoid(-logits), axis=0)])
  return not_before + jnp.concatenate([jax.nn.log_sigmoid(logits), nothing])


def divergence(logs: jax.Array, prior: float) -> jax.Array:
  """KL(p || q) of p = exp(logs) [r, ...] and the geometric q whose tail the last pass has: [...]."""
  same = jnp.full((len(logs) - 1, *[1] * (logs.ndim - 1)), logit(prior), jnp.float32)
  return jnp.sum(jnp.exp(logs) * (logs - log_distribution(same)), axis=0)


def loss(model: Ponder, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """PonderNet: the expected cross entropy and the divergence. ACT: the mean's cross entropy and the ponder cost."""
  method, real = model.method, batch["segment_ids"] > 0
  by_kind = {"pondernet": (_expected, "divergence", method.kl_weight), "act": (_halted, "ponder", method.ponder_cost)}
  terms, name, weight = by_kind[method.halting]
  # Tokens whose predictions do not count halt all the same, and cost their passes.
  masks = (losses.counted(batch), real, real)
  named = zip(("loss", name, "passes"), terms(model, params, batch), masks)
  metrics = {what: (jnp.sum(each * mask), jnp.sum(mask, dtype=jnp.float32)) for what, each, mask in named}
  return losses.mean(metrics["loss"]) + weight * losses.mean(metrics[name]), metrics


def _expected(model: Ponder, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """PonderNet's terms of each token, [b, t] each: expected loss, divergence from the prior, expected passes.

  All tokens make all passes, each of which has the keys of its own.
  """
  states = jnp.stack(climbing.streams(model.exits_of(exiting.DEFAULT), params, batch))
  head = lambda _, x: model.apply({"params": params}, x, method="head")
  each = objectives.token_losses(head, None, states, batch["targets"])
  logs = log_distribution(halting_logits(params, states[:-1]))
  p = jnp.exp(logs)
  number = jnp.arange(1.0, len(p) + 1)[:, None, None]
  return jnp.sum(p * each, axis=0), divergence(logs, model.method.prior), jnp.sum(p * number, axis=0)


def _halted(model: Ponder, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
  """ACT's terms of each token, [b, t] each: loss of the mean, ponder cost N + R, and N.

  Tokens halt as they do at inference with the threshold 1 - epsilon. What depends on probabilities is the mean's
  weights and the remainder R = 1 - p_1 - ... - p_{N - 1}; N is a number.
  """
  exits = model.exits_of(dataclasses.replace(exiting.DEFAULT, signal="learned"))
  x, climb, state = climbing.whole_rows(exits, params, batch, "project")
  walk = walking.begin(exits, x, jnp.ones(x.shape[:2], bool))
  read, passes, remainder = jnp.zeros_like(x), jnp.zeros(x.shape[:2]), jnp.zeros(x.shape[:2])
  last = len(exits.depths) - 1
  for which in range(last + 1):
    x, state = climb(which, walk.x, walk.alive, state)
    walk, passes = walk._replace(x=x), passes + walk.alive
    value, mean, here, halts = walk.memory, walk.mean, walking.last_read(walk), walk.alive
    if which < last:
      value, _, here, mean = walking.look(exits, params, which, walk, batch["positions"])
      halts = halts & (value > 1 - model.method.epsilon)
    read = jnp.where(halts[..., None], here, read)
    remainder = jnp.where(halts, 1 - walk.memory, remainder)
    walk = walk._replace(alive=walk.alive & ~halts, memory=value, mean=mean)
  logits = model.apply({"params": params}, read, method="head")
  return losses.token_losses(logits, batch["targets"]), passes + remainder, passes


def init_from(model: Ponder, params: Params, source: Params, how: str, seed: int) -> Params:
  """The layers of a dense model of the unrolled depth, tied; the halting unit stays fresh."""
  return {**params, **source, "layers": model.looped.tie(source["layers"], how, seed)}


def update_flops(model: Ponder, choice: tuple[int, ...], seq_len: int) -> float:
  """All passes, which ACT may throw away, the halting unit between them, and in PonderNet a head after each."""
  passes = model.method.num_recursions
  heads = (passes - 1) * costs.head_flops(model.config) if model.method.halting == "pondernet" else 0.0
  units = (passes - 1) * model.exits.learned_flops
  return costs.update_flops(costs.dense_cost(model.config, seq_len).flops_per_token + heads + units)

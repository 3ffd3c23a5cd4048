"""Recurrent depth: a core of layers runs a random number of times in training, and as often as wanted afterwards.

Geiping et al., "Scaling up Test-Time Compute with Latent Reasoning: A Recurrent Depth Approach" (arXiv 2502.05171),
known by its model, Huginn. Layers of a prelude embed the tokens, e; from a random state s a pass makes the next by an
adapter of (e, s) and the layers of the core, Section 3. At inference every token may stop where its prediction, or its
state, no longer changes (Section 6.1): `method.exit`, `adaptive.depth.exits`; fewer passes draft for all of them.

Departures, with reasons:
- no coda: each look at the prediction would have to run it, and to keep its keys for that number of passes;
- the layers are this project's, without sandwich norms; e is normalised instead, and what the adapter makes, so that
  no number of passes lets the state grow;
- the first state is drawn once for each position, from a fixed seed (in the paper anew in each forward pass), so that
  decoding is the forward pass, and rows do not depend on each other;
- the number of passes is bounded by `num_recursions`, whose layers are the model's;
- matrices but the adapter are initialised as everywhere in this project.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import losses, recursion
from adaptive.backbone.layers import RMSNorm, param, rms_norm
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require, require_range
from adaptive.depth import climb as climbing
from adaptive.depth import exits as exiting
from adaptive.methods.contract import Batch, Metrics, Params, SubModel
from adaptive.methods.defaults import batch_parts, check_training, control, learning_rates, ticker
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

STABLE = exiting.Exiting(signal="stability", thresholds=(0.95, 0.99, 0.9995))


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of recurrent depth.

  Attributes:
    prelude: layers before the loop. core: layers of a pass. num_recursions: passes at most; `model.num_layers` is
      prelude + core * num_recursions.
    mean_recursions: of the passes of a training step, up to one (r-bar in the paper, where it is 32). sigma: of the
      logarithm of their rate.
    backprop: the gradient goes through so many of the last passes (k).
    state_std: of the first state, a normal truncated at three of them; 0 begins with zeros.
    exit: how the trained model leaves. A KL below 5e-4 is a `stability` above exp(-5e-4) = 0.9995.
  """

  prelude: int = 2
  core: int = 2
  num_recursions: int = 8
  mean_recursions: float = 4.0
  sigma: float = 0.5
  backprop: int = 8
  state_std: float = math.sqrt(2 / 5)
  exit: exiting.Exiting = STABLE

  def __post_init__(self):
    require_range(self, "method.", "core num_recursions backprop", 1)
    require_range(self, "method.", "prelude state_std", 0)
    require_range(self, "method.", "mean_recursions", 0, 1e6, above=True)
    require_range(self, "method.", "sigma", 0, 10)
    require(
      not self.exit.depths, f"method.exit.depths={self.exit.depths}: here a token may leave after every pass, or none"
    )
    kv = self.exit.kv
    require(
      kv not in ("exact", "recompute"), f"method.exit.kv={kv!r} cannot resume a pass: choose 'project' or 'latest'"
    )

  @property
  def looped(self) -> recursion.Looped:
    return recursion.Looped(self.prelude, self.core, self.num_recursions)


class Adapter(nn.Module):
  """Declares the matrix [2 d, d] that makes of (e, s) what a pass begins with, initialised as in the paper."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> None:
    width = self.config.d_model
    init = nn.initializers.normal(math.sqrt(2 / (5 * width)))
    param(self, "matrix", init, (2 * width, width), ("embed", None))


class RecurrentDepth(Transformer):
  """Parameters: the backbone's, with the unique layers in `layers`, `adapter`, `prelude_norm` and `core_norm`."""

  method: Config = Config()

  def setup(self):
    super().setup()
    self.adapter = Adapter(self.config)
    self.prelude_norm, self.core_norm = RMSNorm(self.config), RMSNorm(self.config)

  @property
  def stacked(self) -> int:
    return self.method.looped.unique

  @property
  def exits(self) -> exiting.Exits:
    return self.exits_of(self.method.exit)

  def exits_of(self, how: exiting.Exiting) -> exiting.Exits:
    """A token may leave after any pass."""
    looped, width = self.method.looped, self.config.d_model
    return exiting.Exits(
      self.clone(parent=None),
      how,
      exiting.check(self.config, how, looped.depths, repeats=True),
      path=looped.layer_path,
      shown=lambda depth: ("recursions", looped.passes(depth)),
      loop=exiting.Loop(self.method.prelude, self._start, self._enter, 4.0 * width * width),
      added_params=2 * width * width + 2 * width,
    )

  def _start(self, params: Params, e: jax.Array, positions: jax.Array) -> jax.Array:
    return first_state(self.method.state_std, e.shape[-1], positions).astype(e.dtype)

  def _enter(self, params: Params, s: jax.Array, e: jax.Array) -> jax.Array:
    eps = self.config.norm_eps
    both = jnp.concatenate([rms_norm(e, params["prelude_norm"]["scale"], eps), s], axis=-1)
    x = jnp.einsum("btf,fd->btd", both, params["adapter"]["matrix"].astype(s.dtype))
    return rms_norm(x, params["core_norm"]["scale"], eps)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing():
      x, _ = self.embed(batch)
      self.adapter(), self.prelude_norm(x), self.core_norm(x)
      return super().__call__(batch)
    model, params = self.clone(parent=None), nn.unbox(self.variables["params"])
    return forward(model, params, batch, len(submodels(model)) - 1).logits


def first_state(std: float, width: int, positions: jax.Array) -> jax.Array:
  """s_0 [b, t, d] of positions [b, t]: the same wherever and whenever a position is asked for."""
  if not std:
    return jnp.zeros((*positions.shape, width))
  draw = lambda position: jax.random.truncated_normal(jax.random.fold_in(jax.random.key(0), position), -3, 3, (width,))
  return std * jax.vmap(jax.vmap(draw))(positions)


def build(model_config: ModelConfig, config: Config) -> RecurrentDepth:
  depth, wanted = model_config.num_layers, config.looped.depths[-1]
  require(
    depth == wanted,
    f"model.num_layers={depth} is not method.prelude + method.core * method.num_recursions = {config.prelude} + "
    f"{config.core} * {config.num_recursions}; nearest: {wanted}",
  )
  exiting.check(model_config, config.exit, config.looped.depths, repeats=True)  # refuses what cannot be
  return RecurrentDepth(model_config, method=config)


def draw_recursions(config: Config, generator: np.random.Generator) -> int:
  """r ~ Poisson(e^tau) + 1, tau ~ N(ln(mean) - sigma^2 / 2, sigma), Section 3.3; not yet bounded."""
  tau = generator.normal(math.log(config.mean_recursions) - config.sigma**2 / 2, config.sigma)
  return 1 + int(generator.poisson(math.exp(tau)))


def sample(model: RecurrentDepth, seed: int, step: int) -> tuple[int, ...]:
  drawn = draw_recursions(model.method, np.random.Generator(np.random.Philox(key=[seed, step])))
  passes = min(drawn, model.method.num_recursions)
  return (submodels(model).index(SubModel.of(recursions=passes)),)


def static_choice(model: RecurrentDepth) -> bool:
  """Each number of passes is a program of its own, which computes no more than it needs."""
  return True


def loss(model: RecurrentDepth, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy after so many passes, with the gradient of the last ones."""
  passes = submodels(model)[choice[0]]["recursions"]
  x = truncated(model, params, batch, passes)
  logits = model.apply({"params": params}, x, method="head")
  pair = losses.cross_entropy(logits, batch["targets"], losses.counted(batch))
  return losses.mean(pair), {"loss": pair}


def truncated(model: RecurrentDepth, params: Params, batch: Batch, passes: int) -> jax.Array:
  """The state after so many passes, [b, t, d]; no gradient flows into the state before the last `backprop` ones.

  The prelude still has one, through e, which every pass reads.
  """
  exits = model.exits_of(exiting.DEFAULT)
  x, climb, state = climbing.whole_rows(exits, params, batch, "project")
  everyone = jnp.ones(x.shape[:2], bool)
  for which in range(passes):
    x, state = climb(which, x, everyone, state)
    if which + 1 == passes - model.method.backprop:
      x = jax.lax.stop_gradient(x)
  return x


def init_from(model: RecurrentDepth, params: Params, source: Params, how: str, seed: int) -> Params:
  """The layers of a dense model of the unrolled depth, tied; the adapter and its norms stay fresh."""
  return {**params, **source, "layers": model.method.looped.tie(source["layers"], how, seed)}


def update_flops(model: RecurrentDepth, choice: tuple[int, ...], seq_len: int) -> float:
  """Forward through all passes of the step, backward through the last ones."""
  method, submodel = model.method, submodels(model)[choice[0]]
  layers = method.core * costs.layer_flops(model.config, (seq_len + 1) / 2)
  one_way = max(submodel["recursions"] - method.backprop, 0) * (layers + model.exits.loop.flops)
  return costs.update_flops(cost(model, submodel, seq_len, {}).flops_per_token - one_way) + one_way

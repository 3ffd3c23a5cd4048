"""LayerSkip: layer dropout and a loss at every layer make one head fit all depths, so that any prefix can draft.

Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding" (arXiv 2404.16710, ACL 2024).
`adaptive.depth.objectives` has its equations. A sub-model is a prefix of the layers with the model's own norm and head,
or a threshold as in `early_exit`; self-speculative decoding is `adaptive.generation.speculative`.

Departures, with reasons:
- dropped rows are masked, and nothing is saved by it, unless `dropout_by` is `batch`: then a layer is dropped for all
  rows of a micro-batch together, and really left out (in the paper rows leave the batch: static shapes forbid it);
- the rates and weights are the paper's, not those of later ports, which scale the last layer differently.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require, require_range
from adaptive.depth import exits as exiting
from adaptive.depth import objectives
from adaptive.methods.contract import Batch, Metrics, Params
from adaptive.methods.defaults import (
  batch_parts,
  check_training,
  control,
  init_from,
  learning_rates,
  static_choice,
  ticker,
)
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, sample, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of LayerSkip; the paper's choices for each of its models are on the method's page.

  Attributes:
    dropout: rate of the last layer (p_max); the first layer's is 0, between them it grows exponentially.
    dropout_by: whether each row draws for itself, or all rows of a micro-batch together, which saves time.
    dropout_ramp_steps: the rates grow from 0 in so many steps, exponentially: the run's length from scratch, 0 (at
      once) for a trained model.
    exit_scale: of the losses of all layers but the last (e_scale).
    curriculum: at which layers a step has a loss, beside the last. `rotational`: layer l at steps t with
      l = t mod `rotation`. `gradual`: from the last downwards, one more in each equal part of the first half of
      `curriculum_steps`. `none`: at all.
    rotation: see there (R in the paper). curriculum_steps: the run's length, for `gradual`.
    exit: how the trained model leaves.
  """

  dropout: float = 0.1
  dropout_by: Literal["row", "batch"] = "row"
  dropout_ramp_steps: int = 0
  exit_scale: float = 0.2
  curriculum: Literal["rotational", "gradual", "none"] = "rotational"
  rotation: int = 8
  curriculum_steps: int = 0
  exit: exiting.Exiting = exiting.DEFAULT

  def __post_init__(self):
    require_range(self, "method.", "dropout", 0, 1)
    require_range(self, "method.", "exit_scale dropout_ramp_steps curriculum_steps", 0)
    require_range(self, "method.", "rotation", 1)
    require(
      self.curriculum != "gradual" or self.curriculum_steps > 0,
      "method.curriculum='gradual' needs method.curriculum_steps, such as training.steps",
    )


class LayerSkip(Transformer):
  """The backbone, with the method's settings. It has the backbone's parameters and no others."""

  method: Config = Config()

  @property
  def exits(self) -> exiting.Exits:
    """Any layer may be left after."""
    depths = exiting.check(self.config, self.method.exit, range(1, self.config.num_layers + 1))
    return exiting.Exits(self.clone(parent=None), self.method.exit, depths)


def build(model_config: ModelConfig, config: Config) -> LayerSkip:
  exiting.check(model_config, config.exit, range(1, model_config.num_layers + 1))  # refuses what cannot be
  return LayerSkip(model_config, method=config)


def enabled(model: LayerSkip, step: jax.Array) -> jax.Array:
  """C(t, l) of the paper, bool [l]: where a step has a loss; always at the last layer."""
  method, full = model.method, model.config.num_layers
  layers = np.arange(full)
  if method.curriculum == "rotational":
    on = layers % method.rotation == step % method.rotation
  elif method.curriculum == "gradual":
    reached = jnp.floor(step * (2 * full / method.curriculum_steps)).astype(jnp.int32)
    on = layers >= full - 1 - reached
  else:
    on = jnp.ones(full, bool)
  return on | (layers == full - 1)


def dropped(model: LayerSkip, rows: int, key: jax.Array, step: jax.Array) -> jax.Array | None:
  """Which layers are left out, bool [l, b] or [l]; None where the rates are 0."""
  method, full = model.method, model.config.num_layers
  if method.dropout == 0:
    return None
  rates = jnp.asarray(objectives.layer_dropout_rates(full, method.dropout), jnp.float32)
  if method.dropout_ramp_steps:
    rates *= objectives.exponential_ramp(step, method.dropout_ramp_steps)
  if method.dropout_by == "batch":
    return jax.random.uniform(key, (full,)) < rates
  return jax.random.uniform(key, (full, rows)) < rates[:, None]


def loss(model: LayerSkip, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Weighted mean of the next-token cross entropy after the enabled layers (eq. 4 to 6), under layer dropout."""
  method, full = model.method, model.config.num_layers
  out = dropped(model, batch["inputs"].shape[0], key, step)
  hidden = executors.exits(model.config, params, batch, range(1, full + 1), out)
  weights = jnp.asarray(objectives.layer_skip_weights(full, method.exit_scale), jnp.float32) * enabled(model, step)
  if method.curriculum == "rotational":  # no step has more, so no more heads are run
    first = step % method.rotation
    layers = first + method.rotation * jnp.arange(-(-(full - 1) // method.rotation))
    early = jnp.minimum(layers, full - 1)
    weights = jnp.append(jnp.where(layers < full - 1, weights[early], 0.0), weights[-1])
    hidden = jnp.concatenate([hidden[early], hidden[-1:]])
  pairs = objectives.exit_losses(lambda _, x: model.apply({"params": params}, x, method="head"), None, hidden, batch)
  last = jax.tree.map(lambda x: x[-1], pairs)
  early = jax.tree.map(lambda x: jnp.sum(x[:-1] * (weights[:-1] > 0)), pairs)
  return objectives.weighted(pairs, weights), {"loss": last, "early_loss": early}


def update_flops(model: LayerSkip, choice: tuple[int, ...], seq_len: int) -> float:
  """A forward pass without the layers that dropout leaves out on average, and a head for each enabled layer."""
  method, full = model.method, model.config.num_layers
  ramp = 1 / math.log(2) - 1 if method.dropout_ramp_steps else 1.0  # the mean of 2^u - 1 over u in 0..1
  left_out = ramp * float(objectives.layer_dropout_rates(full, method.dropout).sum())
  heads = {"rotational": (full - 1) / method.rotation, "gradual": 0.75 * (full - 1), "none": full - 1}
  layer = costs.layer_flops(model.config, (seq_len + 1) / 2)
  dense = costs.dense_cost(model.config, seq_len).flops_per_token
  return costs.update_flops(dense - left_out * layer + heads[method.curriculum] * costs.head_flops(model.config))

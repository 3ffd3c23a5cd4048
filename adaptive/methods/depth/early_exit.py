"""Early exit: heads at several depths, trained together; a token leaves at the first where the model is sure enough.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686): losses of all branches, weighted, trained jointly. EE-LLM (Chen
et al., arXiv 2312.04916): exits of a language model with heads of their own, and weights that warm up; training the
heads alone on a trained model is its EE-Tuning (arXiv 2402.00518). CALM (Schuster et al., arXiv 2207.07061): one head
for all exits, weights that grow with depth, thresholds that decay, and keys of the layers that a token did not run
projected from the stream with which it left. How a trained model leaves is `method.exit`, `adaptive.depth.exits`.

Departures, with reasons:
- a token leaves where its signal is strictly above the threshold (in CALM and EE-LLM at equality too, so that a
  threshold of 1 is passed where a softmax rounds to 1);
- what is projected is the stream at the exit (CALM's released decoding projects that of the first exit);
- signals are of each token by itself (CALM's released cosine is over the whole batch);
- the loss is a weighted mean, not a sum, so that a learning rate fits whatever the number of exits;
- an exit has at most a norm and a matrix of its own: the MLP or whole layer that EE-LLM and EE-Tuning may put before
  them is absent, as are their warm-up along a cosine (ours is linear) and their weights of single tokens;
- CALM's classifier, trained to say that an exit agrees with the model, is absent (`learned` is that of other methods),
  and so is the threshold that FREE finds while it decodes, by a mixture of Beta distributions: of FREE (Bae et al.,
  arXiv 2310.05424) there are the keys, `exit.kv="exact"`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors
from adaptive.backbone.transformer import Batch
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import exits as exiting
from adaptive.depth import heads, objectives
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.defaults import batch_parts, control, init_from, static_choice, ticker
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, sample, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of early exit.

  Attributes:
    exits: numbers of layers after which a head is trained, increasing; the model's own last exit is always there.
    heads: `shared`: all use the model's norm and head (CALM). `own`: each but the last has a norm and a matrix.
    weights: of the losses: `equal`, or in proportion to depth, `linear` (CALM), or to 2^depth, `exponential`.
    listed_weights: instead, one number for each exit, the last included (BranchyNet, EE-LLM).
    warmup_steps: the weights of all but the last grow from 0 in so many steps, linearly (EE-LLM).
    heads_only: everything but the exits' own heads stays as it is (EE-Tuning); needs `own` and a trained model to begin
      with (`training.init_from`).
    distill: share of every early exit's loss that is the soft cross entropy to the model's own prediction in place of
      the next token's (self-distillation, Zhang et al., arXiv 1905.08094, without its loss on hidden states): exits
      that agree with the model more often, as drafts should.
    exit: how the trained model leaves.
  """

  exits: tuple[int, ...] = ()
  heads: Literal["shared", "own"] = "shared"
  weights: Literal["equal", "linear", "exponential"] = "linear"
  listed_weights: tuple[float, ...] = ()
  warmup_steps: int = 0
  heads_only: bool = False
  distill: float = 0.0
  exit: exiting.Exiting = exiting.DEFAULT

  def __post_init__(self):
    require_range(self, "method.", "warmup_steps", 0)
    require(0.0 <= self.distill <= 1.0, f"method.distill={self.distill} must lie in [0, 1]")
    require(not self.heads_only or self.heads == "own", "method.heads_only needs method.heads='own'")


class EarlyExit(heads.ExitModel):
  """A model with heads at several depths."""

  method: Config = Config()


def build(model_config: ModelConfig, config: Config) -> EarlyExit:
  model = heads.check(EarlyExit(model_config, method=config))
  require(not config.heads_only or model.own_heads, f"method.exits={config.exits} has no head of its own to be trained")
  given = config.listed_weights
  require(
    not given or (len(given) == len(model.trained) and all(0 <= x < math.inf for x in given) and given[-1] > 0),
    f"method.listed_weights={given} must be {len(model.trained)} finite numbers, not negative, the last positive",
  )
  return model


def check_training(model: EarlyExit, experiment: Experiment) -> None:
  if model.method.heads_only:
    require_trained(experiment.training, "method.heads_only")


def weights_at(model: EarlyExit, step: jax.Array) -> jax.Array:
  """Of the exits' losses at a step, [e], the last exit's 1 at most once all are normalised."""
  depths = np.array(model.trained, np.float64)
  kinds = {"equal": np.ones_like(depths), "linear": depths, "exponential": 2.0 ** (depths - depths[-1])}
  weights = np.array(model.method.listed_weights) if model.method.listed_weights else kinds[model.method.weights]
  ramp = jnp.minimum(step / model.method.warmup_steps, 1.0) if model.method.warmup_steps else 1.0
  return jnp.asarray(weights, jnp.float32) * jnp.where(np.arange(len(depths)) < len(depths) - 1, ramp, 1.0)


def loss(model: EarlyExit, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Weighted mean over exits of the next-token cross entropy, or of what `distill` makes of it."""
  params = heads.frozen(params) if model.method.heads_only else params
  hidden = executors.exits(model.config, params, batch, model.trained)
  weights = weights_at(model, step)
  if not model.method.distill:
    pairs = heads.read(model, params, hidden, objectives.cross_entropy_of(batch))
    return objectives.weighted(pairs, weights), heads.by_depth(model, pairs)
  teacher = model.apply({"params": params}, hidden[-1], method="head")
  pairs, soft = heads.read(model, params, hidden, objectives.with_teacher(batch, teacher))
  share = jnp.asarray([model.method.distill] * (len(model.trained) - 1) + [0.0])
  mixed = ((1.0 - share) * pairs[0] + share * soft[0], pairs[1])
  return objectives.weighted(mixed, weights), heads.by_depth(model, pairs)


def learning_rates(model: EarlyExit) -> dict[str, float]:
  """EE-Tuning freezes all but the exits' heads."""
  return dict.fromkeys(heads.BACKBONE, 0.0) if model.method.heads_only else {}


def update_flops(model: EarlyExit, choice: tuple[int, ...], seq_len: int) -> float:
  """One forward pass through all layers, and a head at every exit; and backward what is trained of it.

  With `distill` the model's own head runs once more, as the teacher.
  """
  full, head = costs.dense_cost(model.config, seq_len).flops_per_token, costs.head_flops(model.config)
  early, teacher = (len(model.trained) - 1) * head, head if model.method.distill else 0.0
  return teacher + (full + costs.update_flops(early) if model.method.heads_only else costs.update_flops(full + early))

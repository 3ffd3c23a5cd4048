"""Early exit: heads at several depths, trained together; a token leaves at the first where the model is sure enough.

BranchyNet (Teerapittayanon et al., arXiv 1709.01686): losses of all branches, weighted, trained jointly. EE-LLM (Chen
et al., arXiv 2312.04916): exits of a language model with heads of their own, and weights that warm up; training the
heads alone on a trained model is its EE-Tuning (arXiv 2402.00518). CALM (Schuster et al., arXiv 2207.07061): one head
for all exits, weights that grow with depth, thresholds that decay, keys of the layers that a token did not run
projected from the stream with which it left, and a classifier that learns where a prediction is the model's,
`adaptive.depth.agreement`. How a trained model leaves is `method.exit`, `adaptive.depth.exits`.

Departures, with reasons:
- a token leaves where its signal is strictly above the threshold (in CALM and EE-LLM at equality too, so that a
  threshold of 1 is passed where a softmax rounds to 1);
- what is projected is the stream at the exit (CALM's released decoding projects that of the first exit);
- signals are of each token by itself (CALM's released cosine is over the whole batch);
- the loss is a weighted mean, not a sum, so that a learning rate fits whatever the number of exits;
- an exit has at most a norm and a matrix of its own: the MLP or whole layer that EE-LLM and EE-Tuning may put before
  them is absent, as are their warm-up along a cosine (ours is linear) and their weights of single tokens;
- CALM's other loss of the classifier, on the sequence of its decisions, is absent, and so is the threshold that FREE
  finds while it decodes, by a mixture of Beta distributions: of FREE (Bae et al., arXiv 2310.05424) there are the keys,
  `exit.kv="exact"`.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors, losses
from adaptive.backbone.transformer import Batch
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import agreement, heads, objectives
from adaptive.depth import exits as exiting
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
    classifier: whether a linear classifier learns at which exits a token's prediction is the model's, for the signal
      `learned`: `none`; `joint`, beside the heads, to which it teaches nothing; or `alone`, while all else stays as it
      is (CALM), which needs a trained model to begin with (`training.init_from`).
    exit: how the trained model leaves.
  """

  exits: tuple[int, ...] = ()
  heads: Literal["shared", "own"] = "shared"
  weights: Literal["equal", "linear", "exponential"] = "linear"
  listed_weights: tuple[float, ...] = ()
  warmup_steps: int = 0
  heads_only: bool = False
  distill: float = 0.0
  classifier: Literal["none", "joint", "alone"] = "none"
  exit: exiting.Exiting = exiting.DEFAULT

  def __post_init__(self):
    require_range(self, "method.", "warmup_steps", 0)
    require(0.0 <= self.distill <= 1.0, f"method.distill={self.distill} must lie in [0, 1]")
    require(not self.heads_only or self.heads == "own", "method.heads_only needs method.heads='own'")
    require(not self.heads_only or self.classifier != "alone", "method.classifier='alone' trains no heads: heads_only")


class EarlyExit(heads.ExitModel):
  """A model with heads at several depths, and a `classifier` of agreement if one is wanted."""

  method: Config = Config()

  def setup(self):
    super().setup()
    if self.classifies:
      self.classifier = agreement.Classifier(self.config)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing() and self.classifies:
      self.classifier()
    return super().__call__(batch)

  @property
  def classifies(self) -> bool:
    return self.method.classifier != "none"

  @property
  def learned(self):
    """The probability that a prediction is the model's."""
    eps = self.config.norm_eps
    return (lambda params, which: agreement.signal(params, eps)) if self.classifies else None

  @property
  def exits(self) -> exiting.Exits:
    exits, width = super().exits, self.config.d_model
    if not self.classifies:
      return exits
    added, asked = agreement.size(width), agreement.flops(width)
    return exits._replace(added_params=added, learned_flops=asked, kept=("classifier",))


def build(model_config: ModelConfig, config: Config) -> EarlyExit:
  model = heads.check(EarlyExit(model_config, method=config))
  require(not config.heads_only or model.own_heads, f"method.exits={config.exits} has no head of its own to be trained")
  require(
    config.classifier == "none" or len(model.trained) > 1,
    f"method.exits={config.exits}: there is nothing to classify before the model's own exit",
  )
  given = config.listed_weights
  require(
    not given or (len(given) == len(model.trained) and all(0 <= x < math.inf for x in given) and given[-1] > 0),
    f"method.listed_weights={given} must be {len(model.trained)} finite numbers, not negative, the last positive",
  )
  return model


def check_training(model: EarlyExit, experiment: Experiment) -> None:
  if model.method.heads_only:
    require_trained(experiment.training, "method.heads_only")
  if model.method.classifier == "alone":
    require_trained(experiment.training, "method.classifier='alone'")


def weights_at(model: EarlyExit, step: jax.Array) -> jax.Array:
  """Of the exits' losses at a step, [e], the last exit's 1 at most once all are normalised."""
  depths = np.array(model.trained, np.float64)
  kinds = {"equal": np.ones_like(depths), "linear": depths, "exponential": 2.0 ** (depths - depths[-1])}
  weights = np.array(model.method.listed_weights) if model.method.listed_weights else kinds[model.method.weights]
  ramp = jnp.minimum(step / model.method.warmup_steps, 1.0) if model.method.warmup_steps else 1.0
  return jnp.asarray(weights, jnp.float32) * jnp.where(np.arange(len(depths)) < len(depths) - 1, ramp, 1.0)


def loss(model: EarlyExit, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Weighted mean over exits of the token losses, or of what `distill` makes of them; and the classifier's loss."""
  params, mask, distill = constants(model, params), losses.counted(batch), distilled(model)
  hidden = executors.exits(model.config, params, batch, model.trained)
  teacher = model.apply({"params": params}, hidden[-1], method="head") if distill else None

  def read(logits: jax.Array):
    hard = losses.cross_entropy(logits, batch["targets"], mask)
    soft = losses.soft_cross_entropy(logits, teacher, mask) if distill else None
    return hard, soft, jnp.argmax(logits, axis=-1) if model.classifies else None

  pairs, soft, predicted = heads.read(model, params, hidden, read)
  metrics = heads.by_depth(model, pairs)
  if distill:
    share = jnp.asarray([distill] * (len(model.trained) - 1) + [0.0])
    pairs = (1.0 - share) * pairs[0] + share * soft[0], pairs[1]
  total = objectives.weighted(pairs, weights_at(model, step))
  if not model.classifies:
    return total, metrics
  pair = agreement.loss(params["classifier"], hidden, predicted, mask, model.config.norm_eps)
  alone = model.method.classifier == "alone"
  return losses.mean(pair) + (0.0 if alone else total), {**metrics, "classifier_loss": pair}


def constants(model: EarlyExit, params: Params) -> Params:
  """The parameters; no gradient flows to what is not trained."""
  if model.method.classifier == "alone":
    return {name: part if name == "classifier" else jax.lax.stop_gradient(part) for name, part in params.items()}
  return heads.frozen(params) if model.method.heads_only else params


def distilled(model: EarlyExit) -> float:
  """Share of the exits' losses that is to the model's own prediction."""
  return 0.0 if model.method.classifier == "alone" else model.method.distill


def learning_rates(model: EarlyExit) -> dict[str, float]:
  """EE-Tuning freezes all but the exits' heads; a classifier that learns alone, all but itself."""
  frozen = heads.BACKBONE if model.method.heads_only or model.method.classifier == "alone" else ()
  own = ("exit_heads",) if model.method.classifier == "alone" and model.own_heads else ()
  return dict.fromkeys((*frozen, *own), 0.0)


def update_flops(model: EarlyExit, choice: tuple[int, ...], seq_len: int) -> float:
  """One forward pass through all layers, and a head at every exit; and backward what is trained of it.

  With `distill` the model's own head runs once more, as the teacher. What a classifier reads has no gradient.
  """
  full, head = costs.dense_cost(model.config, seq_len).flops_per_token, costs.head_flops(model.config)
  early, teacher = (len(model.trained) - 1) * head, head if distilled(model) else 0.0
  asked = 2 * model.exits.learned_flops * (len(model.trained) - 1)
  if model.method.classifier == "alone":
    return full + early + asked
  if model.method.heads_only:
    return teacher + full + costs.update_flops(early) + asked
  return teacher + costs.update_flops(full + early) + asked

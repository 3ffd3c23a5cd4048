"""JEI-DNN: gates learn at which exit a token should leave, and heads learn for the tokens that the gates send them.

Regol, Chataoui and Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural Network" (arXiv 2310.09163, ICLR
2024). At every early exit a gate, a logistic regression on four numbers that say how sure the exit's prediction is,
gives the probability to leave there. Heads and gates are trained in turns: the heads on losses weighted by what the
gates say, the gates to open where loss plus cost is lowest. The optimizer must leave alone whose turn it is not
(`training.optimizer.inactive` is `freeze`).

Departures, with reasons:
- the paper's images are tokens here, and the backbone may be trained too (`backbone`);
- the factor that keeps the sum of a token's losses has no gradient. In the released code it has one, and then the gates
  cancel out of the loss, value and gradient (`detach_ratio=False`, an ablation);
- the model's own head, which is outside of the gates' probabilities and frozen in the paper, is trained with weight 1
  on every token: it stays the full model's, and what the early exits are compared with;
- a token leaves where its probability is strictly above the threshold (in the released code at equality too);
- the cost of an exit is the FLOPs of the model cut there over those of the whole; positives of a gate weigh by the
  micro-batch's own counts (in the released code by those of a validation set);
- a warm-up of so many steps, without the released code's patience for each head; no conformal sets.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors, losses
from adaptive.backbone.transformer import Batch
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import exits as exiting
from adaptive.depth import heads, objectives
from adaptive.depth.signals import Signal
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.defaults import batch_parts, control, init_from, ticker
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

WARM_UP, GATES, HEADS = range(3)  # the stages of training, each compiled by itself: what `sample` chooses among
DEFAULT = exiting.Exiting(signal="learned", thresholds=(0.25, 0.5, 0.75))

_STATISTICS = 4  # that a gate reads
_MOST = 5.0  # a positive weighs at most so much, as in the released code


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of JEI-DNN.

  Attributes:
    exits: numbers of layers after which a head and a gate are trained, increasing; the model's own head comes last.
    heads: `shared`: all use the model's norm and head. `own`: each but the last has a norm and a matrix (the paper).
    backbone: `trained` together with the heads, or `frozen` (the paper), which needs heads of their own and a trained
      model to begin with (`training.init_from`).
    warmup_steps: of the heads alone, before gates and heads take turns.
    phase_steps: of the gates, then of the heads, and so on (200 batches in the paper).
    cost_weight: what the whole model costs, in nats of loss, for the gates (lambda).
    detach_ratio: whether the factor that keeps the sum of a token's losses is a constant for the gradient.
    gate_rate: factor of the gates' learning rate.
    exit: how the trained model leaves; `learned` is the gates' probability to leave, of a token that has come there.
  """

  exits: tuple[int, ...] = ()
  heads: Literal["shared", "own"] = "shared"
  backbone: Literal["trained", "frozen"] = "trained"
  warmup_steps: int = 200
  phase_steps: int = 200
  cost_weight: float = 0.7
  detach_ratio: bool = True
  gate_rate: float = 1.0
  exit: exiting.Exiting = DEFAULT

  def __post_init__(self):
    require_range(self, "method.", "warmup_steps cost_weight", 0)
    require_range(self, "method.", "phase_steps", 1)
    require_range(self, "method.", "gate_rate", 0, above=True)
    require(self.backbone == "trained" or self.heads == "own", "method.backbone='frozen' needs method.heads='own'")


class Gates(nn.Module):
  """Declares a logistic regression for each early exit, float32 whatever the model is stored in."""

  number: int

  @nn.compact
  def __call__(self) -> None:
    zeros = lambda axes: nn.with_logical_partitioning(nn.initializers.zeros, axes)  # a convex problem, from the middle
    self.param("weight", zeros((None, None)), (self.number, _STATISTICS), jnp.float32)
    self.param("bias", zeros((None,)), (self.number,), jnp.float32)


class JeiDnn(heads.ExitModel):
  """A model with heads at several depths, and `gates` [e - 1, ...] at all but the last."""

  method: Config = Config()

  def setup(self):
    super().setup()
    self.gates = Gates(len(self.trained) - 1)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing():
      self.gates()
    return super().__call__(batch)

  @property
  def learned(self):
    """c of the paper; the memory is the probability to have left before."""

    def signal(params: Params, which: int) -> Signal:
      def value(seen):
        gate = jax.tree.map(lambda leaf: leaf[which], params["gates"])
        return conditional(jax.nn.sigmoid(gate_logits(gate, statistics(seen.logits))), seen.memory)

      return Signal(value, True, lambda value, before: before + value * (1 - before))

    return signal

  @property
  def exits(self) -> exiting.Exits:
    size = (len(self.trained) - 1) * (_STATISTICS + 1)
    return super().exits._replace(added_params=size, learned_flops=2.0 * _STATISTICS, kept=("gates",))


def build(model_config: ModelConfig, config: Config) -> JeiDnn:
  model = heads.check(JeiDnn(model_config, method=config))
  require(len(model.trained) > 1, f"method.exits={config.exits} has no exit before the model's own: there is no gate")
  return model


def check_training(model: JeiDnn, experiment: Experiment) -> None:
  """The stages train apart only if what has no gradient stays as it is."""
  require(
    experiment.training.optimizer.inactive == "freeze",
    "training.optimizer.inactive='keep' would move gates and heads in each other's turns, by momentum: jei_dnn trains "
    "with 'freeze'",
  )
  if model.method.backbone == "frozen":
    require_trained(experiment.training, "method.backbone='frozen'")


def statistics(logits: jax.Array) -> jax.Array:
  """What a gate reads, [..., v] -> float32 [..., 4], without gradient.

  The largest probability, the entropy in nats, the margin of the two largest, and the entropy of the squared and again
  normalised probabilities.
  """
  logits = jax.lax.stop_gradient(logits)
  logs, squared = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(2 * logits, axis=-1)
  entropy = lambda logs: -jnp.sum(jnp.exp(logs) * logs, axis=-1)
  first = jax.nn.one_hot(jnp.argmax(logs, axis=-1), logs.shape[-1], dtype=bool)
  largest = jnp.exp(jnp.max(logs, axis=-1))
  second = jnp.exp(jnp.max(jnp.where(first, -jnp.inf, logs), axis=-1))
  return jnp.stack([largest, entropy(logs), largest - second, entropy(squared)], axis=-1)


def gate_logits(gate: Params, read: jax.Array) -> jax.Array:
  """Score [b, t] of one gate, given what it reads [b, t, 4]."""
  return jnp.einsum("btf,f->bt", read, gate["weight"]) + gate["bias"]


def exit_probabilities(gates: jax.Array) -> jax.Array:
  """P_l = max(0, min(g_l, 1 - sum_{j < l} g_j)) of gates [e - 1, ...]; what is missing to 1 is the model's own exit."""
  before = jnp.cumsum(gates, axis=0) - gates
  return jnp.maximum(jnp.minimum(gates, 1 - before), 0.0)


def conditional(gate: jax.Array, before: jax.Array) -> jax.Array:
  """c = P / prod_{j < l} (1 - c_j): the probability to leave here, of a token that has not left before.

  Args:
    gate: g. before: sum_{j < l} P_j, which is 1 minus that product. Where it is 1, c is too, the limit.
  """
  left = 1 - before
  return jnp.where(gate < left, gate / left, 1.0)


def sample(model: JeiDnn, seed: int, step: int) -> tuple[int, ...]:
  """The stage: all heads; then in turns the gates, and the heads as the gates weigh them."""
  since = step - model.method.warmup_steps
  return (WARM_UP if since < 0 else (GATES, HEADS)[since // model.method.phase_steps % 2],)


def static_choice(model: JeiDnn) -> bool:
  """Each stage is a program of its own: that of the gates has no backward pass through the model."""
  return True


def loss(model: JeiDnn, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """That of the stage; what the stage does not train is a constant."""
  (stage,) = choice
  frozen = heads.BACKBONE if model.method.backbone == "frozen" else ()
  trained = {"gates"} if stage == GATES else set(params) - {"gates", *frozen}
  params = {name: part if name in trained else jax.lax.stop_gradient(part) for name, part in params.items()}
  hidden = executors.exits(model.config, params, batch, model.trained)
  read = lambda logits: (losses.token_losses(logits, batch["targets"]), statistics(logits))
  each, numbers = heads.read(model, params, hidden, read)  # [e, b, t], [e, b, t, 4]
  mask = losses.counted(batch)
  tokens = jnp.sum(mask, dtype=jnp.float32)
  pairs = jnp.sum(each * mask[None], axis=(1, 2)), jnp.full(len(each), tokens)
  metrics = heads.by_depth(model, pairs)
  if stage == WARM_UP:
    return objectives.weighted(pairs, warm_up_weights(len(each))), metrics
  scores = jax.vmap(gate_logits)(params["gates"], numbers[:-1])
  if stage == GATES:
    targets = best_exits(each, flops_shares(model, mask.shape[1]), model.method.cost_weight)
    pair = gate_loss(scores, targets, mask)
    return losses.mean(pair), {**metrics, "gate_loss": pair}
  weighed = weighed_losses(each[:-1], exit_probabilities(jax.nn.sigmoid(scores)), model.method.detach_ratio)
  total = jnp.sum((jnp.sum(weighed, axis=0) + each[-1]) * mask)
  return losses.mean((total, tokens)) / len(each), metrics


def warm_up_weights(number: int) -> np.ndarray:
  """Of the heads' losses, [e]: G + 1 - l of G early exits numbered from 1, and 1 of the model's own."""
  return np.append(np.arange(number - 1, 0, -1.0), 1.0)


def weighed_losses(each: jax.Array, probabilities: jax.Array, detach_ratio: bool) -> jax.Array:
  """P_l CE_l sum_j CE_j / sum_j P_j CE_j of the early exits' losses [e - 1, b, t]: the gates share out their sum."""
  weighed = probabilities * each
  ratio = jnp.sum(each, axis=0) / jnp.maximum(jnp.sum(weighed, axis=0), 1e-20)  # all gates shut: no loss
  return weighed * (jax.lax.stop_gradient(ratio) if detach_ratio else ratio)[None]


def flops_shares(model: JeiDnn, seq_len: int) -> np.ndarray:
  """FLOPs of the model cut at each exit over those of the whole, [e]; the last is 1."""
  cut = [dataclasses.replace(model.config, num_layers=depth) for depth in model.trained]
  flops = np.array([costs.dense_cost(config, seq_len).flops_per_token for config in cut])
  return flops / flops[-1]


def best_exits(each: jax.Array, costs_of_exits: np.ndarray, cost_weight: float) -> jax.Array:
  """Where loss [e, b, t], in nats, plus weighted cost [e] is lowest, int32 [b, t]; of equal ones the first."""
  return jnp.argmin(each + jnp.asarray(cost_weight * costs_of_exits, each.dtype)[:, None, None], axis=0)


def gate_loss(scores: jax.Array, targets: jax.Array, mask: jax.Array) -> losses.SumCount:
  """Binary cross entropy of every gate [e - 1, b, t] to open at a token's best exit [b, t] and at all after it.

  A gate's positives weigh as the negatives' number over theirs, at most 5.
  """
  positive = targets[None] <= jnp.arange(len(scores))[:, None, None]
  number = jnp.sum(positive & mask[None], axis=(1, 2), dtype=jnp.float32)
  tokens = jnp.sum(mask, dtype=jnp.float32)
  weight = jnp.minimum((tokens - number) / jnp.maximum(number, 1.0), _MOST)
  weights = jnp.where(positive, weight[:, None, None], 1.0) * mask[None]
  return losses.binary_cross_entropy(scores, positive, weights)[0], tokens * len(scores)


def learning_rates(model: JeiDnn) -> dict[str, float]:
  """The gates' own, and a frozen backbone."""
  method = model.method
  frozen = dict.fromkeys(heads.BACKBONE, 0.0) if method.backbone == "frozen" else {}
  return frozen | ({"gates": method.gate_rate} if method.gate_rate != 1 else {})


def update_flops(model: JeiDnn, choice: tuple[int, ...], seq_len: int) -> float:
  """Layers and a head at every exit, forward; and backward what the stage trains."""
  early, head = len(model.trained) - 1, costs.head_flops(model.config)
  full = costs.dense_cost(model.config, seq_len).flops_per_token
  gates = 2.0 * _STATISTICS * early
  if choice[0] == GATES:
    return full + early * head + 2 * gates  # what the gates read has no gradient
  trained = early * head if model.method.backbone == "frozen" else full + early * head
  return costs.update_flops(trained) + (full + early * head - trained) + (gates if choice[0] == HEADS else 0.0)

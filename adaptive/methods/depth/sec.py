"""SEC: one controller for all exits says whether a token goes on, leaves, or had better not be predicted at all.

Sun et al., "When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion through
Dynamic Model Inference" (arXiv 2401.09964, ICSE 2024), the Stop&Exit Controller. A linear classifier reads the residual
stream after a layer. It learns from the heads: at the first exit whose head is right, and above, a token should exit;
below, continue; and where no head is right, stop: the text ends, since what follows a wrong token helps nobody.

Departures, with reasons:
- heads and controller are trained in one run, not one after the other: the controller reads constants and teaches
  nobody else, so it follows the heads' labels as they change; the backbone may be trained too (`backbone`);
- an exit's own head has a norm before its matrix (the released code has none), so that an exit that stands alone is an
  ordinary model; exits may be after any layers, not only after each, and share the model's head (`heads`);
- an action is taken where its probability is strictly above its threshold; the released code asks too that no other
  action be likelier, which differs below 0.5 only. Stop comes before exit, as there;
- the first token of a document never leaves early nor stops. In the released code that is the token after the prompt,
  with all of the prompt: a forward pass over documents knows of no prompt.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive import executors, losses, routing
from adaptive.backbone.transformer import Batch
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import exits as exiting
from adaptive.depth import heads
from adaptive.depth.signals import Signal
from adaptive.methods.contract import Metrics, Params
from adaptive.methods.defaults import batch_parts, control, init_from, static_choice, ticker
from adaptive.methods.exiting import at_random, cost, decoder, diagnose, extract, forward, ladder, sample, submodels

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

CONTINUE, EXIT, STOP = range(3)  # what the controller says


@dataclasses.dataclass(frozen=True)
class Stopping(exiting.Exiting):
  """How a trained model leaves early, or stops.

  Attributes:
    stop_threshold: a token ends its text at an exit where the probability of stop is above, strictly; 1: none does.
      Sub-models of a fixed depth ask nobody, so none stops there.
    stop_token: what is then predicted; the bytes' end of a document unless another tokenizer's is named.
  """

  signal: exiting.SignalName = "learned"
  stop_threshold: float = 1.0
  stop_token: int = 256


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of SEC.

  Attributes:
    exits: numbers of layers after which a head is trained, increasing; the model's own is always there.
    heads: `own`: each exit but the last has a norm and a matrix. `shared`: all use the model's.
    backbone: `trained` together with the heads, or `frozen` (the paper), which needs a trained model to begin with
      (`training.init_from`).
    exit: how the trained model leaves; `learned` is the controller's probability of exit.
  """

  exits: tuple[int, ...] = ()
  heads: Literal["own", "shared"] = "own"
  backbone: Literal["trained", "frozen"] = "trained"
  exit: Stopping = Stopping()

  def __post_init__(self):
    require_range(self.exit, "method.exit.", "stop_threshold stop_token", 0)


class Sec(heads.ExitModel):
  """A model with heads at several depths, and one `controller` for all of them."""

  method: Config = Config()

  def setup(self):
    super().setup()
    self.controller = routing.Router(self.config, "linear", number=1, outputs=3)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model."""
    if self.is_initializing():
      self.controller()
    return super().__call__(batch)

  @property
  def learned(self):
    """The probability of exit."""
    return lambda params, which: Signal(lambda seen: actions(params, seen.x)[..., EXIT], False)

  @property
  def exits(self) -> exiting.Exits:
    how, size = self.method.exit, routing.router_weights("linear", self.config.d_model, 3)
    stops = lambda params, which, x, positions: (positions > 0) & (actions(params, x)[..., STOP] > how.stop_threshold)
    return super().exits._replace(
      added_params=size,
      learned_flops=2.0 * size,
      kept=("controller",),
      first_stays=True,
      ends=exiting.Ends(stops, how.stop_token) if how.stop_threshold < 1 else None,
    )


def build(model_config: ModelConfig, config: Config) -> Sec:
  how = config.exit
  require(
    how.stop_threshold >= 1 or how.stop_token < model_config.vocab_size,
    f"method.exit.stop_token={how.stop_token} must be less than model.vocab_size={model_config.vocab_size}: name the "
    "tokenizer's end of a document",
  )
  return heads.check(Sec(model_config, method=config))


def check_training(model: Sec, experiment: Experiment) -> None:
  if model.method.backbone == "frozen":
    require_trained(experiment.training, "method.backbone='frozen'")


def actions(params: Params, x: jax.Array) -> jax.Array:
  """Probabilities of continue, exit and stop, [..., d] -> float32 [..., 3]."""
  return jax.nn.softmax(routing.router_logits(params["controller"], 0, x), axis=-1)


def labels(right: jax.Array) -> jax.Array:
  """What the controller should have said, int32 [e, b, t].

  Args:
    right: whether a head's likeliest token is the text's, bool [e, b, t], the model's own last.
  """
  found = jnp.cumsum(right, axis=0) > 0
  return jnp.where(found[-1:], jnp.where(found, EXIT, CONTINUE), STOP)


def loss(model: Sec, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Mean over exits of the heads' cross entropy, and the mean of the controller's, weighted by the number of layers."""
  if model.method.backbone == "frozen":
    params = heads.frozen(params)
  hidden = executors.exits(model.config, params, batch, model.trained)
  mask, targets = losses.counted(batch), batch["targets"]
  read = lambda logits: (losses.cross_entropy(logits, targets, mask), jnp.argmax(logits, axis=-1) == targets)
  pairs, right = heads.read(model, params, hidden, read)
  scores = lambda x: routing.router_logits(params["controller"], 0, x)
  said = jax.vmap(scores)(jax.lax.stop_gradient(hidden))
  pair = controller_loss(said, labels(right), model.trained, mask)
  metrics = {**heads.by_depth(model, pairs), "controller_loss": pair}
  return jnp.mean(losses.mean(pairs)) + losses.mean(pair), metrics


def controller_loss(said: jax.Array, labels: jax.Array, depths: tuple[int, ...], mask: jax.Array) -> losses.SumCount:
  """Cross entropy of scores [e, b, t, 3] to labels [e, b, t], an exit weighing as many layers as lie below it."""
  weights = jnp.asarray(depths, jnp.float32) / sum(depths)
  each = jnp.sum(losses.token_losses(said, labels) * weights[:, None, None], axis=0)
  return jnp.sum(each * mask), jnp.sum(mask, dtype=jnp.float32)


def learning_rates(model: Sec) -> dict[str, float]:
  """A frozen backbone stays as it is."""
  return dict.fromkeys(heads.BACKBONE, 0.0) if model.method.backbone == "frozen" else {}


def update_flops(model: Sec, choice: tuple[int, ...], seq_len: int) -> float:
  """One forward pass with a head and the controller at every exit, and backward what is trained of it."""
  early, head = len(model.trained) - 1, costs.head_flops(model.config)
  full = costs.dense_cost(model.config, seq_len).flops_per_token
  asked = 2 * model.exits.learned_flops * len(model.trained)  # what the controller reads has no gradient
  if model.method.backbone == "trained":
    return costs.update_flops(full + early * head) + asked
  own = costs.update_flops(early * head) if model.own_heads else early * head
  return full + own + asked

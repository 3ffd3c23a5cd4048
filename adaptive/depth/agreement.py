"""A classifier that learns at which exits a token's prediction is the model's: CALM's (arXiv 2207.07061, Section 3.5).

One linear classifier for all exits reads the residual stream; no head has to run before a token leaves. Its labels are
the model's own: whether the likeliest token at an exit is that of the last. Of each exit's tokens those that agree and
those that do not weigh the same in all, however many they are, and exits are independent of each other, as in the
paper's second stage of training.

Departures: the stream is read at unit root mean square, so that it is not its size, which grows from layer to layer,
that decides; one score through a sigmoid stands for two through a softmax, which is the same function.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import losses
from adaptive.backbone.layers import rms_norm
from adaptive.backbone.transformer import Params
from adaptive.config import ModelConfig
from adaptive.depth.signals import Signal


class Classifier(nn.Module):
  """Declares a logistic regression, float32 whatever the model is stored in."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> None:
    zeros = lambda axes: nn.with_logical_partitioning(nn.initializers.zeros, axes)  # a convex problem, from the middle
    self.param("weight", zeros((None,)), (self.config.d_model,), jnp.float32)
    self.param("bias", zeros(()), (), jnp.float32)


def size(d_model: int) -> int:
  """Parameters of the classifier."""
  return d_model + 1


def flops(d_model: int) -> float:
  """Of one token."""
  return 2.0 * d_model


def scores(classifier: Params, x: jax.Array, eps: float) -> jax.Array:
  """Log-odds that the prediction from the stream [..., d] is the model's, float32 [...]."""
  normed = rms_norm(x.astype(jnp.float32), jnp.ones(x.shape[-1]), eps)
  return jnp.einsum("...d,d->...", normed, classifier["weight"]) + classifier["bias"]


def signal(params: Params, eps: float) -> Signal:
  """The probability that an exit's likeliest token is the model's, given all parameters."""
  return Signal(lambda seen: jax.nn.sigmoid(scores(params["classifier"], seen.x, eps)), False)


def loss(classifier: Params, hidden: jax.Array, predicted: jax.Array, mask: jax.Array, eps: float) -> losses.SumCount:
  """Binary cross entropy over early exits and tokens, each exit's labels balanced; reaches the classifier alone.

  A token that agrees weighs as the share of those that do not, and the other way round.

  Args:
    hidden: residual stream at every exit, [e, b, t, d], the model's own last. predicted: likeliest tokens there,
      [e, b, t]. mask: which tokens count, bool [b, t].

  Returns:
    The weighted sum, and the number of early exits times that of tokens.
  """
  agrees = predicted[:-1] == predicted[-1:]
  said = scores(classifier, jax.lax.stop_gradient(hidden[:-1]), eps)
  tokens = jnp.sum(mask, dtype=jnp.float32)
  share = jnp.sum(agrees & mask[None], axis=(1, 2), keepdims=True) / jnp.maximum(tokens, 1.0)
  weights = jnp.where(agrees, 1 - share, share) * mask[None]
  return losses.binary_cross_entropy(said, agrees, weights)[0], tokens * len(agrees)

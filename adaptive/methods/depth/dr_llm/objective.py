"""What routers learn: to tell, along the path that a search found, how often each layer runs (Section 3.3)."""

import jax
import jax.numpy as jnp

from adaptive import losses

NAMES = ("skip", "execute", "repeat")


def class_weights(counts: jax.Array, beta: float) -> jax.Array:
  """alpha [3] in proportion to (1 - beta) / (1 - beta^n), of mean 1 (Cui et al. 2019): rarer classes weigh more.

  A class that no label has weighs nothing. beta = 0 weighs all others alike.
  """
  counts = counts.astype(jnp.float32)
  # 1 - beta^n, which is a fine difference where beta is near to 1.
  covered = -jnp.expm1(counts * jnp.log(jnp.float32(max(beta, 1e-30))))
  inverse = jnp.where(counts > 0, 1.0 / jnp.maximum(covered, 1e-30), 0.0)
  return inverse / (jnp.sum(inverse) / jnp.maximum(jnp.sum(counts > 0), 1))


def focal(logits: jax.Array, labels: jax.Array, weights: jax.Array, gamma: float) -> jax.Array:
  """alpha_y (1 - p_y)^gamma (-log p_y) of each label [...], from float32 logits [..., c] (Lin et al. 2017).

  With gamma = 0 and weights of 1 it is the cross entropy.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
  # Of p = 1 the power's gradient would be nan below gamma = 1.
  rest = jnp.maximum(-jnp.expm1(chosen), jnp.finfo(jnp.float32).tiny)
  return -weights[labels] * (rest**gamma if gamma else 1.0) * chosen


def metrics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, losses.SumCount]:
  """Accuracy of the routers and of executing everything, and each class's recall and precision.

  Args:
    logits: [..., 3]. labels: [...]. mask: which count, [...].
  """
  found = jnp.argmax(logits, axis=-1)
  values = {
    "router_accuracy": losses.masked_sum(found == labels, mask),
    "always_execute": losses.masked_sum(labels == 1, mask),
  }
  for which, name in enumerate(NAMES):
    right = found == labels
    values[f"recall/{name}"] = losses.masked_sum(right, mask & (labels == which))
    values[f"precision/{name}"] = losses.masked_sum(right, mask & (found == which))
  return values

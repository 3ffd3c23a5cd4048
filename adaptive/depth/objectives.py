"""Training losses over several exits of one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import losses
from adaptive.backbone.transformer import Batch, Params
from adaptive.losses import SumCount


def read_exits(head: Callable, heads: Params, hidden: jax.Array, reader: Callable[[jax.Array], Any]) -> Any:
  """What `reader` makes of the logits [b, t, v] of every exit, stacked [e, ...].

  A head runs on one exit at a time and again in the backward pass, so the logits of one exit are held, not of all.

  Args:
    head: (its parameters, x [b, t, d]) -> logits [b, t, v]. heads: leaves [e, ...]; a tree without leaves where all
      exits share one head. hidden: residual stream at the exits, [e, b, t, d].
  """
  return jax.lax.map(jax.checkpoint(lambda inputs: reader(head(*inputs))), (heads, hidden))


def exit_losses(head: Callable, heads: Params, hidden: jax.Array, batch: Batch) -> SumCount:
  """Next-token cross entropy of every exit, (sums [e], counts [e]); arguments as of `read_exits`."""
  return read_exits(head, heads, hidden, cross_entropy_of(batch))


def cross_entropy_of(batch: Batch) -> Callable[[jax.Array], SumCount]:
  """Logits [b, t, v] -> next-token cross entropy on a batch."""
  mask = losses.counted(batch)
  return lambda logits: losses.cross_entropy(logits, batch["targets"], mask)


def token_losses(head: Callable, heads: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
  """Next-token cross entropy of each token at every exit, float32 [e, b, t]; arguments as of `read_exits`."""
  return read_exits(head, heads, hidden, lambda logits: losses.token_losses(logits, targets))


def weighted(pairs: SumCount, weights: jax.Array | Sequence[float]) -> jax.Array:
  """Mean over exits of their mean losses, weighted: sum_e w_e CE_e / sum_e w_e."""
  weights = jnp.asarray(weights, jnp.float32)
  return jnp.sum(losses.mean(pairs) * weights) / jnp.sum(weights)


def layer_skip_weights(num_layers: int, scale: float) -> np.ndarray:
  """e(l) of LayerSkip (Elhoushi et al. 2024, eq. 3), [l]: weight of the loss after layer l.

  scale * sum_{i <= l} i below the last layer, and (L - 1) + scale * sum_{i <= L - 2} i there; layer 0 has none.
  """
  weights = scale * np.cumsum(np.arange(num_layers, dtype=np.float64))
  weights[-1] = num_layers - 1 + (weights[-2] if num_layers > 1 else 1.0)
  return weights


def layer_dropout_rates(num_layers: int, most: float) -> np.ndarray:
  """D(l) p_max of LayerSkip (eq. 1), [l]: from 0 for the first layer to p_max for the last, exponentially."""
  return most * np.expm1(np.arange(num_layers) * np.log(2.0) / max(num_layers - 1, 1))


def exponential_ramp(step: jax.Array, steps: int) -> jax.Array:
  """S(t) of LayerSkip (eq. 2): from 0 to 1 over `steps`, exponentially; then 1."""
  return jnp.expm1(jnp.minimum(step / max(steps - 1, 1), 1.0) * jnp.log(2.0))

"""Training losses over several exits of one forward pass."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import losses
from adaptive.backbone.transformer import Batch, Params
from adaptive.losses import SumCount


def exit_losses(head: Callable, heads: Params, hidden: jax.Array, batch: Batch) -> SumCount:
  """Next-token cross entropy of every exit, (sums [e], counts [e]).

  A head runs on one exit at a time and again in the backward pass, so the logits of one exit are held, not of all.

  Args:
    head: (its parameters, x [b, t, d]) -> logits [b, t, v]. heads: leaves [e, ...]; a tree without leaves where all
      exits share one head. hidden: residual stream at the exits, [e, b, t, d].
  """
  mask = batch["segment_ids"] > 0
  each = token_losses(head, heads, hidden, batch["targets"])
  return jnp.sum(each * mask[None], axis=(1, 2)), jnp.full(len(each), jnp.sum(mask, dtype=jnp.float32))


def token_losses(head: Callable, heads: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
  """Next-token cross entropy of each token at every exit, float32 [e, b, t]; as in `exit_losses`."""

  @jax.checkpoint
  def exit_loss(inputs):
    return losses.token_losses(head(*inputs), targets)

  return jax.lax.map(exit_loss, (heads, hidden))


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

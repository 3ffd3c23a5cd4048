"""Losses over exits, and LayerSkip's equations at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import losses
from adaptive.depth import objectives

CONFIG = tiny.model_config()


def test_the_weights_of_layer_skip_are_the_paper_s_sums():
  """e(l) = scale (0 + 1 + .. + l) below the last, (L - 1) + scale (0 + .. + L - 2) there."""
  found = objectives.layer_skip_weights(5, 0.2)
  np.testing.assert_allclose(found, [0, 0.2, 0.6, 1.2, 4 + 1.2])
  np.testing.assert_allclose(objectives.layer_skip_weights(3, 0.0), [0, 0, 2])
  assert objectives.layer_skip_weights(1, 0.2)[0] > 0


def test_the_rates_of_layer_dropout_grow_exponentially_from_nothing_to_the_most():
  found = objectives.layer_dropout_rates(9, 0.2)
  assert found[0] == 0
  assert found[-1] == pytest.approx(0.2)
  np.testing.assert_allclose((found[1:] + 0.2) / (found[:-1] + 0.2), 2 ** (1 / 8))


def test_the_ramp_goes_from_nothing_to_one_and_stays():
  found = [float(objectives.exponential_ramp(jnp.int32(step), 11)) for step in (0, 5, 10, 100)]
  np.testing.assert_allclose(found, [0, 2**0.5 - 1, 1, 1], rtol=1e-6)


def test_exit_losses_are_those_of_each_exit_and_so_are_their_gradients():
  batch = tiny.packed_batch(CONFIG)
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(3, 2, 12, 16)), jnp.float32)
  heads = jnp.asarray(rng.normal(size=(3, 16, 32)), jnp.float32)
  weights = (1.0, 0.0, 3.0)

  def together(heads, hidden):
    pairs = objectives.exit_losses(lambda head, x: x @ head, heads, hidden, batch)
    return objectives.weighted(pairs, weights), pairs

  def apart(heads, hidden):
    each = [losses.cross_entropy(x @ h, batch["targets"], batch["segment_ids"] > 0) for h, x in zip(heads, hidden)]
    return sum(w * losses.mean(pair) for w, pair in zip(weights, each)) / 4, each

  (found, pairs), grads = jax.value_and_grad(together, argnums=(0, 1), has_aux=True)(heads, hidden)
  (want, each), expected = jax.value_and_grad(apart, argnums=(0, 1), has_aux=True)(heads, hidden)
  assert float(found) == pytest.approx(float(want), rel=1e-6)
  np.testing.assert_allclose(np.stack(pairs).T, np.array(each), rtol=1e-6)
  for a, b in zip(grads, expected):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert float(jnp.abs(grads[0][1]).max()) == 0

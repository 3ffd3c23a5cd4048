"""Sampling against an obvious NumPy version, and its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.config import ConfigError
from adaptive.generation import sampling
from adaptive.generation.sampling import Sampling

row_keys = jax.jit(sampling.row_keys)
candidates = jax.jit(sampling.candidates, static_argnums=1)
sample = jax.jit(sampling.sample, static_argnums=2)

ROWS, VOCAB = 5, 11
LOGITS = np.random.default_rng(0).normal(scale=2, size=(ROWS, VOCAB)).astype(np.float32)
SETTINGS = [(1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.6), (0.7, 4, 0.5), (1.5, 1, 1.0), (1.0, 0, 1e-6), (1.0, 50, 0.9)]


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def distribution(logits, temperature, top_k, top_p):
  """Probability of every token of one row, [v]."""
  probs = softmax(logits / temperature)
  order = sorted(range(len(probs)), key=lambda token: -probs[token])
  if top_k:
    order = order[:top_k]
  kept, total, whole = [], 0.0, sum(probs[token] for token in order)
  for token in order:
    kept.append(token)
    total += probs[token] / whole
    if total >= top_p:
      break
  result = np.zeros_like(probs)
  result[kept] = probs[kept] / probs[kept].sum()
  return result


def keys(rows, position=0, seed=0):
  return row_keys(np.uint32(seed), jnp.asarray(rows, jnp.int32), jnp.full(len(rows), position, jnp.int32))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_may_be_sampled_and_how_likely(settings):
  logits, tokens = candidates(jnp.asarray(LOGITS), Sampling(*settings))
  found = np.zeros((ROWS, VOCAB))
  for row in range(ROWS):
    found[row, tokens[row]] = softmax(np.asarray(logits[row], np.float64))
  np.testing.assert_allclose(found, [distribution(row, *settings) for row in LOGITS], atol=1e-6)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 4, 0.8)], ids=str)
def test_samples_follow_the_distribution(settings):
  number = 4_000
  logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (number, VOCAB))
  tokens, _ = sample(logits, keys(range(number)), Sampling(*settings))
  found, expected = np.bincount(tokens, minlength=VOCAB) / number, distribution(LOGITS[0], *settings)
  np.testing.assert_array_less(np.abs(found - expected), 4 * np.sqrt(expected / number) + 1e-9)
  assert found[expected == 0].sum() == 0


def test_positions_of_a_row_follow_the_distribution_too():
  number, settings = 4_000, Sampling()
  logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (number, VOCAB))
  found, _ = sample(logits, row_keys(np.uint32(7), jnp.zeros(number, jnp.int32), jnp.arange(number)), settings)
  expected = distribution(LOGITS[0], 1.0, 0, 1.0)
  np.testing.assert_array_less(np.abs(np.bincount(found, minlength=VOCAB) / number - expected), 0.04)


def test_greedy_takes_the_first_of_the_likeliest():
  logits = LOGITS.copy()
  logits[1, [3, 8]] = logits[1].max() + 1
  tokens, _ = sample(jnp.asarray(logits), keys(range(ROWS)), Sampling(temperature=0, top_k=2, top_p=0.5))
  np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
  assert int(tokens[1]) == 3


def test_top_k_keeps_k_even_of_equal_ones():
  logits, tokens = candidates(jnp.zeros((1, 6)), Sampling(top_k=2))
  np.testing.assert_array_equal(tokens, [[0, 1]])
  assert bool(jnp.isfinite(logits).all())


def test_a_tiny_temperature_is_greedy_and_not_nan():
  logits = jnp.asarray(LOGITS * 1e4)
  for temperature, top_k in ((1e-38, 0), (1e-38, 2), (1e-46, 2), (1e-29, 2)):
    tokens, _ = sample(logits, keys(range(ROWS)), Sampling(temperature, top_k))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=-1))
  probs = sampling.probabilities(logits, Sampling(1e-29, 2))
  np.testing.assert_array_equal(probs, np.eye(VOCAB)[LOGITS.argmax(axis=-1)])


def test_log_probabilities_are_the_model_s_own():
  tokens, log_probs = sample(jnp.asarray(LOGITS), keys(range(ROWS)), Sampling(0.3, 2, 0.9))
  expected = [np.log(softmax(row.astype(np.float64)))[token] for row, token in zip(LOGITS, tokens)]
  np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_a_row_s_sample_depends_on_seed_number_and_position_only():
  logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (64, VOCAB))

  def draw(rows, position, seed):
    return np.asarray(sample(logits[: len(rows)], keys(rows, position, seed), Sampling())[0])

  together = draw(list(range(64)), 3, 5)
  np.testing.assert_array_equal(draw([9], 3, 5), together[9:10])
  np.testing.assert_array_equal(draw(list(range(63, -1, -1)), 3, 5), together[::-1])
  for other in (draw(list(range(64)), 4, 5), draw(list(range(64)), 3, 6), draw(list(range(64, 128)), 3, 5)):
    assert (other != together).mean() > 0.3


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(temperature=-0.1), "temperature=-0.1 must be at least 0"),
    (dict(temperature=float("nan")), "temperature=nan must be at least 0"),
    (dict(top_k=-1), "top_k=-1 must be at least 0"),
    (dict(top_p=0.0), "top_p=0.0 must be more than 0 and at most 1"),
    (dict(top_p=1.5), "top_p=1.5 must be more than 0 and at most 1"),
  ],
  ids=str,
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**settings)

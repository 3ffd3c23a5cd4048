"""Signals of confidence: by hand, larger is surer, and each token by itself."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from adaptive.depth import chance
from adaptive.depth.signals import SIGNALS, Seen

RNG = np.random.default_rng(0)
LOGITS, BEFORE = RNG.normal(size=(2, 3, 5, 7)) * 2
X, EARLIER = RNG.normal(size=(2, 3, 5, 4))
AGREED = RNG.integers(0, 3, (3, 5))
POSITIONS = RNG.integers(0, 100, (3, 5))


def seen(logits=LOGITS, before=BEFORE, x=X, earlier=EARLIER, memory=AGREED, positions=POSITIONS):
  as_jax = lambda value: None if value is None else jnp.asarray(value, jnp.float32)
  return Seen(*map(as_jax, (logits, before, x, earlier)), jnp.asarray(positions), as_jax(memory))


def by_hand(name):
  now, before = special.softmax(LOGITS, axis=-1), special.softmax(BEFORE, axis=-1)
  ordered = np.sort(now, axis=-1)
  match name:
    case "max_probability":
      return ordered[..., -1]
    case "margin":
      return ordered[..., -1] - ordered[..., -2]
    case "entropy":
      return 1 - special.entr(now).sum(-1) / np.log(7)
    case "stability":
      return np.exp(-special.rel_entr(before, now).sum(-1))
    case "cosine":
      return (X * EARLIER).sum(-1) / np.sqrt((X**2).sum(-1) * (EARLIER**2).sum(-1))
    case "saturation":
      return 1 - np.sqrt(((X - EARLIER) ** 2).sum(-1) / (X**2).sum(-1))
    case "patience":
      return np.where(now.argmax(-1) == before.argmax(-1), AGREED + 1, 0)


@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "random"])
def test_a_signal_is_its_formula_and_float32_of_each_token(name):
  found = SIGNALS[name].value(seen())
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, by_hand(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_token_s_signal_does_not_depend_on_its_mates(name):
  whole = np.asarray(SIGNALS[name].value(seen()))
  alone = SIGNALS[name].value(seen(*(value[1:2, 3:4] for value in (LOGITS, BEFORE, X, EARLIER, AGREED, POSITIONS))))
  np.testing.assert_array_equal(alone, whole[1:2, 3:4])


@pytest.mark.parametrize("name", [name for name in SIGNALS if name not in ("patience", "random")])
def test_no_certainty_is_above_one(name):
  certain = np.zeros((1, 1, 7))
  certain[..., 2] = 1e4
  ones, zeros = np.ones((1, 1, 4)), np.zeros((1, 1), np.int32)
  found = SIGNALS[name].value(seen(certain, certain, ones, ones, zeros, zeros))
  assert 1 - 1e-6 < float(found[0, 0]) <= 1.0


@pytest.mark.parametrize("name", ["stability", "patience"])
def test_at_the_first_exit_nothing_can_have_been_stable(name):
  np.testing.assert_array_equal(SIGNALS[name].value(seen(before=None)), np.zeros((3, 5)))


@pytest.mark.parametrize("varied", ["positions", "tokens"])
def test_chance_is_uniform_and_differs_between_positions_tokens_and_exits(varied):
  random, number = SIGNALS["random"], 2000
  positions = np.arange(number) if varied == "positions" else np.full(number, 7)
  embedded = RNG.normal(size=(number, 16)) if varied == "tokens" else np.ones((number, 16))
  draws, memory = [], np.zeros(number)
  for which in range(3):
    before = None if which == 0 else np.zeros((number, 5))
    draws.append(np.asarray(random.value(seen(None, before, embedded, embedded, memory, positions))))
    memory = random.remember(draws[-1], memory)
  for noise in draws:
    assert stats.kstest(noise, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.08
  assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.08


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_places_tell_tokens_and_positions_apart_whatever_the_precision(dtype):
  embedded = jnp.asarray(0.02 * RNG.normal(size=(4096, 1, 64)), dtype)
  found = chance.places(embedded, jnp.arange(8)[None])
  assert found.shape == (4096, 8)
  assert len(np.unique(found)) > 0.9999 * found.size


def test_the_signals_say_whether_they_read_logits():
  for signal in SIGNALS.values():
    if not signal.reads_logits:
      signal.value(seen(logits=None, before=None))

"""What is timed and how it is summed up; the times themselves are the machine's affair."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ModelConfig
from adaptive.evaluation import latency

CONFIG = ModelConfig(vocab_size=264, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, remat="full")


def model(**fields):
  config = dataclasses.replace(CONFIG, **fields)
  return config, jax.jit(lambda key: nn.unbox(init_params(Transformer(config), key)))(jax.random.key(0))


def test_numbers_are_ordered():
  done = []
  times = latency.measure([model(), model(num_layers=1, d_ff=16)], prefill_tokens=8, repeats=7, report=done.append)
  assert done == [1, 2]
  assert len(times) == 2
  for t in times:
    assert 0 < t.prefill_ms <= t.prefill_ms_p90
    assert 0 < t.step_ms <= t.step_ms_p90


def test_median_and_90th_percentile_of_recorded_calls():
  assert latency._summary([float(i) for i in range(11)]) == (5.0, 9.0)
  assert latency._summary([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize(("repeats", "recorded"), [(1, 5), (50, 50), (51, 55)])
def test_every_model_is_called_as_often_as_asked_and_warm(monkeypatch, repeats, recorded):
  made = []

  class Timed:
    def __init__(self, model, tokens, index):
      self.times, self.calls, self.of = [], [], (model, tokens, index)
      made.append(self)

    def __call__(self, calls, record):
      self.calls.append((calls, record))
      self.times += [1.0] * calls * record

  monkeypatch.setattr(latency, "_Timed", Timed)
  monkeypatch.setattr(latency.decoding, "dense", lambda config, params: config)
  latency.measure([("a", {}), ("b", {})], prefill_tokens=8, repeats=repeats)
  assert [t.of for t in made] == [("a", 8, 0), ("a", 1, 8), ("b", 8, 0), ("b", 1, 8)]
  for timed in made:
    assert len(timed.times) == recorded
    assert timed.calls[0] == (latency.WARM_UP, False)
    assert [record for _, record in timed.calls] == [False, True] * latency.ROUNDS


def test_the_timed_program_is_the_model():
  """A prompt and then a token through the compiled cached forward give the logits of the plain model."""
  config, params = model()
  tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 264)
  batch = {"inputs": tokens, "segment_ids": tokens * 0 + 1, "positions": jax.numpy.arange(9)[None]}
  expected = jax.jit(Transformer(config).apply)({"params": params}, batch)
  params, empty_cache, _ = decoder = decoding.dense(config, params)
  prefill, step = latency._Timed(decoder, 8, 0), latency._Timed(decoder, 1, 8)
  one = jax.numpy.ones((1,), jax.numpy.int32)
  logits, cache = prefill._compiled(params, tokens[:, :8], 8 * one, empty_cache(1, 8))
  np.testing.assert_allclose(logits, expected[:, 7], atol=1e-5)
  longer = jax.tree.map(lambda x: jax.numpy.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))), cache.layers)
  logits, _ = step._compiled(params, tokens[:, 8:], one, decoding.Cache(longer, cache.lengths))
  np.testing.assert_allclose(logits, expected[:, 8], atol=1e-5)
  step(2, record=True)
  assert step._cache.lengths.tolist() == [9], "every call is that of the same token"

"""What is timed and how it is summed up; the times themselves are the machine's affair."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ModelConfig
from adaptive.depth.exits import Exiting
from adaptive.evaluation import latency
from adaptive.methods import METHODS
from adaptive.methods.contract import Decoder

CONFIG = ModelConfig(vocab_size=264, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, remat="full")
ROWS = np.random.default_rng(0).integers(0, 264, (3, 8 + latency.RUN))


def model(**fields):
  config = dataclasses.replace(CONFIG, **fields)
  return config, jax.jit(lambda key: nn.unbox(init_params(Transformer(config), key)))(jax.random.key(0))


def decoder(**fields):
  return Decoder(*decoding.dense(*model(**fields)))


def test_numbers_are_ordered():
  done = []
  times = latency.measure([decoder(), decoder(num_layers=1, d_ff=16)], ROWS, 8, repeats=7, report=done.append)
  assert done == [1, 2]
  assert len(times) == 2
  for t in times:
    assert 0 < t.prefill_ms <= t.prefill_ms_p90
    assert 0 < t.step_ms <= t.step_ms_p90


def test_median_and_90th_percentile_of_recorded_calls():
  assert latency._summary([float(i) for i in range(11)]) == (5.0, 9.0)
  assert latency._summary([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize(("repeats", "recorded"), [(1, 5), (50, 50), (51, 55)])
def test_every_decoder_takes_the_same_turns_and_is_warm(monkeypatch, repeats, recorded):
  made = []

  class Timed:
    def __init__(self, decoder, prefill_tokens, run):
      self.prefill_times, self.step_times, self.calls, self.of = [], [], [], (decoder.params, prefill_tokens, run)
      made.append(self)

    def __call__(self, row, record):
      self.calls.append((int(row[0]), record))
      self.prefill_times += [1.0] * record
      self.step_times += [2.0] * record

  monkeypatch.setattr(latency, "_Timed", Timed)
  plain, waits = Decoder("a", None, None), Decoder("b", None, None, cycle=9)
  found = latency.measure([plain, waits], np.arange(7)[:, None], prefill_tokens=8, repeats=repeats)
  assert sorted(t.of for t in made) == [("a", 8, 18), ("b", 8, 18)], "all for as long as the longest needs"
  assert made[0].calls == made[1].calls
  counted = [row for row, record in made[0].calls if record]
  assert counted == [i % 7 for i in range(recorded)]
  assert [record for _, record in made[0].calls[: latency.WARM_UP]] == [False] * latency.WARM_UP
  assert found == [latency.Latency(1.0, 1.0, 2.0, 2.0)] * 2


def test_the_timed_program_decodes_the_row():
  """The logits of every call are those of the plain model on the row so far."""
  config, params = model()
  seen = []
  timed = latency._Timed(decoder(), 8, latency.RUN)
  for name in ("_prefill", "_step"):
    run = getattr(timed, name)

    def watch(*args, run=run):
      result = run(*args)
      seen.append(np.asarray(result[0])[0])
      return result

    setattr(timed, name, watch)
  timed(ROWS[1], record=True)
  tokens = ROWS[1:2].astype(np.int32)
  batch = {"inputs": tokens, "segment_ids": tokens * 0 + 1, "positions": np.arange(tokens.shape[1])[None]}
  expected = jax.jit(Transformer(config).apply)({"params": params}, batch)
  np.testing.assert_allclose(np.stack(seen), expected[0, 7:], atol=1e-5)
  assert len(timed.prefill_times) == len(timed.step_times) == 1


@pytest.mark.parametrize(("kv", "tokens"), [("project", latency.RUN), ("exact", 20), ("recompute", 20)])
def test_a_run_is_long_enough_for_those_that_wait_to_be_taken_along(kv, tokens):
  """At most nine may wait, so among twenty tokens two go all the way, whoever leaves where."""
  method = METHODS["early_exit"]
  built = method.build(CONFIG, method.Config(exits=(1,), exit=Exiting(kv=kv, wait=9)))
  params = jax.eval_shape(lambda: nn.unbox(init_params(built, jax.random.key(0))))
  decoders = []
  jax.eval_shape(
    lambda params: decoders.extend(method.decoder(built, params, s) for s in method.submodels(built)), params
  )
  assert latency.run_of(decoders) == tokens

"""Measured latency of dense models as they would be deployed: compiled ahead, warmed up, at batch size 1."""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone import decoding
from adaptive.config import ModelConfig

WARM_UP = 10
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Latency:
  """Milliseconds: median and 90th percentile, of a prompt and of one more token."""

  prefill_ms: float
  prefill_ms_p90: float
  step_ms: float
  step_ms_p90: float


class _Timed:
  """A compiled cached forward of `tokens` tokens that follow `index` others. Its cache is donated, as in generation.

  Args:
    model: parameters, empty cache and step, as `decoding.dense` makes them.
  """

  def __init__(self, model: tuple[Any, Callable, Callable], tokens: int, index: int):
    self._params, empty_cache, step = model

    def forward(params, tokens, counts, cache):
      logits, after, _ = step(params, tokens, counts, cache._replace(lengths=jnp.full_like(cache.lengths, index)))
      return logits, after

    self._cache = empty_cache(1, index + tokens)
    self._tokens, self._counts = jnp.zeros((1, tokens), jnp.int32), jnp.full((1,), tokens, jnp.int32)
    args = self._params, self._tokens, self._counts, self._cache
    self._compiled = jax.jit(forward, donate_argnums=3).lower(*args).compile()
    self.times: list[float] = []

  def __call__(self, calls: int, record: bool) -> None:
    for _ in range(calls):
      start = time.perf_counter()
      logits, self._cache = self._compiled(self._params, self._tokens, self._counts, self._cache)
      logits.block_until_ready()
      if record:
        self.times.append(1000 * (time.perf_counter() - start))


def measure(
  models: Sequence[tuple[ModelConfig, Any]],
  prefill_tokens: int,
  repeats: int,
  report: Callable[[int], None] = lambda done: None,
) -> list[Latency]:
  """Times each (config, params) on the first device: a prompt of `prefill_tokens`, and one token after it.

  The models take turns in a few rounds, so that a slow moment of the machine does not fall on one of them alone.

  Args:
    report: called with the number of models compiled.
  """
  device = jax.local_devices()[0]

  def compile_both(model: tuple[ModelConfig, Any]) -> tuple[_Timed, _Timed]:
    config, params = model
    with jax.default_device(device):
      model = decoding.dense(config, jax.device_put(params, device))
      return _Timed(model, prefill_tokens, 0), _Timed(model, 1, prefill_tokens)

  timed = []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler does not hold Python's lock
    for done, both in enumerate(pool.map(compile_both, models), 1):
      timed.append(both)
      report(done)
  with jax.default_device(device):
    for turn in range(ROUNDS):
      for both in timed:
        for run in both:
          run(WARM_UP if turn == 0 else 2, record=False)
          run(-(-repeats // ROUNDS), record=True)
  return [Latency(*_summary(prefill.times), *_summary(step.times)) for prefill, step in timed]


def _summary(times: Sequence[float]) -> tuple[float, float]:
  return float(np.median(times)), float(np.percentile(times, 90))

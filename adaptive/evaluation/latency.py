"""Measured latency of sub-models as they would be deployed: compiled ahead, warmed up, at batch size 1, on real text.

What a token costs may depend on the text, so sub-models decode held-out rows: a prompt, then the tokens that follow it
in the row, one by one.
"""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.methods.contract import Decoder

WARM_UP = 2  # turns of each sub-model that do not count
ROUNDS = 5
RUN = 8  # tokens that are timed together, at least (`run_of`)


@dataclasses.dataclass(frozen=True)
class Latency:
  """Milliseconds: median and 90th percentile, of a prompt, and of one more token in runs of `run_of`."""

  prefill_ms: float
  prefill_ms_p90: float
  step_ms: float
  step_ms_p90: float


def run_of(decoders: Sequence[Decoder]) -> int:
  """How many tokens to time together, so that work put off comes due as often as in a long text: two whole cycles."""
  return max(RUN, *(2 * decoder.cycle for decoder in decoders))


class _Timed:
  """A decoder's compiled prefill and step; caches are donated, as in generation.

  Args:
    prefill_tokens: of the prompt; the `run` tokens after it are decoded.
  """

  def __init__(self, decoder: Decoder, prefill_tokens: int, run: int):
    self._decoder, self._prompt, self._run = decoder, prefill_tokens, run
    self._slots = prefill_tokens + run

    def compiled(tokens: int):
      shapes = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
      cache = jax.eval_shape(lambda: decoder.empty_cache(1, self._slots))
      return jax.jit(decoder.step, donate_argnums=3).lower(decoder.params, *shapes, cache).compile()

    self._prefill, self._step = compiled(prefill_tokens), compiled(1)
    self._empty = jax.jit(lambda: decoder.empty_cache(1, self._slots))
    self.prefill_times: list[float] = []
    self.step_times: list[float] = []

  def __call__(self, row: np.ndarray, record: bool) -> None:
    """One turn on a row, which begins again where it has fewer than prefill_tokens + run tokens."""
    params, prompt = self._decoder.params, self._prompt
    pieces = [jnp.full((1, 1), row[i % len(row)], jnp.int32) for i in range(prompt, prompt + self._run)]
    tokens, many, one = jnp.asarray(row[None, :prompt], jnp.int32), jnp.full((1,), prompt), jnp.ones((1,), jnp.int32)
    cache = jax.block_until_ready(self._empty())
    start = time.perf_counter()
    logits, cache, _ = self._prefill(params, tokens, many, cache)
    logits.block_until_ready()
    between = time.perf_counter()
    for piece in pieces:
      logits, cache, _ = self._step(params, piece, one, cache)
      logits.block_until_ready()  # as a sampled token has to be known before it is fed
    end = time.perf_counter()
    if record:
      self.prefill_times.append(1000 * (between - start))
      self.step_times.append(1000 * (end - between) / self._run)


def measure(
  decoders: Sequence[Decoder],
  rows: np.ndarray,
  prefill_tokens: int,
  repeats: int,
  report: Callable[[int], None] = lambda done: None,
) -> list[Latency]:
  """Times decoders, whose parameters lie on one device: a prompt of `prefill_tokens`, and the tokens after it.

  The decoders take turns in a few rounds, on the same rows, so that a slow moment of the machine does not fall on one
  of them alone.

  Args:
    rows: int [r, t]; t is at least prefill_tokens.
    report: called with the number of decoders compiled.
  """
  timed, run = [], run_of(decoders)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler does not hold Python's lock
    for done, one in enumerate(pool.map(lambda decoder: _Timed(decoder, prefill_tokens, run), decoders), 1):
      timed.append(one)
      report(done)
  turn = 0
  for _ in range(ROUNDS):
    count = -(-repeats // ROUNDS)
    for one in timed:
      for i in range(WARM_UP):
        one(rows[i % len(rows)], record=False)
      for i in range(count):
        one(rows[(turn + i) % len(rows)], record=True)
    turn += count
  return [Latency(*_summary(one.prefill_times), *_summary(one.step_times)) for one in timed]


def _summary(times: Sequence[float]) -> tuple[float, float]:
  return float(np.median(times)), float(np.percentile(times, 90))

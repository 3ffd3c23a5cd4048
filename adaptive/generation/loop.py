"""Tokens one after the other: a batch of prompts in one call, then one compiled step per token.

The host reads what a step sampled while the device computes the next one, so the device does not wait for it; only
what may be the last that is wanted is read first, or the prompts that come next would wait for a step in vain. A row
that has ended, by a stop token or because `watch` said so, has no more real tokens: it computes on, unseen.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive import sharding
from adaptive.config import require
from adaptive.generation.sampling import Sampling, row_keys, sample
from adaptive.methods.contract import Cache, Decoder, Metrics, Params

_SMALLEST, _STRIDE = 16, 256


@dataclasses.dataclass(frozen=True)
class Result:
  """What was generated, for each prompt.

  Attributes:
    tokens: without the prompt; the stop token that ended a row is its last.
    log_probs: of each token under the model itself, natural logarithm.
    metrics: realised quantities as (sum, count), over the prompts' tokens and the new ones.
    prefill_seconds: from the prompts to every row's first token, without compilation.
    seconds: from then to the last token.
  """

  tokens: list[list[int]]
  log_probs: list[list[float]]
  metrics: dict[str, tuple[np.ndarray, np.ndarray]]
  prefill_seconds: float
  seconds: float

  @property
  def tokens_per_second(self) -> float:
    """Of all rows together, each row's first token left out; 0 when there is no other."""
    later = sum(max(len(row) - 1, 0) for row in self.tokens)
    return later / self.seconds if later else 0.0


class Rows(NamedTuple):
  """What a step knows of each row beside the cache, all [b].

  Attributes:
    numbers: of its keys. lengths: tokens that the cache holds. newest: the one after those. done: whether it has ended.
  """

  numbers: jax.Array
  lengths: jax.Array
  newest: jax.Array
  done: jax.Array


class Sampled(NamedTuple):
  """On its way to the host: tokens [b, n], their log-probabilities [b, n], how many are real [b], metrics."""

  tokens: jax.Array
  log_probs: jax.Array
  counts: jax.Array
  metrics: Metrics


class _Host:
  """What the host has read so far; `ended` says which rows it waits for no more."""

  def __init__(
    self,
    rows: int,
    limit: int,
    stop_tokens: tuple[int, ...],
    watch: Callable[[int, int], bool | None],
    clock: Callable[[], float],
  ):
    self.tokens: list[list[int]] = [[] for _ in range(rows)]
    self.log_probs: list[list[float]] = [[] for _ in range(rows)]
    self.metrics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    self.ended = np.zeros(rows, bool)
    self.times: list[float] = []
    self._limit, self._stop_tokens, self._watch, self._clock = limit, stop_tokens, watch, clock

  @property
  def left(self) -> int:
    """Tokens that any row still needs."""
    return max((self._limit - len(row) for row, ended in zip(self.tokens, self.ended) if not ended), default=0)

  def read(self, found: Sampled) -> bool:
    """Takes down what a step sampled; whether a row ended in a way of which the device cannot know."""
    told = False
    self.times.append(self._clock())
    for name, pair in found.metrics.items():
      total, count = self.metrics.get(name, (0.0, 0.0))
      self.metrics[name] = total + np.float64(pair[0]), count + np.float64(pair[1])
    for row in np.flatnonzero(~self.ended):
      for token, log_prob in list(zip(found.tokens[row], found.log_probs[row]))[: found.counts[row]]:
        told |= self._take(int(row), int(token), float(log_prob))
        if self.ended[row]:
          break
    return told

  def _take(self, row: int, token: int, log_prob: float) -> bool:
    """One more token of a row; whether the row ends here and the device does not know."""
    self.tokens[row].append(token)
    self.log_probs[row].append(log_prob)
    enough = bool(self._watch(row, token)) or len(self.tokens[row]) == self._limit
    self.ended[row] = enough or token in self._stop_tokens
    return enough


def bucket(size: int) -> int:
  """A size at least as large, of few: powers of two from 16 on, then multiples of 256. Each is compiled once."""
  return max(_SMALLEST, 1 << (size - 1).bit_length()) if size <= _STRIDE else -(-size // _STRIDE) * _STRIDE


def check(
  prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int, vocab_size: int, max_len: int | None
) -> None:
  """Raises ConfigError for prompts that a `Generator` cannot continue."""
  require(len(prompts) > 0, "there is no prompt")
  require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
  require(0 <= seed < 2**32, f"seed={seed} must lie in 0 .. {2**32 - 1}")
  for number, prompt in enumerate(prompts, 1):
    require(len(prompt) > 0, f"prompt {number} is empty")
    for token in prompt:
      require(0 <= token < vocab_size, f"prompt {number}: there is no token {token}, only 0 .. {vocab_size - 1}")
    longest = len(prompt) + max_new_tokens
    require(
      max_len is None or longest <= max_len,
      f"prompt {number} of {len(prompt)} tokens and max_new_tokens={max_new_tokens} make {longest}, more than "
      f"max_len={max_len}",
    )


class Generator:
  """Generates with one sub-model, and keeps its compiled programs.

  Args:
    decoder: of the sub-model.
    vocab_size: only ids below it are sampled; the tokenizer's, where the model's table has more rows.
    sampling: how tokens are chosen.
    stop_tokens: a row ends with the first of them.
    max_len: limit on a row's prompt and new tokens together; None: no limit.
    mesh: where the decoder's parameters lie; rows are spread over its data-parallel devices. None: one device.
  """

  def __init__(
    self,
    decoder: Decoder,
    vocab_size: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    max_len: int | None = None,
    mesh: Mesh | None = None,
  ):
    self._decoder, self._vocab_size, self._max_len, self._mesh = decoder, vocab_size, max_len, mesh
    self._sampling, self._stop_tokens = sampling or Sampling(), tuple(stop_tokens)
    self._over_rows = None if mesh is None else sharding.batch_sharding(mesh)
    self._spare = 0  # slots that a row may need beyond its tokens
    self._compiling = 0.0  # seconds so far
    self._programs = functools.cache(self._compile)

  def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    watch: Callable[[int, int], bool | None] = lambda row, token: None,
  ) -> Result:
    """Continues every prompt by up to max_new_tokens.

    Args:
      prompts: token ids, not empty; their lengths may differ.
      seed: with a row's number and a token's position, all that its randomness depends on.
      numbers: the rows' numbers; 0, 1, ... unless given.
      watch: called with the row and the token, in order, as soon as the host has read it; True ends the row there.

    Raises:
      ConfigError: a prompt is empty, too long, or holds an id that no token has.
    """
    check(prompts, max_new_tokens, seed, self._vocab_size, self._max_len)
    tokens, counts, ids = self._padded(prompts, numbers)
    slots = bucket(int(counts.max()) + max_new_tokens - 1 + self._spare)  # the last token is not fed back
    host, key = _Host(len(prompts), max_new_tokens, self._stop_tokens, watch, self._clock), np.uint32(seed)
    with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
      first, following = self._programs(*tokens.shape, slots)
      start, params = self._clock(), self._decoder.params
      cache, rows, sampled = first(params, *map(self._put, (tokens, counts, ids)), key)
      stopped = self._put(np.zeros(len(counts), bool))

      def read(sampled: Sampled) -> None:
        nonlocal stopped
        if host.read(self._fetch(sampled)):
          stopped = self._put(np.pad(host.ended, (0, len(counts) - len(prompts))))

      for _ in range(max_new_tokens - 1):
        if last := host.left <= self._coming:
          read(sampled)
          if host.ended.all():
            break
        cache, rows, later = following(params, cache, rows, stopped, key)
        if not last:
          read(sampled)
          if host.ended.all():
            break
        sampled = later
      else:
        read(sampled)
    return Result(host.tokens, host.log_probs, host.metrics, host.times[0] - start, host.times[-1] - host.times[0])

  def _padded(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None) -> tuple[np.ndarray, ...]:
    """Tokens [b, t], counts [b] and numbers [b]; rows beyond the prompts fill up the mesh and hold no token."""
    parts = 1 if self._mesh is None else sharding.batch_parts(self._mesh)
    counts, ids = np.zeros((2, -(-len(prompts) // parts) * parts), np.int32)
    counts[: len(prompts)] = [len(prompt) for prompt in prompts]
    ids[: len(prompts)] = range(len(prompts)) if numbers is None else numbers
    tokens = np.zeros((len(counts), bucket(int(counts.max()))), np.int32)
    for row, prompt in zip(tokens, prompts):
      row[: len(prompt)] = prompt
    return tokens, counts, ids

  def _fetch(self, sampled: Sampled) -> Sampled:
    """Waits for what a step sampled."""
    found = jax.device_get(sampled)
    self._observe(found)
    return found

  def _put(self, rows: np.ndarray) -> jax.Array:
    return jax.device_put(rows, self._over_rows)

  def _compile(self, rows: int, length: int, slots: int) -> tuple[Callable, Callable]:
    """The programs of a batch's first token and of every later one."""
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=self._over_rows)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=self._over_rows)
    seed, over = np.uint32(0), self._over_rows
    state = Rows(over, over, over, over)
    sampled = Sampled(over, over, over, None if self._mesh is None else sharding.replicated(self._mesh))
    first = jax.jit(functools.partial(self._first, slots), out_shardings=(None, state, sampled))
    first = first.lower(self._decoder.params, tokens, ints, ints, seed).compile()
    # The cache lies where the compiler has put it; it must not move from one step to the next.
    where = first.output_shardings[0]
    cache = jax.eval_shape(functools.partial(self._decoder.empty_cache, rows, slots))
    cache = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, where)
    flags = jax.ShapeDtypeStruct((rows,), bool, sharding=over)
    known = Rows(ints, ints, ints, flags)

    def compile_next(function: Callable, *more: Any) -> Callable:
      start = time.perf_counter()
      following = jax.jit(function, out_shardings=(where, state, sampled), donate_argnums=1)
      following = following.lower(self._decoder.params, cache, known, flags, seed, *more).compile()
      self._compiling += time.perf_counter() - start
      return following

    return first, self._next(compile_next)

  def _clock(self) -> float:
    """Seconds, without those of compilation."""
    return time.perf_counter() - self._compiling

  def _next(self, compile_next: Callable[..., Callable]) -> Callable:
    """What is called for every later token: (params, cache, rows, stopped, seed) -> (cache, rows, sampled)."""
    return compile_next(self._following)

  @property
  def _coming(self) -> int:
    """Tokens of a row, at most, that the step brings which is read next."""
    return 1

  def _observe(self, sampled: Sampled) -> None:
    """Sees what the host has read."""

  def _first(self, slots: int, params: Params, tokens, counts, numbers, seed) -> tuple[Cache, Rows, Sampled]:
    """Prompts [b, t], of which counts [b] are real, into a new cache; samples each row's first token."""
    cache = self._decoder.empty_cache(len(tokens), slots)
    logits, cache, metrics = self._decoder.step(params, tokens, counts, cache)
    return cache, *self._sample(Rows(numbers, counts, counts, counts == 0), logits, metrics, seed)

  def _following(self, params: Params, cache: Cache, rows: Rows, stopped, seed) -> tuple[Cache, Rows, Sampled]:
    """Feeds each row its newest token, unless it is done or `stopped` [b], and samples the next."""
    done = rows.done | stopped
    counts = (~done).astype(jnp.int32)
    logits, cache, metrics = self._decoder.step(params, rows.newest[:, None], counts, cache)
    rows = rows._replace(lengths=rows.lengths + counts, done=done)
    return cache, *self._sample(rows, logits, metrics, seed)

  def _sample(self, rows: Rows, logits: jax.Array, metrics: Metrics, seed) -> tuple[Rows, Sampled]:
    keys = row_keys(seed, rows.numbers, rows.lengths)
    tokens, log_probs = sample(logits[:, : self._vocab_size], keys, self._sampling)
    stops = jnp.isin(tokens, jnp.asarray(self._stop_tokens, jnp.int32))
    sampled = Sampled(tokens[:, None], log_probs[:, None], (~rows.done).astype(jnp.int32), metrics)
    return rows._replace(newest=tokens, done=rows.done | stops), sampled

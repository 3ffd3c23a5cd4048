"""Depth-wise batching: a queue of requests through slots that each go as deep as their token needs.

A tick is one program: every slot under way takes a pass, and every slot whose token wants no more of them gets its next
token and begins it. The host reads what a tick sampled while the device computes the next one, and fills
the slots of requests that have ended.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import sharding
from adaptive.config import require
from adaptive.generation.loop import bucket, check
from adaptive.generation.sampling import Sampling, row_keys, sample
from adaptive.methods.contract import Params, Ticker


@dataclasses.dataclass(frozen=True)
class Result:
  """What was generated, for each prompt.

  Attributes:
    tokens: without the prompt; the stop token that ended a request is its last.
    seconds: from the first prompt to the last token, prompts included, without compilation. ticks: programs run.
    occupancy: share of the slots that took a pass, mean over ticks.
  """

  tokens: list[list[int]]
  seconds: float
  ticks: int
  occupancy: float

  @property
  def tokens_per_second(self) -> float:
    return sum(map(len, self.tokens)) / self.seconds


_TOGETHER = (1, 4)  # prompts that one program takes


class _State(NamedTuple):
  """What the device holds, by slot [b].

  Attributes:
    slots: of the ticker. numbers: of the request. made: its tokens so far.
  """

  slots: Any
  numbers: jax.Array
  made: jax.Array


class _Sampled(NamedTuple):
  """On its way to the host: of each slot [b] the new token, whether it is one, and ends; slots that took a pass []."""

  tokens: jax.Array
  valid: jax.Array
  ends: jax.Array
  passed: jax.Array


class DepthwiseGenerator:
  """Generates with one sub-model, and keeps its compiled programs.

  Args:
    ticker: of the sub-model. vocab_size: only ids below it are sampled. sampling, stop_tokens: as of `Generator`.
    slots: requests under way at a time.
  """

  def __init__(
    self,
    ticker: Ticker,
    vocab_size: int,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    slots: int = 32,
  ):
    require(slots > 0, f"slots={slots} must be at least 1")
    self._ticker, self._vocab_size, self._sampling = ticker, vocab_size, sampling or Sampling()
    self._stop_tokens, self._slots = tuple(stop_tokens), slots
    # One place for the state, so that no program is compiled a second time for what another has made.
    place = jax.tree.leaves(ticker.params)[0].sharding
    self._place = sharding.replicated(place.mesh) if isinstance(place, jax.sharding.NamedSharding) else place
    self._admit = jax.jit(self._admitted, donate_argnums=1, out_shardings=(self._place, None))
    self._tick = jax.jit(self._ticked, donate_argnums=1, out_shardings=(self._place, None))
    self._compiled: set[tuple[int, int]] = set()

  def __call__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int = 0) -> Result:
    """Continues every prompt by up to max_new_tokens. What comes depends on a prompt's number, not on the others.

    Raises:
      ConfigError: a prompt is empty, or holds an id that no token has.
    """
    check(prompts, max_new_tokens, seed, self._vocab_size, None)
    length = bucket(max(map(len, prompts)))
    room = bucket(max(map(len, prompts)) + max_new_tokens)
    state = self._empty(room)
    if (length, room) not in self._compiled:
      self._compile(state, length, max_new_tokens)
      self._compiled.add((length, room))
    waiting = collections.deque(range(len(prompts)))
    holder: list[int | None] = [None] * self._slots
    tokens, passed, ticks, held = [[] for _ in prompts], 0, 0, []
    params, seed = self._ticker.params, np.uint32(seed)
    start = time.perf_counter()
    while waiting or any(number is not None for number in holder):
      coming = []
      free = [slot for slot in range(self._slots) if holder[slot] is None]
      while waiting and free:
        number = min(len(free), len(waiting), _TOGETHER[-1])
        some, free = free[:number], free[number:]
        for slot in some:
          holder[slot] = waiting.popleft()
        admitted = self._padded(some, [(holder[slot], prompts[holder[slot]]) for slot in some], length)
        state, sampled = self._admit(params, state, *admitted, max_new_tokens, seed)
        coming.append(sampled)
      state, sampled = self._tick(params, state, seed, max_new_tokens)
      coming.append(sampled)
      ticks += 1
      passed += sum(self._read(sampled, holder, tokens) for sampled in held)  # while the device goes on
      held = coming
    passed += sum(int(jax.device_get(sampled.passed)) for sampled in held)
    return Result(tokens, time.perf_counter() - start, ticks, passed / max(ticks * self._slots, 1))

  def _read(self, sampled: _Sampled, holder: list[int | None], tokens: list[list[int]]) -> int:
    """Takes down what a program sampled; how many slots passed in it."""
    found = jax.device_get(sampled)
    for slot in np.flatnonzero(found.valid):
      tokens[holder[slot]].append(int(found.tokens[slot]))
      if found.ends[slot]:
        holder[slot] = None
    return int(found.passed)

  def _empty(self, room: int) -> _State:
    zeros = lambda: jnp.zeros((self._slots,), jnp.int32)  # each its own buffer, to be donated
    state = _State(self._ticker.empty(self._slots, room), zeros(), zeros())
    return jax.device_put(state, self._place)

  def _compile(self, state: _State, length: int, most: int) -> None:
    """Compiles both programs on a state of nothing, so that no request pays for it."""
    like = functools.partial(jax.tree.map, jnp.copy)
    seed = np.uint32(0)
    for rows in _TOGETHER:
      nothing = np.zeros((3, rows), np.int32)
      args = nothing[0], nothing[1], np.zeros((rows, length), np.int32), nothing[2]
      jax.block_until_ready(self._admit(self._ticker.params, like(state), *args, most, seed))
    jax.block_until_ready(self._tick(self._ticker.params, like(state), seed, most))

  def _padded(self, slots: Sequence[int], requests: Sequence[tuple[int, Sequence[int]]], length: int):
    """Slots, numbers, tokens and their counts, for the smallest program that has a row for each."""
    rows = next(rows for rows in _TOGETHER if rows >= len(slots))
    chosen, numbers, counts = np.zeros((3, rows), np.int32)
    tokens = np.zeros((rows, length), np.int32)
    chosen[: len(slots)] = slots
    for row, (number, prompt) in enumerate(requests):
      numbers[row], counts[row] = number, len(prompt)
      tokens[row, : len(prompt)] = prompt
    return chosen, numbers, tokens, counts

  def _admitted(self, params: Params, state: _State, chosen, numbers, tokens, counts, most, seed):
    """Requests into slots, and the first token of each."""
    logits, slots = self._ticker.prefill(params, state.slots, chosen, tokens, counts)
    target = jnp.where(counts > 0, chosen, self._slots)
    put = lambda leaf, values: leaf.at[target].set(values, mode="drop")
    state = _State(slots, put(state.numbers, numbers), put(state.made, 0))
    valid, everyone = put(jnp.zeros((self._slots,), bool), True), jnp.zeros((self._slots, logits.shape[1]))
    return self._begin(params, state, valid, put(everyone, logits), most, seed, jnp.int32(0))

  def _ticked(self, params: Params, state: _State, seed, most) -> tuple[_State, _Sampled]:
    passed = jnp.sum(self._ticker.under_way(state.slots), dtype=jnp.int32)
    slots = self._ticker.advance(params, state.slots)
    ready = self._ticker.ready(slots)
    logits, slots = self._ticker.finish(params, slots)
    state = state._replace(slots=slots)
    return self._begin(params, state, ready, logits, most, seed, passed)

  def _begin(self, params, state: _State, valid, logits, most, seed, passed):
    """Samples the next tokens where valid [b] and begins them, unless they are the last of their requests."""
    keys = row_keys(seed, state.numbers, self._ticker.lengths(state.slots))
    tokens, _ = sample(logits[:, : self._vocab_size], keys, self._sampling)
    made = state.made + valid
    ends = valid & ((made >= most) | jnp.isin(tokens, jnp.asarray(self._stop_tokens, jnp.int32)))
    slots = self._ticker.feed(params, state.slots, tokens, valid & ~ends)
    state = state._replace(slots=self._ticker.leave(slots, ends), made=made)
    return state, _Sampled(tokens, valid, ends, passed)

"""Self-speculative decoding: a cheap part of a model drafts tokens, and the rest of it checks them all in one pass.

LayerSkip (Elhoushi et al., arXiv 2404.16710, Section 4.3): the draft is an early exit; what it computed and its keys
are kept, and only the layers above run to check. A draft may be any that `adaptive.depth.ladder` can make. Which one,
and how many tokens, is fixed or chosen anew in every round (`adaptive.generation.drafts`).

Greedy decoding gives the tokens of the model alone; sampling has its distribution (Leviathan et al., arXiv 2211.17192,
Theorem 1). Every row accepts as many tokens as are right for it.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptive.config import require
from adaptive.depth.ladder import At, Cache, Ladder
from adaptive.generation import loop
from adaptive.generation.drafts import Choice, Chooser, Fixed
from adaptive.generation.loop import Rows, Sampled
from adaptive.generation.sampling import Sampling, probabilities, row_keys, sample
from adaptive.methods.contract import Metrics, Params

_PROBED = 32  # of a prompt's last tokens, from which drafts are first judged
_DRAFT, _ACCEPT, _AGAIN = 1, 2, 3  # what a position's randomness is for


class Drafted(NamedTuple):
  """What a draft proposes after each row's newest token.

  Attributes:
    tokens: the newest token and the proposed ones, int32 [b, k + 1].
    states: residual stream of all of these at the draft's rung, [b, k + 1, d].
    probs: that each proposed token was drawn from, [b, k, v]; empty where the likeliest is taken.
  """

  tokens: jax.Array
  states: jax.Array
  probs: jax.Array


class SpeculativeGenerator(loop.Generator):
  """Generates as `Generator` does, in rounds of a draft and a check.

  Args:
    ladder: of the model and its drafts. choice: which draft, and how many tokens, in a round.
    Others as for `Generator`.
  """

  def __init__(
    self,
    ladder: Ladder,
    vocab_size: int,
    choice: Fixed | Chooser,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    max_len: int | None = None,
    mesh: Mesh | None = None,
  ):
    super().__init__(ladder, vocab_size, sampling, stop_tokens, max_len, mesh)
    self._ladder, self._choice = ladder, choice
    require(
      isinstance(choice, Fixed) or not any(ladder.tails),
      "drafts that have layers of their own cannot be changed from round to round: name one",
    )
    self._spare = 2 * (choice.most + 1)  # the host is one round late, and a round may overshoot
    self._taken: collections.deque[Choice | None] = collections.deque()  # rounds that were not read yet

  def _next(self, compile_next: Callable[..., Callable]) -> Callable:
    """Picks the round's draft and its length, each a program, with a look and without, compiled when first chosen."""
    programs = {}
    self._choice.renew()

    def following(*args):
      choice = self._choice.choose()
      if choice not in programs:
        jax.block_until_ready(args)  # what is under way must not hide behind seconds that do not count
        programs[choice] = compile_next(functools.partial(self._round, choice))
      if not self._taken:  # nothing is under way: this round begins now
        self._read = self._clock()
      self._taken.append(choice)
      return programs[choice](*args)

    return following

  def __call__(self, *args, **kwargs) -> loop.Result:
    self._taken = collections.deque([None])  # the prompts' pass; what an interrupted call left is forgotten
    self._read = self._clock()  # when the host last read what a round sampled
    self._choice.begin()
    return super().__call__(*args, **kwargs)

  @property
  def _coming(self) -> int:
    return 1 if self._taken[0] is None else self._taken[0].tokens + 1

  def _observe(self, sampled: Sampled) -> None:
    """Tells what a round showed, and its seconds: what lies between its end and that of the one before."""
    before, self._read = self._read, self._clock()
    self._choice.observe(sampled.metrics, self._taken.popleft(), self._read - before)

  def _first(self, slots: int, params: Params, tokens, counts, numbers, seed) -> tuple[Cache, Rows, Sampled]:
    ladder, drafts = self._ladder, self._choice.drafts
    cache = ladder.empty_cache(len(tokens), slots)
    at = At(jnp.zeros_like(counts), counts)
    x, rungs = ladder.embed(params, tokens), {}
    for stage in range(ladder.stages):
      rungs[stage] = x
      x, cache = ladder.climb(params, x, at, cache, stage, stage + 1)
    for draft in drafts:
      if ladder.tails[draft]:
        _, cache = ladder.tail(params, draft, rungs[ladder.rungs[draft]], at, cache)
    last = jnp.minimum(jnp.arange(-_PROBED, 0)[None] + counts[:, None], counts[:, None] - 1)
    pick = jax.vmap(lambda row, at: row[at])
    cut = lambda x: jax.tree.map(lambda leaf: pick(leaf, jnp.maximum(last, 0)), x)
    logits = self._logits(params, len(ladder.rungs), cut(x))
    agreed = {}
    if self._choice.learns:
      states = {stage: cut(rung) for stage, rung in rungs.items()}
      agreed = self._agreement(params, states, jnp.argmax(logits, axis=-1), last >= 0)
    return cache, *self._sample(Rows(numbers, counts, counts, counts == 0), logits[:, -1], agreed, seed)

  def _logits(self, params: Params, draft: int, x: jax.Array) -> jax.Array:
    return self._ladder.head(params, draft, x)[..., : self._vocab_size]

  def _agreement(self, params: Params, rungs: Mapping[int, jax.Array], likeliest, valid) -> Metrics:
    """How often each draft's likeliest token is the model's, [e], over the valid of some positions.

    Args:
      rungs: residual stream before each stage, [b, n, d]. likeliest: the model's [b, n]. valid: bool [b, n].
    """
    ladder, number = self._ladder, jnp.sum(valid, dtype=jnp.float32)
    states = [rungs[rung] for rung in ladder.rungs]
    if ladder.one_head:  # one product for all
      logits = jnp.split(self._logits(params, 0, jnp.concatenate(states)), len(states))
    else:
      logits = [self._logits(params, draft, x) for draft, x in enumerate(states)]
    same = [jnp.sum((jnp.argmax(each, axis=-1) == likeliest) & valid, dtype=jnp.float32) for each in logits]
    return {"agrees": (jnp.stack(same), number)}

  def _round(self, choice: Choice, params: Params, cache: Cache, rows: Rows, stopped, seed):
    """Some drafted tokens and the check of them: between one and choice.tokens + 1 new tokens of each row."""
    ladder, done = self._ladder, rows.done | stopped
    live = (~done).astype(jnp.int32)
    drafted, rungs, cache = self._draft(choice, params, cache, rows, live, seed)
    at = At(rows.lengths, live * (choice.tokens + 1))
    rung, x = ladder.rungs[choice.draft], drafted.states
    for low, high in itertools.pairwise(range(rung, ladder.stages + 1) if choice.look else (rung, ladder.stages)):
      rungs[low] = x
      x, cache = ladder.climb(params, x, at, cache, low, high)
    logits = self._logits(params, len(ladder.rungs), x)
    tokens, accepted = self._check(drafted, logits, rows, seed)
    proposed = jnp.arange(choice.tokens + 1)[None] <= accepted[:, None]
    stops = jnp.isin(tokens, jnp.asarray(self._stop_tokens, jnp.int32)) & proposed
    ends = jnp.any(stops, axis=1)
    counts = live * jnp.where(ends, jnp.argmax(stops, axis=1) + 1, accepted + 1)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
    newest = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    metrics = _measured(choice.tokens, accepted, counts, live)
    if choice.look:
      right = proposed & (live > 0)[:, None]
      metrics |= self._agreement(params, rungs, jnp.argmax(logits, axis=-1), right)
    after = rows._replace(
      lengths=rows.lengths + counts, newest=jnp.where(live > 0, newest, rows.newest), done=done | ends
    )
    return cache, after, Sampled(tokens, log_probs, counts, metrics)

  def _draft(self, choice: Choice, params: Params, cache: Cache, rows: Rows, live, seed):
    """Tokens one after the other, and the states below the rung where agreement is counted.

    Returns:
      What was drafted, the streams at the rungs below the draft's by stage, [b, k + 1, d], and the cache.
    """
    ladder, rung = self._ladder, self._ladder.rungs[choice.draft]
    tokens, probs, states = [rows.newest], [], []
    # The last drafted token is run too: its state is what the token after it is drawn from, if all are accepted.
    for i in range(choice.tokens + 1):
      at, streams = At(rows.lengths + i, live), []
      x = ladder.embed(params, tokens[-1][:, None])
      for low, high in itertools.pairwise(range(rung + 1) if choice.look else (0, rung)):
        streams.append(x)
        x, cache = ladder.climb(params, x, at, cache, low, high)
      states.append([*streams, x])
      if ladder.tails[choice.draft]:
        y, cache = ladder.tail(params, choice.draft, x, at, cache)
      else:
        y = x
      if i < choice.tokens:
        logits = self._logits(params, choice.draft, y)[:, 0]
        token, drawn_from = self._propose(logits, rows, rows.lengths + i + 1, seed)
        tokens.append(token)
        probs.append(drawn_from)
    join = lambda *leaves: jnp.concatenate(leaves, axis=1)
    *below, at_rung = (jax.tree.map(join, *streams) for streams in zip(*states))
    drawn_from = jnp.stack(probs, axis=1) if probs else jnp.zeros((len(live), 0, self._vocab_size))
    return Drafted(jnp.stack(tokens, axis=1), at_rung, drawn_from), dict(enumerate(below)), cache

  def _propose(self, logits: jax.Array, rows: Rows, positions: jax.Array, seed) -> tuple[jax.Array, jax.Array]:
    """A token for each row, [b], and what it was drawn from, [b, v], or [b, 0] where the likeliest is taken."""
    if self._sampling.temperature == 0:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros((len(logits), 0))
    keys = _keys(seed, rows, positions, _DRAFT)
    return sample(logits, keys, self._sampling)[0], probabilities(logits, self._sampling)

  def _check(self, drafted: Drafted, logits: jax.Array, rows: Rows, seed) -> tuple[jax.Array, jax.Array]:
    """The tokens of the round, int32 [b, k + 1], and how many of them are the draft's, int32 [b]; one more is right.

    Args:
      logits: the model's after each of the drafted tokens and the one before them, [b, k + 1, v].
    """
    most = logits.shape[1] - 1
    proposed = drafted.tokens[:, 1:]
    leading = lambda right: jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1)
    if self._sampling.temperature == 0:
      wanted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      return wanted, leading(wanted[:, :-1] == proposed)
    at = rows.lengths[:, None] + 1 + jnp.arange(most + 1)[None]
    flat = logits.reshape(-1, logits.shape[-1])
    probs = probabilities(flat, self._sampling).reshape(logits.shape)
    keys = jax.vmap(lambda positions: _keys(seed, rows, positions, _ACCEPT), 1, 1)(at[:, :-1])
    draws = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    picked = lambda p: jnp.take_along_axis(p, proposed[..., None], axis=-1)[..., 0]
    accepted = leading(draws * picked(drafted.probs) < picked(probs[:, :-1]))
    # At the first refused token, what the model has more of than the draft; after the last accepted one, the model's.
    drawn_from = jnp.pad(drafted.probs, ((0, 0), (0, 1), (0, 0)))
    here = lambda x: jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0]
    rest = jnp.maximum(here(probs) - here(drawn_from), 0.0)
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, here(probs))  # equal, but for rounding
    again = _keys(seed, rows, rows.lengths + 1 + accepted, _AGAIN)
    extra = jax.vmap(jax.random.categorical)(again, jnp.log(rest)).astype(jnp.int32)
    tokens = jnp.pad(proposed, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(most + 1)[None] == accepted[:, None], extra[:, None], tokens), accepted


def _measured(tokens: int, accepted: jax.Array, counts: jax.Array, live: jax.Array) -> Metrics:
  """Share of drafted tokens that were accepted, and of those that were looked at; tokens of a round."""
  rounds = jnp.sum(live, dtype=jnp.float32)
  total = lambda x: jnp.sum(x * live, dtype=jnp.float32)
  return {
    "accepted": (total(accepted), tokens * rounds),
    "right": (total(accepted), total(jnp.minimum(accepted + 1, tokens))),
    "tokens_per_round": (total(counts), rounds),
  }


def _keys(seed: jax.Array, rows: Rows, positions: jax.Array, purpose: int) -> jax.Array:
  """Keys [b] for a purpose, of a position in each row."""
  return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(row_keys(seed, rows.numbers, positions))

"""What methods that route tokens share: routers, selection, gather and scatter, budgets, balance and z losses.

Rows never mix: every gather and scatter is batched over rows, so on a mesh that shards the batch none of them moves an
activation between devices. Selections keep the tokens' order, so an ordinary causal mask over the selected ones is
right.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.attention import Context
from adaptive.backbone.layers import param
from adaptive.config import ModelConfig, require
from adaptive.losses import SumCount

Params = dict[str, jax.Array]
RouterKind = Literal["linear", "small_mlp", "mlp", "wide_mlp"]

_HIDDEN = {"linear": 0, "small_mlp": 1 / 8, "mlp": 2, "wide_mlp": 4}  # hidden width in units of d_model


def router_weights(kind: RouterKind, d_model: int, outputs: int) -> int:
  """Weights of one router."""
  hidden = _hidden(kind, d_model)
  return d_model * hidden + hidden * outputs if hidden else d_model * outputs


def _hidden(kind: RouterKind, d_model: int) -> int:
  return math.ceil(_HIDDEN[kind] * d_model)


class Router(nn.Module):
  """Declares the parameters of several routers of one kind, stacked; `router_logits` runs them.

  `linear` is d -> outputs, `small_mlp` d -> d / 8 -> outputs, `mlp` d -> 2 d -> outputs and `wide_mlp` d -> 4 d ->
  outputs, without biases. `balanced` adds `bias` [outputs], for a controller to move: it takes part in no score, so no
  gradient reaches it.
  """

  config: ModelConfig
  kind: RouterKind
  number: int
  outputs: int
  balanced: bool = False

  @nn.compact
  def __call__(self) -> None:
    width, init = self.config.d_model, nn.initializers.normal(self.config.init_std)
    hidden = _hidden(self.kind, width)
    if hidden:
      param(self, "hidden", init, (self.number, width, hidden), (None, None, None))
    param(self, "weight", init, (self.number, hidden or width, self.outputs), (None, None, None))
    if self.balanced:
      # Float32 whatever the model is stored in: its steps are small.
      self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), (self.outputs,), jnp.float32)


def router_logits(params: Params, which: int, x: jax.Array, temperature: float = 1.0) -> jax.Array:
  """Scores of the residual stream itself, [b, t, d] -> float32 [b, t, outputs].

  In float32 whatever the model computes in: bfloat16 would tie scores, and a tie decides a token's path.
  """
  x = x.astype(jnp.float32) / temperature
  if "hidden" in params:
    x = nn.gelu(jnp.einsum("btd,df->btf", x, params["hidden"][which].astype(jnp.float32)), approximate=False)
  return jnp.einsum("btf,fe->bte", x, params["weight"][which].astype(jnp.float32))


def capacity_tokens(capacity: float, seq_len: int, chunk: int = 0, multiple: int = 1) -> int:
  """Tokens that a capacity (a share of the whole row) stands for, of `seq_len`.

  Args:
    chunk: tokens of each of the equal pieces that a row is cut into, in each of which ceil(capacity * chunk) are taken;
      0 takes floor(capacity * seq_len) of the row.
    multiple: rounds to the nearest multiple of this, which suits a matrix unit; 1 leaves the number alone.

  Raises:
    ConfigError: the row does not divide into chunks.
  """
  require(
    not chunk or seq_len % chunk == 0, f"data.seq_len={seq_len} is not divisible by method.capacity_chunk={chunk}"
  )
  if capacity >= 1:
    return seq_len  # whatever it is a multiple of
  # A third of 255 is 85, whatever floating point makes of it.
  tokens = math.ceil(capacity * chunk - 1e-9) if chunk else math.floor(capacity * seq_len + 1e-9)
  tokens = min(max(round(tokens / multiple), 1) * multiple, chunk or seq_len)
  return tokens * (seq_len // chunk) if chunk else tokens


def check_dials(score_shifts: Sequence[float], capacity_scales: Sequence[float]) -> None:
  """Raises ConfigError for sub-models that cannot be: so much added to the scores, so much of the capacity."""
  require(
    len({*score_shifts, 0.0}) == len(score_shifts) + 1 and all(map(math.isfinite, score_shifts)),
    f"method.score_shifts={score_shifts} must be finite and differ from each other and from 0, the full model's",
  )
  require(
    len(set(capacity_scales)) == len(capacity_scales) and all(0 < scale <= 1 for scale in capacity_scales),
    f"method.capacity_scales={capacity_scales} must differ from each other and lie in (0, 1]",
  )


def top(scores: jax.Array, tokens: int, chunks: int = 1) -> jax.Array:
  """Positions of the highest scores [b, n] of each row, `tokens` in all, in increasing order; int32 [b, tokens].

  With chunks, each of the equal pieces of a row gives an equal number. Of equal scores the first wins. By sorting, and
  not `lax.top_k`, whose operand the partitioner gathers from all devices.
  """
  rows, length = scores.shape
  order = jnp.argsort(-scores.reshape(rows, chunks, -1), axis=-1, stable=True)[..., : tokens // chunks]
  chosen = jnp.sort(order, axis=-1) + (jnp.arange(chunks) * (length // chunks))[None, :, None]
  return chosen.reshape(rows, tokens)


def first(keep: jax.Array, tokens: int) -> jax.Array:
  """Positions of the first `tokens` that are kept, filled up with others where there are fewer; int32 [b, tokens]."""
  return jnp.sort(jnp.argsort(~keep, axis=-1, stable=True)[:, :tokens], axis=-1)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Rows' entries at increasing positions: [b, n, ...] and [b, c] -> [b, c, ...]."""
  flags = dict(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
  return jax.vmap(lambda row, i: row.at[i].get(**flags))(x, index)


def put(x: jax.Array, index: jax.Array, entries: jax.Array) -> jax.Array:
  """x [b, n, ...] with each row's entries [b, c, ...] at increasing positions [b, c]."""
  flags = dict(indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds")
  return jax.vmap(lambda row, i, e: row.at[i].set(e, **flags))(x, index, entries)


def at(index: jax.Array, length: int) -> jax.Array:
  """Booleans [b, length] that are true at the positions [b, c]."""
  return put(jnp.zeros((index.shape[0], length), bool), index, jnp.ones(index.shape, bool))


class Tokens(NamedTuple):
  """Some tokens of each row, in order: where they are, whatever their places among those that were gathered.

  Attributes:
    index: their positions in the row, int32 [b, n].
    segment_ids: of packed documents, int32 [b, n]; 0 is padding.
    sin, cos: rotary table at their positions in their documents, float32 [b, n, h / 2].
  """

  index: jax.Array
  segment_ids: jax.Array
  sin: jax.Array
  cos: jax.Array

  @property
  def real(self) -> jax.Array:
    """Bool [b, n]: no padding."""
    return self.segment_ids > 0

  def take(self, index: jax.Array) -> "Tokens":
    return Tokens(*(take(x, index) for x in self))


def tokens_of(batch: dict[str, jax.Array], context: Context) -> Tokens:
  """All tokens of a batch."""
  segments = batch["segment_ids"]
  index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
  return Tokens(index, segments, context.sin, context.cos)


def visible(queries: Tokens, keys: Tokens, keep: jax.Array | None = None) -> jax.Array:
  """Whether each query may see each key, bool [b, 1, t, s]: earlier, of its own document, and kept (or itself)."""
  before = keys.index[:, None, :] <= queries.index[:, :, None]
  same = keys.segment_ids[:, None, :] == queries.segment_ids[:, :, None]
  if keep is not None:
    same &= keep[:, None, :] | (keys.index[:, None, :] == queries.index[:, :, None])
  return (before & same)[:, None]


def within_budget(
  want: jax.Array, positions: jax.Array, share: float | jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Of the tokens that want to pass, those that leave the passed ones at most ceil(share * tokens so far), causally.

  Args:
    want: bool [b, t].
    positions: of each token in its document, int32 [b, t]; the count begins anew where it is 0.
    share: of a document's tokens that may pass; 1 or more lets all pass.
    count: passed before the first of these tokens, int32 [b].

  Returns:
    bool [b, t], and the count after the last of these tokens.
  """

  def token(count, wanted_and_position):
    wanted, position = wanted_and_position
    count = jnp.where(position == 0, 0, count)
    limit = jnp.ceil(jnp.minimum(share, 1.0) * (position + 1) - 1e-4)
    passed = wanted & (count < limit)
    return count + passed, passed

  count, passed = jax.lax.scan(token, count, (want.T, positions.T))
  return passed.T, count


def z_loss(logits: jax.Array, mask: jax.Array) -> SumCount:
  """Squared logsumexp over the last axis of [b, t, e], summed where mask [b, t] is true (Zoph et al. 2022)."""
  return jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * mask), jnp.sum(mask, dtype=jnp.float32)


def balance_loss(shares: Sequence[jax.Array] | jax.Array, probabilities: jax.Array) -> jax.Array:
  """e * sum_i f_i P_i: fraction of tokens and mean probability of each of e choices, both [e] (Fedus et al. 2021)."""
  shares = jnp.asarray(shares)
  return shares.shape[0] * jnp.sum(jax.lax.stop_gradient(shares) * probabilities)

"""How a token is chosen: greedily, or by temperature, then top-k, then top-p. Pure functions of logits and key."""

import dataclasses

import jax
import jax.numpy as jnp

from adaptive.config import require, require_range

_COLDEST = 1e-30  # below, float32 may make it 0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen.

  Attributes:
    temperature: logits are divided by it; 0, and what is hardly more, takes the likeliest token.
    top_k: only the k likeliest tokens (of equal ones the first); 0 means all.
    top_p: of those, only the likeliest that together reach this probability (Holtzman et al. 2020); 1 means all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    require_range(self, "", "temperature top_k", 0)
    if self.temperature < _COLDEST:
      object.__setattr__(self, "temperature", 0.0)
    require(0 < self.top_p <= 1, f"top_p={self.top_p} must be more than 0 and at most 1")


def row_keys(seed: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
  """A key for each row, [b], from the seed, the row's own number and the position of the token to sample: nothing else.

  Args:
    seed: uint32 []. rows, positions: int32 [b].
  """
  key = jax.random.key(seed)
  return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(rows, positions)


def candidates(logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """What may be sampled, of logits [b, v]: logits with -inf for the rest, and their tokens, both [b, c]."""
  # A tiny temperature then makes the likeliest 0 and the others -inf, where the quotient of all could be inf.
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
  size = logits.shape[-1]
  if sampling.top_k in (0, size) and sampling.top_p == 1:
    return logits, jnp.broadcast_to(jnp.arange(size)[None], logits.shape)
  logits, tokens = jax.lax.top_k(logits, min(sampling.top_k or size, size))
  probs = jax.nn.softmax(logits, axis=-1)
  before = jnp.cumsum(probs, axis=-1) - probs
  reached = (before >= sampling.top_p) & (sampling.top_p < 1)  # a sum of many may be 1 before the last
  return jnp.where(reached.at[:, 0].set(False), -jnp.inf, logits), tokens


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """A token for each row, int32 [b], and its log-probability, float32 [b], given logits [b, v] and keys [b].

  The log-probability is the model's own: before temperature, top-k and top-p.
  """
  if sampling.temperature == 0:
    chosen = jnp.argmax(logits, axis=-1)
  else:
    allowed, tokens = candidates(logits, sampling)
    place = jax.vmap(jax.random.categorical)(keys, allowed)
    chosen = jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0]
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), chosen[:, None], axis=1)[:, 0]
  return chosen.astype(jnp.int32), log_probs


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """What `sample` draws from, [b, v]: probabilities after temperature, top-k and top-p; the temperature is not 0."""
  allowed, tokens = candidates(logits, sampling)
  place = jax.vmap(lambda row, at, values: row.at[at].set(values))
  return place(jnp.zeros_like(logits), tokens, jax.nn.softmax(allowed, axis=-1))

"""How sure a model is of a token at an exit: pure functions of what the exit sees, larger is surer.

Each turns arrays of any leading axes into float32 of those axes; nothing is taken over rows or positions, so a token's
signal does not depend on its batch mates. A token leaves where its signal is strictly above a threshold: no signal but
`patience` exceeds 1, so a threshold of 1 lets none leave, even where a softmax rounds to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.depth import chance


class Seen(NamedTuple):
  """What is known of a token at an exit.

  Attributes:
    logits: float32 [..., v] at this exit; None for a signal that reads none. previous_logits: at the exit before; None
      at the first.
    x, previous_x: residual stream [..., d] here and one exit (at the first: all its layers) earlier.
    positions: of the tokens in their documents, int32 [...].
    memory: what the signal remembers of the exits before (`Signal.remember`), float32 [...]; 0 at the first.
  """

  logits: jax.Array | None
  previous_logits: jax.Array | None
  x: jax.Array
  previous_x: jax.Array
  positions: jax.Array
  memory: jax.Array


def _nothing(value: jax.Array, memory: jax.Array) -> jax.Array:
  return memory


class Signal(NamedTuple):
  """What says how sure a model is.

  Attributes:
    value: a function of what is seen at an exit.
    reads_logits: whether it reads them: they cost a head at every exit that a token passes.
    remember: (value, memory) -> memory at the next exit.
    averages: what the head reads of a token that leaves is not its stream but a mean of its streams at all exits so
      far, each weighed by what the memory grew by there, the last by what was missing to 1 (adaptive computation time).
  """

  value: Callable[[Seen], jax.Array]
  reads_logits: bool
  remember: Callable[[jax.Array, jax.Array], jax.Array] = _nothing
  averages: bool = False


def max_probability(seen: Seen) -> jax.Array:
  """Probability of the likeliest token (CALM's softmax response in its simplest form; EE-LLM)."""
  return jnp.exp(jnp.max(seen.logits, axis=-1) - jax.nn.logsumexp(seen.logits, axis=-1))


def margin(seen: Seen) -> jax.Array:
  """Difference of the two largest probabilities (CALM, Section 3.5)."""
  top = jax.lax.top_k(jax.nn.softmax(seen.logits, axis=-1), 2)[0]
  return top[..., 0] - top[..., 1]


def entropy(seen: Seen) -> jax.Array:
  """1 - H / ln v, where H is the entropy of the prediction (BranchyNet leaves where H is small)."""
  logs = jax.nn.log_softmax(seen.logits, axis=-1)
  return 1 + jnp.sum(jnp.exp(logs) * logs, axis=-1) / jnp.log(float(seen.logits.shape[-1]))


def stability(seen: Seen) -> jax.Array:
  """exp(-KL) of this exit's prediction to the one before (recurrent depth leaves where the KL is small).

  The KL is of the previous to the present distribution. Zero at the first exit, which has none before it.
  """
  if seen.previous_logits is None:
    return jnp.zeros(seen.x.shape[:-1])
  before, now = (jax.nn.log_softmax(logits, axis=-1) for logits in (seen.previous_logits, seen.logits))
  return jnp.exp(-jnp.maximum(jnp.sum(jnp.exp(before) * (before - now), axis=-1), 0.0))


def cosine(seen: Seen) -> jax.Array:
  """Cosine of the residual stream at two exits, of each token by itself (CALM's hidden-state saturation; MuE)."""
  x, before = seen.x.astype(jnp.float32), seen.previous_x.astype(jnp.float32)
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(before, axis=-1)
  return jnp.minimum(jnp.sum(x * before, axis=-1) / jnp.maximum(norms, 1e-30), 1.0)


def saturation(seen: Seen) -> jax.Array:
  """1 - |x - before| / |x|: how little the layers since the last exit have moved the residual stream."""
  x, before = seen.x.astype(jnp.float32), seen.previous_x.astype(jnp.float32)
  return 1 - jnp.linalg.norm(x - before, axis=-1) / jnp.maximum(jnp.linalg.norm(x, axis=-1), 1e-30)


def patience(seen: Seen) -> jax.Array:
  """How many exits before this one, in a row, have predicted its token (PABEE): a whole number, not a share."""
  if seen.previous_logits is None:
    return jnp.zeros(seen.x.shape[:-1])
  same = jnp.argmax(seen.logits, axis=-1) == jnp.argmax(seen.previous_logits, axis=-1)
  return jnp.where(same, seen.memory + 1, 0.0)


def random(seen: Seen) -> jax.Array:
  """Uniform noise, the same for the same token and position: the baseline that no signal may lose to.

  A threshold of 1 - p at an exit lets a share p of those there leave, whatever they are. At the first exit it is of the
  embedding, which is the stream before it; from there each exit's noise is a function of the one before.
  """
  if seen.previous_logits is None:
    return chance.noise(chance.places(seen.previous_x, seen.positions), 0)
  return chance.noise(chance.as_places(seen.memory), seen.positions)


SIGNALS = {
  "max_probability": Signal(max_probability, True),
  "margin": Signal(margin, True),
  "entropy": Signal(entropy, True),
  "stability": Signal(stability, True),
  "patience": Signal(patience, True, lambda value, memory: value),
  "cosine": Signal(cosine, False),
  "saturation": Signal(saturation, False),
  "random": Signal(random, False, lambda value, memory: value),
}

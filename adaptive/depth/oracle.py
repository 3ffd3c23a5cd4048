"""The oracle of early exit: each token leaves at the first exit whose likeliest token is the full model's.

With the keys of the full model (CALM, Schuster et al., arXiv 2207.07061, Section 3.2: `oracle` of its decoding), so
that the output is the full model's, token for token: no rule that keeps the output leaves earlier.
"""

import jax
import jax.numpy as jnp

from adaptive.backbone.transformer import Batch, Params
from adaptive.depth.climb import streams
from adaptive.depth.exits import Exits
from adaptive.losses import SumCount


def exit_of(tops: jax.Array) -> jax.Array:
  """Likeliest tokens at every exit, int [e, ...] -> the first exit that says what the last one says, int32 [...]."""
  return jnp.argmax(tops == tops[-1:], axis=0).astype(jnp.int32)


def layers(exits: Exits, params: Params, batch: Batch) -> SumCount:
  """Layers that the oracle's tokens run, summed over a batch, and the number of tokens.

  Of all tokens, those of prompts too, as the layers that a rule is measured to run are.
  """
  hidden = streams(exits, params, batch)
  tops = jnp.stack([jnp.argmax(exits.head(params, which, x), axis=-1) for which, x in enumerate(hidden)])
  depth = jnp.asarray(exits.depths, jnp.float32)[exit_of(tops)]
  real = batch["segment_ids"] > 0
  return jnp.sum(depth * real), jnp.sum(real, dtype=jnp.float32)

"""Decisions by chance: the baseline that every signal and every router has to beat at its own rate.

Noise is a function of a token and its position, so it differs between rows and batches, a later token changes none of
it, and decoding has the same.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.losses import SumCount


def noise(places: jax.Array, salt: jax.Array | int) -> jax.Array:
  """Uniform in 0..1, float32 in the shape of `places`, int32 of any kind: a function of each of them and of a salt."""
  key = lambda place, salt: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), place), salt)
  draw = jax.vmap(lambda place, salt: jax.random.uniform(key(place, salt)))
  salt = jnp.broadcast_to(salt, places.shape).astype(jnp.int32)
  return draw(places.reshape(-1), salt.reshape(-1)).reshape(places.shape)


def places(x: jax.Array, positions: jax.Array) -> jax.Array:
  """A number for every token, int32 [...]: a hash of its embedding [..., d], bit by bit, and its position [...]."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  factors = np.random.default_rng(0).integers(0, 2**31, x.shape[-1] + 1).astype(np.uint32) * 2 + 1
  # The high half holds all the bits of a bfloat16, and a product carries bits upwards only.
  mixed = jnp.sum((bits ^ (bits >> 16)) * jnp.broadcast_to(factors[:-1], x.shape), axis=-1, dtype=jnp.uint32)
  return as_places(mixed + positions.astype(jnp.uint32) * factors[-1])


def of_prompts(places: jax.Array, prompt: jax.Array) -> jax.Array:
  """A number for every row's prompt, int32 [b], from those of its tokens [b, t], which are of it where `prompt` says.

  Each is scrambled by itself first: of plain sums two prompts with the same tokens in another order would have one.
  """
  x = jax.lax.bitcast_convert_type(places, jnp.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # of MurmurHash3
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return as_places(jnp.sum(jnp.where(prompt, x ^ (x >> 16), 0), axis=1, dtype=jnp.uint32))


def as_places(values: jax.Array) -> jax.Array:
  """Numbers of four bytes each as places for noise, bit by bit."""
  return jax.lax.bitcast_convert_type(values, jnp.int32)


def share(pair: SumCount) -> float:
  """Measured sum over count, 0 where nothing was counted."""
  return float(pair[0]) / max(float(pair[1]), 1.0)

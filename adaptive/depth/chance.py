"""Decisions by chance: the baseline that every signal and every router has to beat at its own rate."""

import jax
import jax.numpy as jnp

from adaptive.losses import SumCount


def noise(places: jax.Array, salt: jax.Array | int) -> jax.Array:
  """Uniform in 0..1, float32 in the shape of `places`, int32: a function of each of them and of a salt."""
  key = lambda place, salt: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), place), salt)
  draw = jax.vmap(lambda place, salt: jax.random.uniform(key(place, salt)))
  salt = jnp.broadcast_to(salt, places.shape).astype(jnp.int32)
  return draw(places.reshape(-1), salt.reshape(-1)).reshape(places.shape)


def everywhere(like: jax.Array) -> jax.Array:
  """A number for every token of a batch, in the shape of [b, t]: noise that differs between rows, too."""
  return jnp.arange(like.size, dtype=jnp.int32).reshape(like.shape)


def share(pair: SumCount) -> float:
  """Measured sum over count, 0 where nothing was counted."""
  return float(pair[0]) / max(float(pair[1]), 1.0)

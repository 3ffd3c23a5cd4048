"""RMSNorm, SwiGLU feed-forward and embedding, as Linen shells that declare parameters with logical axis names.

Einsum letters: b batch, t position, d d_model, m feed-forward group, f feed-forward channel, v vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.config import ModelConfig
from adaptive.sharding import constrain


def param(module: nn.Module, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
  """Declares a parameter stored as `param_dtype`, returned in `dtype`; `axes` are its logical axis names."""
  config: ModelConfig = module.config
  value = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(config.param_dtype))
  return jnp.asarray(value, config.dtype)


def residual_init(config: ModelConfig):
  """Initialiser of matrices that write to the residual stream: 2 * num_layers of them add up there."""
  return nn.initializers.normal(config.init_std / (2 * config.num_layers) ** 0.5)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019); returns x's dtype."""
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
  return (x32 * inverse * scale).astype(x.dtype)


def project_out(hidden: jax.Array, weight: jax.Array, flat: bool) -> jax.Array:
  """Hidden [b, t, *c] times weight [*c, d] -> [b, t, d].

  Args:
    flat: whether as one contracted axis: with several, a step of decoding copies the weight into another order. With
      one, a sharded training step reduces some gradients on all devices that it could reduce and scatter.
  """
  if flat:
    return hidden.reshape(*hidden.shape[:2], -1) @ weight.reshape(-1, weight.shape[-1])
  return jnp.tensordot(hidden, weight, axes=weight.ndim - 1)


class RMSNorm(nn.Module):
  """RMSNorm over the last axis, [..., d] -> [..., d]."""

  config: ModelConfig
  axis: str = "embed"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = param(self, "scale", nn.initializers.ones, x.shape[-1:], (self.axis,))
    return rms_norm(x, scale, self.config.norm_eps)


class FeedForward(nn.Module):
  """SwiGLU (Shazeer 2020): (silu(x gate) * (x up)) down, [b, t, d] -> [b, t, d].

  Gate and up are separate arrays and the hidden axis is [ff_groups, d_ff / ff_groups], so that a narrower network is a
  prefix of the last axis of both, and the first axis can be sharded.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, decoding: bool = False) -> jax.Array:
    c = self.config
    shape = (c.d_model, c.ff_groups, c.d_ff // c.ff_groups)
    init, axes = nn.initializers.normal(c.init_std), ("embed", "mlp_groups", "mlp")
    gate = param(self, "gate", init, shape, axes)
    up = param(self, "up", init, shape, axes)
    down = param(self, "down", residual_init(c), shape[1:] + shape[:1], ("mlp_groups", "mlp", "embed"))
    hidden = nn.silu(jnp.einsum("btd,dmf->btmf", x, gate)) * jnp.einsum("btd,dmf->btmf", x, up)
    return project_out(hidden, down, flat=decoding)


class Embedding(nn.Module):
  """Token embedding and output head; one table when `tied_embeddings`."""

  config: ModelConfig

  def setup(self):
    c = self.config
    init = nn.initializers.normal(c.init_std)
    self.table = param(self, "table", init, (c.vocab_size, c.d_model), ("vocab", "embed"))
    if not c.tied_embeddings:
      self.head = param(self, "head", init, (c.d_model, c.vocab_size), ("embed", "vocab"))

  def encode(self, tokens: jax.Array) -> jax.Array:
    """[b, t] ids -> [b, t, d]."""
    # Gather the fsdp shards of the rows first: the partitioner would otherwise replicate the looked-up activations.
    return constrain(self.table, "vocab", None)[tokens]

  def decode(self, x: jax.Array) -> jax.Array:
    """[b, t, d] -> float32 logits [b, t, v]."""
    if self.config.tied_embeddings:
      return jnp.einsum("btd,vd->btv", x, self.table, preferred_element_type=jnp.float32)
    return jnp.einsum("btd,dv->btv", x, self.head, preferred_element_type=jnp.float32)

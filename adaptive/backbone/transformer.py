"""The decoder-only transformer: embed, scanned pre-norm blocks, final norm, head.

A batch is a dict of int32 [b, t] arrays: `inputs`, `segment_ids` (0 is padding) and `positions`, as
`adaptive.data.packing` makes them. `Block` also runs alone on one layer's parameters, with any (smaller) config that
fits them: that is how `adaptive.executors` runs sub-models, so this file needs to know nothing of them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.attention import Attention, Context, LayerCache, rope_table, segment_mask
from adaptive.backbone.layers import Embedding, FeedForward, RMSNorm
from adaptive.config import ModelConfig
from adaptive.sharding import constrain

Batch = dict[str, jax.Array]
Params = Any

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nn.Module):
  """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: ModelConfig

  def setup(self):
    self.attention_norm, self.attention = RMSNorm(self.config), Attention(self.config)
    self.mlp_norm, self.mlp = RMSNorm(self.config), FeedForward(self.config)

  def __call__(self, x: jax.Array, context: Context, cache: LayerCache | None = None):
    """[b, t, d] -> ([b, t, d], cache)."""
    attended, cache = self.attention(self.attention_norm(x), context, cache)
    x = constrain(x + attended, "batch", "length", None)
    x = x + self.mlp(self.mlp_norm(x), decoding=cache is not None)
    return constrain(x, "batch", "length", None), cache

  def key_value(self, x: jax.Array, context: Context) -> LayerCache:
    """Only what other tokens attend to: [b, t, d] -> keys and values [b, k, t, h]."""
    pair = self.attention.key_value(self.attention_norm(x), context)
    return LayerCache(*(jnp.swapaxes(part, 1, 2) for part in pair))


class Transformer(nn.Module):
  """tokens -> logits. Parameters: `embedding`, `layers` (every leaf stacked on axis 0), `final_norm`."""

  config: ModelConfig

  @property
  def stacked(self) -> int:
    """How many layers `layers` holds; fewer than run, where a subclass runs some of them several times."""
    return self.config.num_layers

  def setup(self):
    c = self.config
    one_iteration = c.unroll(self.stacked) >= self.stacked  # is no loop, so XLA could merge what is computed twice
    remat = nn.remat(Block, prevent_cse=one_iteration, policy=REMAT_POLICIES.get(c.remat))
    block = Block if c.remat == "none" else remat
    self.embedding = Embedding(c)
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, 0),
      length=self.stacked,
      unroll=c.unroll(self.stacked),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c)
    self.final_norm = RMSNorm(c)

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the token after each position; packed documents do not see each other."""
    x, context = self.embed(batch)
    x, _ = self.layers(x, context, None)
    return self.head(x)

  def embed(self, batch: Batch) -> tuple[jax.Array, Context]:
    """Embedded tokens [b, t, d] and the context that every layer needs."""
    sin, cos = rope_table(self.config, batch["positions"])
    x = constrain(self.embedding.encode(batch["inputs"]), "batch", "length", None)
    return x, Context(sin, cos, segment_mask(batch["segment_ids"]))

  def head(self, x: jax.Array) -> jax.Array:
    """Final norm and output head: residual stream [b, t, d] -> float32 logits [b, t, v]."""
    return constrain(self.embedding.decode(self.final_norm(x)), "batch", "length", "vocab")


def dummy_batch(batch_size: int = 1, length: int = 2) -> Batch:
  """A batch of zeros to initialise a model with."""
  zeros = jnp.zeros((batch_size, length), jnp.int32)
  return {"inputs": zeros, "segment_ids": zeros + 1, "positions": zeros}


def init_params(model: nn.Module, key: jax.Array) -> Params:
  """Parameters of a model called on a batch, boxed with their logical axis names (`flax.linen.unbox` removes them)."""
  return model.init(key, dummy_batch())["params"]

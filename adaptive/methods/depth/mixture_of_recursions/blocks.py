"""One recursion of the shared block under each key/value rule (Section 2.3 of the paper), on any tokens of a row."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive import recursion
from adaptive.backbone.attention import Context, LayerCache
from adaptive.config import ModelConfig
from adaptive.methods.depth.mixture_of_recursions.config import Config, KeyValues
from adaptive.routing import Tokens, visible


class Block(NamedTuple):
  """The shared block as the recursions of one forward pass run it.

  Attributes:
    model, kv_cache: settings. layers: its stacked parameters [j, ...]. everyone: all tokens of the batch.
    remat: whether the backward pass computes each recursion once more.
  """

  model: ModelConfig
  kv_cache: KeyValues
  layers: recursion.Params
  everyone: Tokens
  remat: bool = False

  def __call__(
    self,
    which: int,
    x: jax.Array,
    tokens: Tokens,
    base: LayerCache | None,
    keep: jax.Array | None = None,
  ) -> tuple[jax.Array, LayerCache | None]:
    """Recursion `which` (from 0) on some tokens.

    Args:
      x: their residual stream, [b, n, d].
      base: keys and values of the first recursion, stacked [j, b, k, s, h]; None before it.
      keep: bool [b, n]: which of the tokens the recursion is for; the others' results mean nothing. None: all.

    Returns:
      The block's output [b, n, d], and the keys and values of the first recursion.
    """
    if self.remat:  # with barriers, for the recursions are unrolled and XLA could merge what is computed twice
      return jax.checkpoint(functools.partial(self._replace(remat=False), which))(x, tokens, base, keep)
    if self.kv_cache == "recursion_wise":
      return self._run(x, tokens, visible(tokens, tokens, keep))[0], None
    if which == 0:
      return self._run(x, tokens, visible(tokens, tokens, keep), jnp.int32(0), self._empty(x))
    slots = None
    if self.kv_cache == "hybrid":
      length = self.everyone.index.shape[1]
      slots = tokens.index if keep is None else jnp.where(keep, tokens.index, length)
    return self._run(x, tokens, visible(tokens, self.everyone), slots, base)[0], base

  def _run(self, x, tokens: Tokens, mask, slots=None, cache=None):
    return recursion.run_layers(self.model, self.layers, x, Context(tokens.sin, tokens.cos, mask, slots), cache)

  def _empty(self, x: jax.Array) -> LayerCache:
    number = jax.tree.leaves(self.layers)[0].shape[0]
    shape = (number, x.shape[0], self.model.num_kv_heads, x.shape[1], self.model.head_size)
    return LayerCache(jnp.zeros(shape, x.dtype), jnp.zeros(shape, x.dtype))


def gate(config: Config, scores: jax.Array) -> jax.Array:
  """alpha f(s) of router scores [b, n, e], float32; a softmax is over e."""
  if config.router == "random":
    return config.alpha * scores
  functions = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "softmax": jax.nn.softmax}
  return config.alpha * functions[config.gate](scores)

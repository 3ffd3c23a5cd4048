"""Dr.LLM's routers: windows of the prompt's stream, a small network for each layer, and the dial (Section 3.1)."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive.backbone.layers import param
from adaptive.config import ModelConfig

Params = dict[str, jax.Array]
Split = Literal["even", "paper"]
Start = Literal["execute", "xavier"]

CLASSES = 3  # skip, execute, repeat: how often a layer runs
_EXECUTE = 2.0  # bias of a fresh router that executes everything: probability 0.79


class Routers(nn.Module):
  """Declares a router of two linear layers for each of several layers.

  `hidden` [l, d, h], `hidden_bias` [l, h], `weight` [l, h, 3], `bias` [l, 3].
  """

  config: ModelConfig
  width: int
  start: Start

  @nn.compact
  def __call__(self) -> None:
    layers, d = self.config.num_layers, self.config.d_model
    xavier = nn.initializers.xavier_uniform(in_axis=1, out_axis=2, batch_axis=0)
    zeros, execute = nn.initializers.zeros, lambda key, shape, dtype: jnp.zeros(shape, dtype).at[:, 1].set(_EXECUTE)
    fresh = self.start == "execute"
    declare = lambda name, init, *shape: param(self, name, init, shape, (None,) * len(shape))
    declare("hidden", xavier, layers, d, self.width)
    declare("hidden_bias", zeros, layers, self.width)
    declare("weight", zeros if fresh else xavier, layers, self.width, CLASSES)
    declare("bias", execute if fresh else zeros, layers, CLASSES)


class Windows(NamedTuple):
  """How each row's prompt is cut.

  Attributes:
    weights: float32 [b, w, t]: of a token in the mean of a window; zeros in windows that a short prompt lacks.
    share: float32 [b, w]: of a window's logits in their mean.
  """

  weights: jax.Array
  share: jax.Array


def windows(prompt: jax.Array, number: int, split: Split) -> Windows:
  """Cuts prompts, bool [b, t] from each row's first token on, into W = min(number, T) windows of T tokens.

  `paper`: each of T // W tokens, from the first on, so that up to W - 1 of the newest are in none. `even`: token i is
  in window i W // T, so that every token is in one.
  """
  total = jnp.sum(prompt, axis=1, keepdims=True)
  used, place = jnp.clip(total, 1, number), jnp.arange(prompt.shape[1])[None]
  which = place // jnp.maximum(total // used, 1) if split == "paper" else place * used // jnp.maximum(total, 1)
  which = jnp.where(prompt & (which < used), which, number)
  inside = jax.nn.one_hot(which, number, axis=1)
  weights = inside / jnp.maximum(jnp.sum(inside, axis=2, keepdims=True), 1.0)
  return Windows(weights, (jnp.arange(number)[None] < used) / used.astype(jnp.float32))


def logits(router: Params, streams: jax.Array) -> jax.Array:
  """One router on means of the residual stream, float32 [..., d] -> [..., 3]."""
  weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), router)
  add = lambda x, bias: x + jnp.expand_dims(bias, range(x.ndim - 1))
  hidden = jax.nn.gelu(add(streams @ weights["hidden"], weights["hidden_bias"]), approximate=True)
  return add(hidden @ weights["weight"], weights["bias"])


def prompt_logits(router: Params, x: jax.Array, cut: Windows) -> jax.Array:
  """Mean of the logits of the prompt's windows, from the stream that enters a layer: [b, t, d] -> float32 [b, 3]."""
  means = jnp.einsum("bwt,btd->bwd", cut.weights, x.astype(jnp.float32))
  return jnp.einsum("bwc,bw->bc", logits(router, means), cut.share)


def dial(budget: float) -> tuple[float, float, float, float]:
  """Weights of (skip, the router's own, execute, repeat) at a budget in -1 .. 1.

  They go linearly from all-skip at -1 over the router at -0.5 and execute at 0.5 to all-repeat at 1.
  """
  at = (-1.0, -0.5, 0.5, 1.0)
  found = [0.0] * len(at)
  for i, (low, high) in enumerate(itertools.pairwise(at)):
    if low <= budget <= high:
      share = (budget - low) / (high - low)
      found[i], found[i + 1] = 1 - share, share
  return tuple(found)


def decide(scores: jax.Array, weights: jax.Array | Sequence[float]) -> jax.Array:
  """How often a layer runs, int32 [...]: the likeliest class, from logits [..., 3], at a position of the dial.

  Where two are equally likely a layer is executed rather than repeated, and repeated rather than skipped.
  """
  weights = jnp.asarray(weights, jnp.float32)
  fixed = weights[0], weights[2], weights[3]
  skip, execute, repeat = jnp.unstack(weights[1] * jax.nn.softmax(scores, axis=-1), axis=-1)
  skip, execute, repeat = skip + fixed[0], execute + fixed[1], repeat + fixed[2]
  skip, repeat = skip > jnp.maximum(execute, repeat), repeat > execute
  return jnp.where(skip, 0, jnp.where(repeat, 2, 1)).astype(jnp.int32)


def router_flops(d_model: int, width: int) -> float:
  """Forward FLOPs of one router on one window's mean."""
  return 2.0 * (d_model * width + width * CLASSES)


def router_params(config: ModelConfig, width: int) -> int:
  """Parameters of all layers' routers."""
  return config.num_layers * (config.d_model * width + width + width * CLASSES + CLASSES)

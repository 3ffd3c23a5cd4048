"""A block of layers that runs several times: which layer each unrolled layer is, where its weights come from, the loop.

Schemes and initialisations are those of Mixture-of-Recursions (Bae et al. 2025, arXiv 2507.10524: Table 5, Section 5.1
and Appendix). A recursive model has the backbone's parameters, with fewer layers stacked in `layers`: the first one (of
a `middle` scheme), the `block_size` layers of the shared block, the last one (of a `middle` scheme).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.attention import Context, LayerCache
from adaptive.backbone.transformer import REMAT_POLICIES, Block
from adaptive.config import ModelConfig, require

Params = Any
Scheme = Literal["cycle", "sequence", "middle_cycle", "middle_sequence"]
Initialisation = Literal["stepwise", "average", "lower", "upper", "random"]


@dataclasses.dataclass(frozen=True)
class Sharing:
  """How the `num_layers` unrolled layers share weights.

  Attributes:
    scheme: `cycle` runs the block's layers in turn and begins again; `sequence` repeats each layer before the next. The
      `middle` schemes leave the first and the last layer out of it, with weights of their own.
    num_layers: unrolled depth (L). num_recursions: how often each layer of the block runs (R).

  Raises:
    ConfigError: the layers do not divide; the nearest numbers that do are named.
  """

  scheme: Scheme
  num_layers: int
  num_recursions: int

  def __post_init__(self):
    repeats, ends = self.num_recursions, 2 * self.middle
    require(repeats > 0, f"method.num_recursions={repeats} must be at least 1")
    below = ends + max(self.num_layers - ends, 0) // repeats * repeats
    near = " and ".join(str(n) for n in (below, below + repeats) if n > ends)
    shape = f"1 + {repeats} x J + 1" if self.middle else f"{repeats} x J"
    require(
      below == self.num_layers and self.num_layers > ends,
      f"model.num_layers={self.num_layers} is not {shape} for method.sharing={self.scheme!r}; nearest: {near}",
    )

  @property
  def middle(self) -> bool:
    return self.scheme.startswith("middle")

  @property
  def block_size(self) -> int:
    """Layers of the shared block (J)."""
    return (self.num_layers - 2 * self.middle) // self.num_recursions

  @property
  def unique(self) -> int:
    """Layers with weights of their own."""
    return self.block_size + 2 * self.middle

  @property
  def layer_path(self) -> tuple[int, ...]:
    """The unique layer of each unrolled layer."""
    order = np.arange(self.num_recursions * self.block_size)
    inner = order % self.block_size if self.scheme.endswith("cycle") else order // self.num_recursions
    if self.middle:
      inner = [0, *(1 + inner), self.unique - 1]
    return tuple(int(layer) for layer in inner)


@dataclasses.dataclass(frozen=True)
class Looped:
  """Layers with weights of their own, then a shared block that runs several times in turn, and nothing after it.

  Attributes:
    prelude: layers before the loop. block_size: layers of the shared block. num_recursions: how often it runs.
  """

  prelude: int
  block_size: int
  num_recursions: int

  @property
  def unique(self) -> int:
    """Layers with weights of their own."""
    return self.prelude + self.block_size

  @property
  def layer_path(self) -> tuple[int, ...]:
    """The unique layer of each unrolled layer."""
    return (*range(self.prelude), *tuple(range(self.prelude, self.unique)) * self.num_recursions)

  @property
  def depths(self) -> tuple[int, ...]:
    """Unrolled layers that have run after each pass."""
    return tuple(self.prelude + (1 + r) * self.block_size for r in range(self.num_recursions))

  def passes(self, depth: int) -> int:
    """Made after so many unrolled layers."""
    return (depth - self.prelude) // self.block_size

  def tie(self, layers: Params, how: "Initialisation", seed: int = 0) -> Params:
    """As `tie` below: the first layers stay as they are."""
    sharing = Sharing("cycle", self.num_recursions * self.block_size, self.num_recursions)
    shared = tie(sharing, jax.tree.map(lambda leaf: leaf[self.prelude :], layers), how, seed)
    return jax.tree.map(lambda leaf, rest: jnp.concatenate([leaf[: self.prelude], rest]), layers, shared)


def sources(sharing: Sharing, how: Initialisation, seed: int = 0) -> tuple[tuple[int, ...], ...]:
  """For each unique layer, the layers of an unshared model of the same depth whose mean initialises it."""
  depth, size, ends = sharing.num_layers, sharing.block_size, int(sharing.middle)
  if how == "average":
    path = np.array(sharing.layer_path)
    return tuple(tuple(np.flatnonzero(path == layer).tolist()) for layer in range(sharing.unique))
  match how:
    case "stepwise":
      inner = np.round(np.linspace(ends, depth - 1 - ends, size)).astype(int)
    case "lower":
      inner = ends + np.arange(size)
    case "upper":
      inner = depth - ends - size + np.arange(size)
    case "random":
      inner = np.sort(np.random.default_rng(seed).choice(np.arange(ends, depth - ends), size, replace=False))
  picked = [0, *inner, depth - 1] if sharing.middle else inner
  return tuple((int(layer),) for layer in picked)


def tie(sharing: Sharing, layers: Params, how: Initialisation, seed: int = 0) -> Params:
  """Stacked layers [L, ...] of an unshared model -> those of the recursive one, [unique, ...]."""
  picked = sources(sharing, how, seed)
  mean = lambda leaf, among: sum(leaf[layer] for layer in among) / len(among)
  return jax.tree.map(lambda leaf: jnp.stack([mean(leaf, among) for among in picked]).astype(leaf.dtype), layers)


def split(sharing: Sharing, layers: Params) -> tuple[Params, Params, Params]:
  """Stacked unique layers -> those that run before the loop, its block, and those after it."""
  ends = int(sharing.middle)
  cut = lambda start, stop: jax.tree.map(lambda leaf: leaf[start:stop], layers)
  return cut(0, ends), cut(ends, sharing.unique - ends), cut(sharing.unique - ends, sharing.unique)


def run_layers(
  config: ModelConfig, layers: Params, x: jax.Array, context: Context, caches: LayerCache | None = None
) -> tuple[jax.Array, LayerCache | None]:
  """Stacked layers one after the other, [b, t, d] -> [b, t, d]; caches are stacked as the layers are."""
  block, number = Block(config, parent=None), jax.tree.leaves(layers)[0].shape[0]  # also from within a module

  def layer(x, weights_and_cache):
    weights, cache = weights_and_cache
    return block.apply({"params": weights}, x, context, cache)

  unroll = config.unroll(number)
  if config.remat != "none":  # outside of a loop, which one iteration is not, XLA could merge what is computed twice
    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=unroll >= number)
  return jax.lax.scan(layer, x, (layers, caches), unroll=unroll) if number else (x, caches)


def run_repeated(
  sharing: Sharing, config: ModelConfig, block: Params, x: jax.Array, context: Context, repeats: int | jax.Array
) -> jax.Array:
  """The shared block for all tokens, each of its layers `repeats` times in the order of the scheme.

  A traced number of repeats computes all of them and keeps the stream as it was after the one asked for.
  """
  together = sharing.scheme.endswith("cycle")
  groups = (
    [block] if together else [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], block) for i in range(sharing.block_size)]
  )
  for layers in groups:
    for recursion in range(repeats if isinstance(repeats, int) else sharing.num_recursions):
      after, _ = run_layers(config, layers, x, context)
      x = after if isinstance(repeats, int) else jnp.where(recursion < repeats, after, x)
  return x

"""Which part of the backbone's parameters a static sub-network holds, and how to cut it out.

A sub-network is a list of layers and two prefix widths: query heads per key/value group, and feed-forward channels.
Units are kept in storage order (unit j is in iff j < size: the nesting of SortedNet's abstract), so a smaller
sub-network's parameters are a subset of a larger one's. head_dim, the attention scale, rotary frequencies and the
key/value heads never change.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from adaptive.config import ModelConfig, require

# Axis, counted from the end, that each width cuts; every other leaf of a layer is whole in every sub-network.
_CUT = {
  "query": ("q_per_kv", -2),
  "query_bias": ("q_per_kv", -2),
  "out": ("q_per_kv", -3),
  "gate": ("d_ff", -1),
  "up": ("d_ff", -1),
  "down": ("d_ff", -2),
}

Params = Any


@dataclasses.dataclass(frozen=True)
class Subnet:
  """A static sub-network of a backbone.

  Attributes:
    layer_path: indices of the parent's layers, in execution order.
    q_per_kv: query heads kept in every key/value group (a prefix of each).
    d_ff: feed-forward channels kept (a prefix of each of the parent's ff_groups).
  """

  layer_path: tuple[int, ...]
  q_per_kv: int
  d_ff: int

  @property
  def widths(self) -> tuple[int, int]:
    return self.q_per_kv, self.d_ff


def prefix(
  config: ModelConfig, depth: int | None = None, q_per_kv: int | None = None, d_ff: int | None = None
) -> Subnet:
  """The first `depth` layers at the given widths; None is the parent's size."""
  depth = config.num_layers if depth is None else depth
  q_per_kv = config.q_per_kv if q_per_kv is None else q_per_kv
  return Subnet(tuple(range(depth)), q_per_kv, config.d_ff if d_ff is None else d_ff)


def validate(config: ModelConfig, subnet: Subnet) -> None:
  """Raises ConfigError when the parent has no such part. Sizes are never rounded."""
  require(bool(subnet.layer_path), "a sub-network needs at least one layer")
  require(
    all(0 <= layer < config.num_layers for layer in subnet.layer_path),
    f"layers {subnet.layer_path} are not all among the model's {config.num_layers}",
  )
  require(
    1 <= subnet.q_per_kv <= config.q_per_kv,
    f"q_per_kv={subnet.q_per_kv} must lie in 1..{config.q_per_kv} (num_heads / num_kv_heads)",
  )
  require(
    1 <= subnet.d_ff <= config.d_ff and subnet.d_ff % config.ff_groups == 0,
    f"d_ff={subnet.d_ff} must be at most {config.d_ff} and a multiple of model.ff_groups={config.ff_groups}",
  )


def config_of(config: ModelConfig, subnet: Subnet) -> ModelConfig:
  """Config of the sub-network as an ordinary dense model."""
  return dataclasses.replace(
    config,
    num_layers=len(subnet.layer_path),
    num_heads=config.num_kv_heads * subnet.q_per_kv,
    head_dim=config.head_size,
    d_ff=subnet.d_ff,
  )


def cut_widths(config: ModelConfig, layers: Params, q_per_kv: int, d_ff: int) -> Params:
  """One layer's parameters, or all layers' stacked, cut to the given widths."""
  sizes = {"q_per_kv": q_per_kv, "d_ff": d_ff // config.ff_groups}

  def cut(path, leaf):
    width, axis = _CUT.get(path[-1].key, (None, 0))
    return leaf if width is None else jax.lax.slice_in_dim(leaf, 0, sizes[width], axis=leaf.ndim + axis)

  return jax.tree_util.tree_map_with_path(cut, layers)


def extract(config: ModelConfig, params: Params, subnet: Subnet) -> Params:
  """Parameters of the sub-network, which `Transformer(config_of(config, subnet))` takes.

  A pure tree operation: under `jax.grad` the parent's other parameters get exact zeros.
  """
  layers = cut_widths(config, params["layers"], *subnet.widths)
  return {**params, "layers": pick(layers, subnet.layer_path)}


def pick(layers: Params, path: Sequence[int]) -> Params:
  """Some of the stacked layers, in the order given; one may be there several times."""
  start, stop = (path[0], path[-1] + 1) if path else (0, 0)
  if tuple(path) == tuple(range(start, stop)):
    return jax.tree.map(lambda leaf: leaf[start:stop], layers)  # a view or a cheap copy; a gather is neither
  return jax.tree.map(lambda leaf: leaf[jax.numpy.asarray(path)], layers)


def mask_layers(config: ModelConfig, layers: Params, active: jax.Array, q_per_kv: jax.Array, d_ff: jax.Array) -> Params:
  """Stacked layers with everything outside the sub-network made silent.

  Zeroing the rows of `out` and `down` that read inactive heads and channels equals zeroing those heads and channels,
  and a layer whose rows are all zero is the identity; so the block needs no masks.

  Args:
    config: the parent's.
    layers: stacked parameters.
    active: whether each layer runs, bool [l].
    q_per_kv, d_ff: widths of each layer, int32 [l]; traced values are welcome.
  """
  group = d_ff // config.ff_groups
  heads = (jax.numpy.arange(config.q_per_kv)[None] < q_per_kv[:, None]) & active[:, None]
  channels = (jax.numpy.arange(config.d_ff // config.ff_groups)[None] < group[:, None]) & active[:, None]
  out, down = layers["attention"]["out"], layers["mlp"]["down"]
  return {
    **layers,
    "attention": {**layers["attention"], "out": out * heads[:, None, :, None, None].astype(out.dtype)},
    "mlp": {**layers["mlp"], "down": down * channels[:, None, :, None].astype(down.dtype)},
  }

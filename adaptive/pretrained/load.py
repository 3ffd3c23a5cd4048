"""A published model's tensors into the arrays of a run, one after the other."""

import functools
import sys
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from adaptive.backbone.transformer import Params
from adaptive.config import ModelConfig, require
from adaptive.pretrained.layout import Index, Layout, leaves, sizes

_MANY = 2**28  # bytes, from which reading shows its progress
_DERIVED = ("rotary_emb.inv_freq",)  # some files hold what follows from the config


class Source(Protocol):
  """Tensors under the names of a Hugging Face file."""

  def names(self) -> Iterable[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def read(self, name: str, index: Index) -> np.ndarray: ...


def check(source: Source, config: ModelConfig, where: str) -> None:
  """Raises ConfigError unless the source has every tensor that the config asks for, in its shape, and no other."""
  size, wanted = sizes(config), {}
  for leaf in leaves(config):
    for i in range(config.num_layers if leaf.stacked else 1):
      wanted[leaf.name.format(i)] = Layout(leaf.pattern, size).raw_shape
  found = {name for name in source.names() if not name.endswith(_DERIVED)}
  if config.tied_embeddings:
    found.discard("lm_head.weight")  # the embedding once more
  for name, shape in wanted.items():
    require(name in found, f"{where} lacks the tensor {name}")
    there = source.shape(name)
    require(there == shape, f"{where}: {name} has the shape {there}, the config wants {shape}")
  spare = sorted(found - wanted.keys())
  require(not spare, f"{where} has tensors that the config does not account for: {', '.join(spare[:3])}")


def load(source: Source, config: ModelConfig, abstract: Params) -> Params:
  """The parameters of a dense model, each where and in what dtype `abstract` says.

  A process reads the parts that its devices hold. On the host there is one layer's tensor at a time, or one that is no
  layer's: layers are put into their stack on the devices.

  Args:
    abstract: tree of `jax.ShapeDtypeStruct` with shardings.
  """
  size, out = sizes(config), {}
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  number = sum(config.num_layers if leaf.stacked else 1 for leaf in leaves(config))
  quiet = total < _MANY or jax.process_index() > 0 or not sys.stderr.isatty()
  with tqdm(total=number, desc="reading", unit="tensor", disable=quiet) as bar:
    for leaf in leaves(config):
      target = functools.reduce(lambda tree, key: tree[key], leaf.path, abstract)
      layout = Layout(leaf.pattern, size)
      if leaf.stacked:
        value = _stack(source, leaf.name, layout, target, bar)
      else:
        value = _one(source, leaf.name, layout, target.dtype, target.sharding)
        bar.update()
      functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf.path[:-1], out)[leaf.path[-1]] = value
  return out


def _one(source: Source, name: str, layout: Layout, dtype, sharding) -> jax.Array:
  def part(index: Index) -> np.ndarray:
    return layout.to_ours(source.read(name, layout.raw_index(index))).astype(dtype, order="C")

  return jax.make_array_from_callback(layout.shape, sharding, part)


def _stack(source: Source, name: str, layout: Layout, target: jax.ShapeDtypeStruct, bar: tqdm) -> jax.Array:
  """Layers on axis 0."""
  whole: NamedSharding = target.sharding
  each = NamedSharding(whole.mesh, PartitionSpec(*whole.spec[1:]))
  stacked = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=whole)()
  put = lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
  put = jax.jit(put, donate_argnums=0, out_shardings=whole)
  for i in range(target.shape[0]):
    # Waits, or the host would read far ahead of the devices.
    stacked = jax.block_until_ready(put(stacked, _one(source, name.format(i), layout, target.dtype, each), i))
    bar.update()
  return stacked

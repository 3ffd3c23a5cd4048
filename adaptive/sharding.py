"""The mesh, the logical-axis rules, and every partition call: the only file that names mesh axes.

Parameters and activations carry logical axis names (`embed`, `mlp`, `batch`, ...); the table below says on which mesh
axis each lies. Axes that a sub-model cuts (`mlp`, `q_per_kv`, `layers`) are never sharded: the feed-forward axis is
stored as [mlp_groups, mlp] and attention as [kv_heads, q_per_kv, head_dim], so a prefix of the cut axis stays on its
device.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive.config import MeshConfig, require

AXES = ("data", "fsdp", "tensor")

RULES = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("kv_heads", "tensor"),
  ("q_per_kv", None),
  ("head_dim", None),
  ("mlp_groups", "tensor"),
  ("mlp", None),
  ("layers", None),
)

PyTree = Any

# The setting that a user would change when an axis does not divide.
_SETS_SIZE = {
  "batch": "batch_size",
  "vocab": "model.vocab_size",
  "embed": "model.d_model",
  "kv_heads": "model.num_kv_heads",
  "mlp_groups": "model.ff_groups",
}


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
  """Devices along (data, fsdp, tensor), with -1 filled in.

  Raises:
    ConfigError: the product cannot be the number of devices.
  """
  sizes = [config.data, config.fsdp, config.tensor]
  require(
    sizes.count(-1) <= 1 and all(s == -1 or s > 0 for s in sizes),
    f"mesh sizes {dict(zip(AXES, sizes))} must be positive, with -1 in one place at most",
  )
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    require(num_devices % known == 0, f"mesh {dict(zip(AXES, sizes))} does not divide {num_devices} devices")
    sizes[sizes.index(-1)] = num_devices // known
  require(
    math.prod(sizes) == num_devices,
    f"mesh {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, there are {num_devices}",
  )
  return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The project's one mesh constructor: automatic axes, on which Linen's partition metadata works.

  Several TPU slices lie along the data axis, outermost: between slices there is only the slow network of the data
  center, and gradients are all that the data axis sends.

  Raises:
    ConfigError: the devices cannot form the mesh.
  """
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(config, len(devices))
  slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
  require(
    shape[0] % slices == 0,
    f"mesh.data={shape[0]} must be a multiple of the {slices} slices: mesh.fsdp and mesh.tensor stay within one",
  )
  # Chips form a torus; an axis of the mesh may need a part of one of its axes, as 4 x 16 does on 8 x 8 chips.
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_divisible(mesh: Mesh, *, batch: int, vocab: int, embed: int, kv_heads: int, mlp_groups: int) -> None:
  """Raises ConfigError when a size cannot be spread over its mesh axes."""
  for axis, size in dict(batch=batch, vocab=vocab, embed=embed, kv_heads=kv_heads, mlp_groups=mlp_groups).items():
    names = dict(RULES)[axis]
    parts = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
    require(
      size % parts == 0, f"{_SETS_SIZE[axis]}={size} is not divisible by the {parts} devices of mesh axes {names}"
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over all data-parallel devices."""
  return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def batch_parts(mesh: Mesh) -> int:
  """Number of pieces that a batch is cut into."""
  return math.prod(mesh.shape[name] for name in dict(RULES)["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """States where an activation lies, by logical axis names; does nothing outside a mesh."""
  return nn.with_logical_constraint(x, axes, rules=RULES)


def split_rows(batch: PyTree, parts: int) -> PyTree:
  """[b, ...] arrays -> [parts, b / parts, ...]; row i goes to part i % parts, so that rows stay on their devices."""
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def state_shardings(abstract: PyTree, mesh: Mesh) -> PyTree:
  """Shardings of a tree of (boxed) abstract arrays, from their logical axis names."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)


def global_batch(rows: PyTree, mesh: Mesh) -> PyTree:
  """This host's rows (numpy, leading axis = its share of the batch) as global device arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), rows)

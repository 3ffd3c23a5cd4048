import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import ConfigError, MeshConfig


@pytest.mark.parametrize(("sizes", "expected"), [
  ((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, -1), (1, 2, 4)), ((2, 2, 2), (2, 2, 2)),
  ((8, -1, 1), (8, 1, 1)),
])  # fmt: skip
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
  assert sharding.mesh_shape(MeshConfig(*sizes), 8) == expected
  assert tuple(sharding.make_mesh(MeshConfig(*sizes)).shape.items()) == tuple(zip(("data", "fsdp", "tensor"), expected))


@pytest.mark.parametrize(("sizes", "message"), [
  ((-1, -1, 1), "-1 in one place at most"),
  ((0, 1, 8), "must be positive"),
  ((-2, 1, 1), "must be positive"),
  ((-1, 3, 1), "does not divide 8 devices"),
  ((2, 2, 1), "needs 4 devices, there are 8"),
  ((4, 2, 2), "needs 16 devices, there are 8"),
])  # fmt: skip
def test_an_impossible_mesh_is_refused_in_one_line(sizes, message):
  with pytest.raises(ConfigError, match=message) as error:
    sharding.mesh_shape(MeshConfig(*sizes), 8)
  assert "\n" not in str(error.value)


class Chip:
  """Of a TPU's device, what ordering devices asks for."""

  platform, device_kind, process_index = "tpu", "TPU v4", 0

  def __init__(self, number: int, slice_index: int):
    self.id, self.slice_index = number, slice_index
    self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0

  def __repr__(self):
    return f"chip {self.id} of slice {self.slice_index}"


# Handed over in an order that mixes the slices, as nothing promises another one.
TWO_SLICES = [Chip(i, i % 8 // 4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]


@pytest.mark.parametrize(("sizes", "shape"), [
  ((-1, 1, 1), (8, 1, 1)), ((2, 4, 1), (2, 4, 1)), ((4, 2, 1), (4, 2, 1)), ((-1, 1, 2), (4, 1, 2)),
])  # fmt: skip
def test_slices_lie_along_the_data_axis_outermost(sizes, shape):
  mesh = sharding.make_mesh(MeshConfig(*sizes), TWO_SLICES)
  assert mesh.devices.shape == shape
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3
  for index, half in enumerate(np.split(mesh.devices, 2)):
    assert {chip.slice_index for chip in half.flat} == {index}
  assert {chip.id for chip in mesh.devices.flat} == set(range(8))


def test_parameters_are_not_spread_over_slices():
  with pytest.raises(ConfigError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
    sharding.make_mesh(MeshConfig(data=1, fsdp=8), TWO_SLICES)


def test_sizes_that_cannot_be_spread_are_refused():
  mesh, sizes = tiny.mesh(2, 2, 2), dict(batch=4, vocab=2, embed=2, kv_heads=2, mlp_groups=2)
  sharding.check_divisible(mesh, **sizes)
  for name, size, setting in (
    ("batch", 6, "batch_size"),
    ("vocab", 3, "model.vocab_size"),
    ("embed", 5, "model.d_model"),
    ("kv_heads", 1, "model.num_kv_heads"),
    ("mlp_groups", 7, "model.ff_groups"),
  ):
    with pytest.raises(ConfigError, match=f"^{setting}={size} is not divisible by the"):
      sharding.check_divisible(mesh, **{**sizes, name: size})


def test_axes_that_a_sub_model_cuts_are_never_sharded():
  rules = dict(sharding.RULES)
  assert [rules[name] for name in ("layers", "q_per_kv", "mlp", "head_dim")] == [None] * 4


def test_parameters_lie_where_the_rules_say():
  config = tiny.model_config()
  where = sharding.state_shardings(tiny.shapes(config), tiny.mesh(2, 2, 2))
  spec = lambda leaf: tuple(leaf.spec)
  layers = where["layers"]
  assert spec(layers["attention"]["query"]) == (None, "fsdp", "tensor", None, None)
  assert spec(layers["mlp"]["down"]) == (None, "tensor", None, "fsdp")
  assert spec(where["embedding"]["table"]) == ("tensor", "fsdp")
  shapes = jax.tree.map(lambda leaf, to: to.shard_shape(leaf.shape), nn.unbox(tiny.shapes(config)), where)
  assert shapes["layers"]["mlp"]["gate"] == (4, 8, 1, 12)


def test_constrain_does_nothing_outside_a_mesh():
  x = jnp.arange(6.0).reshape(2, 3)
  np.testing.assert_array_equal(sharding.constrain(x, "batch", "embed"), x)


def test_constrain_places_an_activation_on_the_mesh():
  mesh = tiny.mesh(2, 2, 2)
  with jax.set_mesh(mesh):
    found = jax.jit(lambda x: sharding.constrain(x, "batch", "length", "vocab"))(jnp.ones((8, 3, 4)))
  assert found.sharding.shard_shape(found.shape) == (2, 3, 2)


def test_split_rows_deals_rows_out_in_turn():
  batch = {"inputs": np.arange(24).reshape(12, 2)}
  parts = sharding.split_rows(batch, 3)["inputs"]
  assert parts.shape == (3, 4, 2)
  for part in range(3):
    np.testing.assert_array_equal(parts[part], batch["inputs"][part::3])


def test_split_rows_leaves_every_row_on_its_device():
  mesh = tiny.mesh(4, 2, 1)
  rows = jax.device_put(np.arange(64.0).reshape(32, 2), sharding.batch_sharding(mesh))

  def each_part(x):
    return jax.lax.map(lambda part: jnp.sin(sharding.constrain(part, "batch", None)), sharding.split_rows(x, 4))

  def contiguous(x):
    return jax.lax.map(lambda part: jnp.sin(sharding.constrain(part, "batch", None)), x.reshape(4, 8, 2))

  with jax.set_mesh(mesh):
    texts = [jax.jit(fn).lower(rows).compile().as_text() for fn in (each_part, contiguous)]
  moved = [any(f" {kind}" in text for kind in ("all-", "collective-permute")) for text in texts]
  assert moved == [False, True], "dealing out moves nothing; cutting contiguous pieces would"


def test_a_global_batch_is_spread_over_all_data_parallel_devices():
  mesh = tiny.mesh(2, 2, 2)
  rows = {"inputs": np.arange(16, dtype=np.int32).reshape(8, 2)}
  found = sharding.global_batch(rows, mesh)["inputs"]
  np.testing.assert_array_equal(found, rows["inputs"])
  assert found.sharding.shard_shape(found.shape) == (2, 2)
  assert sharding.batch_parts(mesh) == 4

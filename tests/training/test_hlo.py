"""Collectives of small programs compiled for eight devices, against what they were written to send."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from adaptive.training import hlo
from adaptive.training.hlo import Collective

P = PartitionSpec


def found(function, *shapes_and_specs, mesh, out=None):
  """{(kind, devices): (count, bytes)} of a function, and its loops of unknown length."""
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
  ]
  compiled = jax.jit(function, out_shardings=NamedSharding(mesh, out or P())).lower(*arrays).compile()
  result = hlo.collectives(compiled.as_text())
  return {(c.kind, c.devices): (t.count, t.bytes) for c, t in result.totals.items()}, result.unknown_loops


@pytest.fixture
def mesh():
  return tiny.mesh(2, 4, 1)


def test_a_program_without_communication_has_none(mesh):
  assert found(jnp.sin, ((8, 4), P("data")), mesh=mesh, out=P("data")) == ({}, 0)


def test_gather_counts_what_it_returns(mesh):
  totals, _ = found(jnp.sin, ((8, 4), P("fsdp")), mesh=mesh)
  assert totals == {("all-gather", 4): (1, 8 * 4 * 4)}


def test_reduction_counts_what_it_is_given(mesh):
  totals, _ = found(lambda x: x.sum(0), ((8, 4), P(("data", "fsdp"))), mesh=mesh)
  assert totals == {("all-reduce", 8): (1, 4 * 4)}


def test_explicit_kinds_are_told_apart(mesh):
  def local(x):
    scattered = jax.lax.psum_scatter(x, "fsdp", tiled=True)
    exchanged = jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)
    shifted = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
    return scattered.sum() + exchanged.sum() + shifted.sum()

  spec = P(("data", "fsdp"))
  run = jax.shard_map(lambda x: local(x)[None], mesh=mesh, in_specs=spec, out_specs=spec)
  totals, _ = found(run, ((64, 4), spec), mesh=mesh, out=spec)
  assert totals == {
    ("reduce-scatter", 4): (1, 8 * 4 * 4), ("all-to-all", 4): (1, 8 * 4 * 4), ("collective-permute", 2): (1, 8 * 4 * 4),
  }  # fmt: skip


def test_the_body_of_a_scan_counts_once_per_iteration(mesh):
  def run(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  totals, unknown = found(run, ((8, 16), P("data")), ((5, 16, 16), P(None, "fsdp")), mesh=mesh, out=P("data"))
  assert unknown == 0
  assert totals["all-reduce", 4] == (5, 5 * 4 * 16 * 4)  # each device contracts its quarter of the weights' rows


def test_nested_loops_multiply(mesh):
  def run(x):
    body = lambda x, _: (jnp.tanh(x - x.sum(0, keepdims=True)), None)
    outer = lambda x, _: (jax.lax.scan(body, x, length=3)[0], None)
    return jax.lax.scan(outer, x, length=7)[0]

  spec = P(("data", "fsdp"))
  assert found(run, ((8, 4), spec), mesh=mesh, out=spec) == ({("all-reduce", 8): (21, 21 * 4 * 4)}, 0)


def test_a_loop_of_unknown_length_is_told(mesh):
  def run(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 1.0, lambda x: x - x.sum(0, keepdims=True), x)

  totals, unknown = found(run, ((8, 4), P(("data", "fsdp"))), mesh=mesh, out=P(("data", "fsdp")))
  assert unknown == 1
  assert totals["all-reduce", 8][0] >= 1


def test_of_a_switch_the_dearest_branch_counts(mesh):
  def run(x, index):
    def sums(times):
      return lambda x: jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(x - x.sum(0, keepdims=True)), x)

    return jax.lax.switch(index[0].astype(jnp.int32), [lambda x: x, sums(2), sums(6), sums(4)], x)

  spec = P(("data", "fsdp"))
  totals, _ = found(run, ((8, 4), spec), ((1,), P()), mesh=mesh, out=spec)
  assert totals["all-reduce", 8] == (6, 6 * 4 * 4)


@pytest.mark.parametrize(("text", "size"), [
  ("f32[2,3]{1,0}", 24), ("(bf16[4]{0}, /*index=1*/pred[8])", 16), ("s4[8]", 4), ("c64[2]", 16), ("f8e4m3fn[5]", 5),
  ("bf16[1,128,32,64]{1,3,2,0:T(8,128)(2,1)S(1)}", 2 * 128 * 32 * 64), ("u32[]", 4), ("token[]", 0), ("f32[0]", 0),
])  # fmt: skip
def test_bytes_of_types(text, size):
  assert hlo.array_bytes(text) == size


# The form that the TPU compiler gives one asynchronous gather (start, go on, end are three fusions), a reduce-scatter,
# and a loop whose length only its condition tells.
TPU = """
%gather.start (p0: bf16[4,8]) -> bf16[16,8] {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.0 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=3, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, frontend_attributes={chain_id="4"}
}

%gather.done (p1: bf16[4,8]) -> bf16[16,8] {
  %p1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=3, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, frontend_attributes={chain_id="4"}
}

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0:T(8,128)} parameter(0)
  %ar = f32[16,8]{1,0:T(8,128)} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[4,8]{1,0:T(8,128)} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={4,8}
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %first = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%gather.start
  %last = bf16[16,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%gather.done
  %rs = f32[4,8]{1,0:T(8,128)} fusion(%last), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%i, %x)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %state.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: bf16[4,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %end = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_the_forms_of_the_tpu_compiler():
  result = hlo.collectives(TPU)
  assert {c: (t.count, t.bytes) for c, t in result.totals.items()} == {
    Collective("all-gather", 4): (24, 24 * 16 * 8 * 2),
    Collective("reduce-scatter", 4): (24, 24 * 16 * 8 * 4),
  }
  assert result.unknown_loops == 0

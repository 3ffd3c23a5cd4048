"""The compiled training step on meshes: what it keeps, what it moves, and that every method learns the same there."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import MeshConfig, OptimizerConfig
from adaptive.methods import METHODS
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.step import compile_step

MODEL = tiny.model_config(num_layers=2, num_heads=8, num_kv_heads=4, d_ff=32, ff_groups=4)
DEEPER = dataclasses.replace(MODEL, num_layers=3)  # for methods that never skip the first and the last layer
BATCH = tiny.packed_batch(MODEL, rows=16)
# No token twice in a row: equal tokens at the start of two documents have equal scores, and rounding would decide.
BATCH["inputs"] = jnp.asarray(
  np.random.default_rng(1).permuted(np.tile(np.arange(32, dtype=np.int32), (16, 1)), axis=1)[:, :12]
)
SIZES = dict(depths=(1, 2), q_per_kv=(1, 2), d_ff=(8, 32))
CASES = {
  "dense": ("dense", {}),
  "switch": ("sorted_net", dict(**SIZES, executor="switch")),
  "mask": ("sorted_net", dict(**SIZES, executor="mask", accum_data="shared")),
  "static": ("sorted_net", dict(depths=(1, 2), executor="static", scheme="all", accum_data="shared")),
  "multi_exit": ("sorted_net", dict(depths=(1, 2), scheme="multi_exit")),
  "sandwich": ("sorted_net", dict(**SIZES, scheme="sandwich", num_sampled=3, accum_data="shared", distill=0.5)),
  "exits": ("early_exit", dict(exits=(1,), heads="own")),
  "gates": ("jei_dnn", dict(exits=(1,), warmup_steps=1, phase_steps=1)),
  "layer_skip": ("layer_skip", dict(dropout=0.5, rotation=2)),
  "recursive": ("recursive", dict(num_recursions=2, sharing="cycle")),
  "unified_skip": ("unified_skip", dict(speedups=(1.5,))),
  "first": ("first", dict(prompt_tokens=2)),
  "layer_routers": ("dr_llm", dict(hidden=4, windows=2)),
  "depths": ("mixture_of_depths", dict(capacity=0.5, inference="predictor")),
  "controller": ("sec", dict(exits=(1,))),
  "ponder": ("ponder", dict(num_recursions=2)),
  "act": ("ponder", dict(num_recursions=2, halting="act")),
  "recurrent_depth": ("recurrent_depth", dict(prelude=0, core=1, num_recursions=2)),
  "recursions": ("mixture_of_recursions", dict(num_recursions=2, sharing="cycle", kv_cache="shared")),
  "one": ("sorted_net", dict(**SIZES, executor="static", num_sampled=1)),
}
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def batch_of(case):
  return BATCH | tiny.labels(MODEL, BATCH) if case == "layer_routers" else BATCH


def mesh_of(shape):
  """A mesh of the first devices that it needs."""
  return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def built(case, shape):
  name, settings = CASES[case]
  method, mesh = METHODS[name], mesh_of(shape)
  model = method.build(DEEPER if name in ("first", "unified_skip") else MODEL, method.Config(**settings))
  optimizer = optim.make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=0.01), 10)
  return method, model, optimizer, mesh, compile_step(method, model, optimizer, mesh, 0, 1)


@functools.cache
def compiled(case, shape, choice=None):
  """The program of a case's step for a mesh, and its abstract state."""
  method, model, optimizer, mesh, step = built(case, shape)
  choice = method.sample(model, 0, 0) if choice is None else choice
  state, where = states.abstract(model, optimizer, mesh), sharding.batch_sharding(mesh)
  batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in batch_of(case).items()}
  with jax.set_mesh(mesh):
    argument = choice if method.static_choice(model) else np.asarray(choice, np.int32)
    return step.lower(state, batch, argument).compile(), state


def moved(case, shape, choice=None):
  """Number and bytes of the results of the instructions that move data between devices, by kind."""
  counts, volume = collections.Counter(), collections.Counter()
  pattern = r"= (.+?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
  for results, kind in re.findall(pattern, compiled(case, shape, choice)[0].as_text()):
    sizes = [BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays(results)]
    counts[kind] += 1
    volume[kind] += sum(sizes)
  return counts, volume


def arrays(results):
  return re.findall(r"(\w+)\[([\d,]*)\]", results)


def test_every_method_is_among_the_cases():
  assert {name for name, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize(("case", "shape"), [("dense", (1, 1, 1)), ("switch", (1, 1, 1)), ("one", (2, 2, 2))])
def test_the_whole_state_is_updated_in_place_and_nothing_but_metrics_is_new(case, shape):
  program, state = compiled(case, shape, (7,) if case == "one" else None)
  memory = program.memory_analysis()
  held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
  parameters = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in jax.tree.leaves(state.params))
  assert held > 3 * parameters, "parameters and two moments"
  assert memory.alias_size_in_bytes >= held
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024 < parameters


@pytest.mark.slow
@pytest.mark.parametrize("smaller", [0, 5], ids=["smallest", "shallow"])
def test_the_step_of_a_sub_model_moves_no_more_than_that_of_the_full_one(smaller):
  """Cut parameters and their gradients travel as slices; no kind, no instruction and no byte is added."""
  (count, volume), (full_count, full_volume) = (moved("one", (2, 2, 2), (index,)) for index in (smaller, 7))
  assert full_count["all-gather"] > 0 < full_count["all-reduce"]
  assert count <= full_count
  assert volume < full_volume


@pytest.mark.slow
@pytest.mark.parametrize("case", ["switch", "multi_exit"])
def test_no_kind_of_traffic_is_added_by_training_many_sub_models(case):
  """On data and tensor axes the dense model adds up and does nothing else."""
  assert set(moved("dense", (2, 1, 4))[0]) == {"all-reduce"}
  assert set(moved(case, (2, 1, 4))[0]) == {"all-reduce"}


@functools.cache
def losses(case, shape, steps=4):
  """Loss and gradient norm of each of a few updates."""
  method, model, optimizer, mesh, step = built(case, shape)
  state, found = states.create(model, optimizer, mesh, seed=0), []
  with jax.set_mesh(mesh):
    batch = sharding.global_batch(batch_of(case), mesh)
    for i in range(steps):
      choice = method.sample(model, 0, i)
      state, metrics = step(state, batch, choice if method.static_choice(model) else np.asarray(choice, np.int32))
      found.append([float(metrics[name][0] / metrics[name][1]) for name in ("loss", "grad_norm")])
  return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "one"])
def test_every_method_learns_on_eight_devices_what_it_learns_on_one(case, shape):
  alone, found = losses(case, (1, 1, 1)), losses(case, shape)
  np.testing.assert_allclose(found, alone, rtol=1e-5)
  assert len(set(alone[:, 0])) == len(alone), "the losses of different updates differ: something is learned"

"""Compiling for TPUs from the command line, where libtpu is installed; it needs no TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = """
from adaptive import methods

def get_config():
  config = methods.default_config("dense")
  config.model.update(num_layers=3, d_model=64, d_ff=128, scan_unroll=1, dtype="bfloat16", remat="full")
  config.data.update(source="files", path="nowhere", tokenizer="nowhere.json", seq_len=64, batch_size=16)
  config.mesh.update(fsdp=2)
  return config
"""
# Two shardings between which the partitioner finds no way.
AWKWARD = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from adaptive import sharding
from adaptive.config import MeshConfig
from adaptive.training import ahead_of_time

mesh = sharding.make_mesh(MeshConfig(2, 2, 2), ahead_of_time.topology_devices("v5e:2x4"))
where = lambda *axes: NamedSharding(mesh, P(*axes))
def awkward(x):
  x = jax.lax.with_sharding_constraint(jnp.cos(x), where(None, ("data", "fsdp")))
  return jax.lax.with_sharding_constraint(jnp.sin(x), where("data", None))
with ahead_of_time.captured_stderr() as log:
  jax.jit(awkward).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where(None, ("data", "fsdp")))).compile()
print(*ahead_of_time.complaints(log), sep="\\n")
"""

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[tpu]'"
)


def program(*arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(TINY)
  return str(path)


@pytest.mark.slow
@needs_libtpu
def test_a_step_is_compiled_for_chips_that_are_not_here(config, tmp_path):
  out = tmp_path / "report.json"
  done = program("tpu/compile.py", f"--config={config}", "--topology=v5e:2x4", f"--json={out}")
  assert (done.returncode, done.stderr) == (0, "")
  assert "8 x TPU v5 lite, mesh {'data': 4, 'fsdp': 2, 'tensor': 1}" in done.stdout
  assert "it fits" in done.stdout
  report = json.loads(out.read_text())
  assert report["hbm"] == 16 * 2**30
  assert 0 < report["state"] < report["arguments"] < report["total"] < report["hbm"]
  assert report["unknown_loops"] == 0
  gathers = sum(entry["count"] for entry in report["collectives"] if entry["kind"] == "all-gather")
  assert gathers >= 2 * 7 * 3  # the matrices of three layers, forward and backward


@pytest.mark.slow
@needs_libtpu
def test_a_step_that_does_not_fit_is_told(config):
  big = ["--config.model.vocab_size=4000000", "--config.model.d_model=1024", "--config.mesh.fsdp=1"]
  done = program("tpu/compile.py", f"--config={config}", "--topology=v5e:2x4", *big)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr.startswith("does not fit: ")
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
@needs_libtpu
def test_the_tpu_partitioners_complaints_are_caught():
  done = program("-c", AWKWARD)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Involuntary full rematerialization")


SLICES = """
from adaptive import sharding
from adaptive.config import MeshConfig
from adaptive.training import ahead_of_time

mesh = sharding.make_mesh(MeshConfig(fsdp=4), ahead_of_time.topology_devices("v5e:2x2", num_slices=2))
print(dict(mesh.shape), [sorted({device.slice_index for device in row.flat}) for row in mesh.devices])
for name in ("v5e:16x16", "v6e:8x8", "v5p:2x2x4"):
  print(name, dict(sharding.make_mesh(MeshConfig(fsdp=16), ahead_of_time.topology_devices(name)).shape))
"""


@needs_libtpu
def test_meshes_of_slices_and_of_tori_that_they_cut():
  assert program("-c", SLICES).stdout.splitlines() == [
    "{'data': 2, 'fsdp': 4, 'tensor': 1} [[0], [1]]",
    "v5e:16x16 {'data': 16, 'fsdp': 16, 'tensor': 1}",
    "v6e:8x8 {'data': 4, 'fsdp': 16, 'tensor': 1}",
    "v5p:2x2x4 {'data': 1, 'fsdp': 16, 'tensor': 1}",
  ]


@needs_libtpu
@pytest.mark.parametrize(("arguments", "message"), [
  (["--topology=v9:2x4"], "error: topology 'v9:2x4': "),
  (["--topology=v5e:2x4", "--num_slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=16"],
   "error: mesh.data=1 must be a multiple of the 2 slices"),
])  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(config, arguments, message):
  done = program("tpu/compile.py", f"--config={config}", *arguments)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1


def test_missing_flags_are_told(config):
  done = program("tpu/compile.py", f"--config={config}")
  assert done.returncode == 2
  assert done.stderr == "error: --topology is missing, such as --topology=v5e:4x4\n"

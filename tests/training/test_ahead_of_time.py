"""Reports of compiled steps, on eight fake CPU devices; tests/tpu/test_compile.py has them for TPUs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_run
from jax.sharding import NamedSharding, PartitionSpec

from adaptive.config import ConfigError
from adaptive.methods import parse_config
from adaptive.training import ahead_of_time, dry_run, run


@pytest.fixture(scope="module")
def plan():
  fields = {"data.source": "files", "data.path": "nowhere", "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2}
  return run.plan(*parse_config(tiny_run.config("nowhere", "dense", **fields)))


@pytest.fixture(scope="module")
def report(plan):
  return ahead_of_time.compile_plan(plan)


def test_a_plan_reads_no_data_and_a_run_does(plan):
  assert not hasattr(plan, "dataset")
  with pytest.raises(ConfigError, match="nowhere"):
    run.assemble(plan.method, plan.experiment)


def test_a_report_has_the_compilers_memory_and_the_analytic_flops(plan, report):
  assert report.devices == 8
  assert report.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
  data, cost = plan.experiment.data, plan.method.cost(plan.model, plan.method.submodels(plan.model)[0], 32, {})
  assert report.flops == 3 * cost.flops_per_token * data.batch_size * data.seq_len
  rows = 4 * (data.batch_size // 4) * data.seq_len * 4  # four int32 arrays, spread over data and fsdp
  assert report.state == dry_run.state_bytes(plan)
  assert report.arguments == report.state + rows
  assert report.total == report.arguments + report.outputs - report.aliased + report.temporaries + report.code
  assert {key.kind for key in report.collectives.totals} >= {"all-gather", "all-reduce"}
  assert report.complaints == ()
  assert report.hbm == 0


def test_the_report_reads_as_text(report):
  text = ahead_of_time.describe(report)
  assert "8 x cpu, mesh {'data': 2, 'fsdp': 2, 'tensor': 2}" in text
  assert "all-gather" in text
  assert "the partitioner replicated nothing involuntarily" in text


def test_complaints_of_the_partitioner_are_caught():
  mesh = tiny.mesh(2, 2, 2)
  where = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

  def awkward(x):
    x = jax.lax.with_sharding_constraint(jnp.cos(x), where(None, ("data", "fsdp")))
    return jax.lax.with_sharding_constraint(jnp.sin(x), where("data", None))

  x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where(None, ("data", "fsdp")))
  with ahead_of_time.captured_stderr() as log:
    jax.jit(awkward).lower(x).compile()
  (complaint,) = ahead_of_time.complaints(log)
  assert complaint.startswith("Involuntary full rematerialization")
  assert "sharding_constraint" in complaint
  assert "\n" not in complaint


def test_stderr_is_given_back(capfd):
  with ahead_of_time.captured_stderr() as log:
    os.write(2, b"inside\n")
  os.write(2, b"after\n")
  assert log == ["inside"]
  assert capfd.readouterr().err == "after\n"


def test_without_libtpu_one_line_says_so():
  code = (
    "import sys, importlib.util as util; find = util.find_spec; "
    "util.find_spec = lambda name, *rest: None if name == 'libtpu' else find(name, *rest); "
    "sys.argv = ['tpu/compile.py', '--config=configs/dense_lm.py:135m', '--topology=v5e:2x4']; "
    "import runpy; runpy.run_path('tpu/compile.py', run_name='__main__')"
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
  assert done.returncode == 2
  assert done.stderr == "error: libtpu is not installed; pip install -e '.[tpu]' has it\n"

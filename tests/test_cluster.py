"""What several processes are refused for before they look for each other. That they find each other: tests/faults."""

import pytest

from adaptive import cluster
from adaptive.config import ConfigError

VARIABLES = (
  "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_NNODES",
  "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
  for name in VARIABLES:
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
  ("variables", "several"),
  [
    ({}, False),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, True),
    ({"SLURM_NTASKS": "4"}, False),  # the batch script itself, not a task of it
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"JAX_NUM_PROCESSES": "2"}, True),
    ({"JAX_NUM_PROCESSES": "two"}, False),
  ],
)
def test_what_launchers_set_is_understood(monkeypatch, variables, several):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert cluster.launched_as_one_of_many() == several


@pytest.mark.parametrize(
  ("arguments", "variables", "said"),
  [
    (("localhost", 2, 0), {}, "'localhost' must be host:port"),
    ((":1234", 2, 0), {}, "':1234' must be host:port"),
    (("a:1", 2, 2), {}, "process id 2 must lie in 0 .. 1"),
    (("a:1", 0, 0), {}, "number of processes is 0"),
    (("no.such.host.invalid:1", 2, 1), {}, "coordinator address 'no.such.host.invalid:1': "),
    (("localhost:1", 2, 1), {"SLURM_NNODES": "2"}, "means itself to each of the 2 nodes; give the name of the first"),
    (("127.0.0.1:1", 2, 0), {"SLURM_NNODES": "3"}, "means itself to each of the 3 nodes"),
    ((None, None, None), {"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES='x' must be a number"),
    ((None, None, None), {}, "cannot join the other processes: .*give --coordinator_address"),
  ],
)
def test_what_cannot_be_is_one_line(monkeypatch, arguments, variables, said):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError, match=said) as caught:
    cluster.join(*arguments, timeout=1)
  assert "\n" not in str(caught.value)


def test_one_process_agrees_with_itself_and_waits_for_nobody():
  cluster.agree("configs", "x")
  cluster.wait("anything")

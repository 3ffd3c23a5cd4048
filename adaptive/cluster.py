"""Several processes as one run: joining them, finding out that they disagree, and leaving when one is lost."""

import hashlib
import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from adaptive.config import ConfigError, require

LOST = 1
# What XLA's errors begin with when nobody was lost: too little memory, or a program that cannot be.
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
_MESSAGE = 1000  # bytes of an error that are told to the other processes

T = TypeVar("T")

# What the launchers that JAX knows set for their processes, and what says that there is more than one.
_LAUNCHERS = {
  "JAX_NUM_PROCESSES": lambda value: int(value) > 1,
  "SLURM_NTASKS": lambda value: int(value) > 1 and "SLURM_PROCID" in os.environ,
  "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
  "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
  "MEGASCALE_COORDINATOR_ADDRESS": bool,
}


def launched_as_one_of_many() -> bool:
  """Whether the environment says that this process is one of several (Slurm, Open MPI, GKE, JAX's own variables)."""
  try:
    return any(name in os.environ and several(os.environ[name]) for name, several in _LAUNCHERS.items())
  except ValueError:
    return False


def join(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 300,
  heartbeat_timeout: int = 60, heed_preemption: bool = True,
) -> None:  # fmt: skip
  """Connects this process with the others; before anything else touches a device.

  Args:
    coordinator: host:port of process 0. num_processes, process_id: of how many, and which one. What is None is found
      out from the environment (Cloud TPU, GKE, Slurm, Open MPI).
    timeout: seconds to wait for the others to start.
    heartbeat_timeout: seconds after which a silent process counts as lost, and the others end.
    heed_preemption: let SIGTERM ask instead of kill from now on (see `adaptive.training.stopping`).

  Raises:
    ConfigError: the arguments cannot be, or the processes do not find each other.
  """
  num_processes = _from_environment(num_processes, "JAX_NUM_PROCESSES")
  process_id = _from_environment(process_id, "JAX_PROCESS_ID")
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  _check(coordinator, num_processes, process_id)
  if coordinator:
    _check_resolves(coordinator)
  jax.config.update("jax_enable_preemption_service", heed_preemption)
  try:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, initialization_timeout=timeout,
      heartbeat_timeout_seconds=heartbeat_timeout,
    )  # fmt: skip
  except (ValueError, RuntimeError, OSError) as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f"cannot join the other processes: {reason} (without a launcher that JAX knows, give --coordinator_address, "
      "--num_processes and --process_id)"
    ) from error


def _from_environment(value: int | None, name: str) -> int | None:
  if value is not None or name not in os.environ:
    return value
  require(os.environ[name].isdecimal(), f"{name}={os.environ[name]!r} must be a number")
  return int(os.environ[name])


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  if coordinator is not None:
    host, colon, port = coordinator.rpartition(":")
    require(bool(host and colon and port.isdecimal()), f"coordinator address {coordinator!r} must be host:port")
    nodes = os.environ.get("SLURM_NNODES", "1")
    require(
      nodes == "1" or host.strip("[]") not in ("localhost", "127.0.0.1", "::1"),
      f"coordinator address {coordinator!r} means itself to each of the {nodes} nodes; give the name of the first",
    )
  if num_processes is None or process_id is None:
    return
  require(num_processes > 0, f"the number of processes is {num_processes}; it must be at least 1")
  require(
    0 <= process_id < num_processes, f"process id {process_id} must lie in 0 .. {num_processes - 1}, one per process"
  )


def _check_resolves(coordinator: str) -> None:
  """A name that cannot be resolved would be retried in silence until the timeout."""
  host = coordinator.rpartition(":")[0].strip("[]")
  try:
    socket.getaddrinfo(host, None)
  except OSError as error:
    raise ConfigError(f"coordinator address {coordinator!r}: {error.strerror or error}") from error


def agree(what: str, text: str) -> None:
  """Makes sure that all processes hold the same text, such as the config; a hang would tell nobody why.

  Raises:
    ConfigError: another process holds another text.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  everyone = multihost_utils.process_allgather(digest)
  different = np.flatnonzero((everyone != everyone[0]).any(axis=1))
  require(
    not len(different), f"the processes have different {what}: that of process {different.tolist()} is not process 0's"
  )


def together(action: Callable[[], T]) -> T:
  """What the action returns; if it raises ConfigError on any process, all of them do, so that none waits in vain."""
  result, message = None, b""
  try:
    result = action()
  except ConfigError as error:
    message = str(error).encode()[:_MESSAGE]
  if jax.process_count() > 1:
    everyone = multihost_utils.process_allgather(np.frombuffer(message.ljust(_MESSAGE, b"\0"), np.uint8))
    messages = [bytes(text).rstrip(b"\0") for text in np.asarray(everyone)]
    message = message or next(filter(None, messages), b"")
  if message:
    raise ConfigError(message.decode(errors="replace"))
  return result


def wait(name: str) -> None:
  """Until all processes came to this call."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def leave(error: Exception) -> NoReturn:
  """Ends this process after a collective failed. Not by an exception: whoever waits for a lost process hangs."""
  reason, me = " ".join(str(error).split())[:300], f"error: process {jax.process_index()}"
  if reason.startswith(_OWN_FAULT):
    print(f"{me} failed: {reason}", file=sys.stderr, flush=True)
    os._exit(LOST)
  print(
    f"{me} lost contact with the others and ends; start all processes again with the same command, which goes on from "
    f"what was saved ({reason})",
    file=sys.stderr,
    flush=True,
  )
  os._exit(LOST)

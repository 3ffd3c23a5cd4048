"""Compiles a run's training step for TPUs that are not there, and says what the compiler made of it.

The TPU compiler comes with libtpu, which needs no TPU: it takes the description of a topology, such as `v5e:16x16`.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies

from adaptive.config import ConfigError, require
from adaptive.training import dry_run, hlo
from adaptive.training.run import Plan

# GiB of a device, by the name that the compiler gives it: what Google's pages on each version say that a chip has.
HBM_GIB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}

# libtpu reads these when it is loaded. Without the last two, what the partitioner complains of goes to a file.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "1",
  "TPU_STDERR_LOG_LEVEL": "1",
}


class DoesNotFitError(Exception):
  """A device has less memory than the step needs. The message is the compiler's first line."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What compiling one training step showed. Bytes are those of one device.

  Attributes:
    arguments, outputs, aliased, temporaries, code: the compiler's account of memory. `aliased` outputs lie where the
      arguments did, so that `total` leaves them out.
    state: the train state's part of the arguments.
    hbm: what a device has; 0 if this file does not know it.
    flops: of a step of the full model over all devices, analytic: 3 times the forward pass, recomputation left out.
    xla_flops: the compiler's count on one device, which sees the body of a loop once.
    complaints: the partitioner's warnings that it had to replicate an array to move it between two shardings.
    seconds: compile time.
  """

  devices: int
  device_kind: str
  mesh: dict[str, int]
  parameters: int
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  state: int
  hbm: int
  flops: float
  xla_flops: float
  collectives: hlo.Collectives
  complaints: tuple[str, ...]
  seconds: float

  @property
  def total(self) -> int:
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def topology_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
  """Devices of a TPU topology, such as `v5e:4x4` or `v5p:2x2x4`, that can be compiled for and nothing else.

  Raises:
    ConfigError: there is no such topology, or no libtpu.
  """
  require(importlib.util.find_spec("libtpu") is not None, "libtpu is not installed; pip install -e '.[tpu]' has it")
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  jax.config.update("jax_platforms", "cpu")
  slices = {"num_slices": num_slices} if num_slices > 1 else {}
  with captured_stderr():  # loading libtpu away from a TPU complains of metadata that are not there
    try:
      return topologies.get_topology_desc(name, "tpu", **slices).devices
    except Exception as error:
      raise ConfigError(f"topology {name!r}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
  """Collects what anything in the process, C++ included, writes to stderr; the list fills when the block ends."""
  lines: list[str] = []
  with tempfile.TemporaryFile() as file:
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    finally:
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines()


def complaints(log: Sequence[str]) -> tuple[str, ...]:
  """The partitioner's warnings of arrays made whole on every device, shortened to what and where."""
  about = [line for line in log if re.search(r"involuntary full|replicate the tensor", line, re.IGNORECASE)]
  return tuple(re.sub(r"^.*?\[SPMD\] |\. As the last resort.*$", "", line) for line in about)


def compile_plan(plan: Plan) -> Report:
  """Compiles the training step for the devices of the plan's mesh.

  Raises:
    DoesNotFitError: the compiler found that a device's memory does not hold it.
  """
  start = time.perf_counter()
  with captured_stderr() as log:
    try:
      compiled = dry_run.compile_train_step(plan)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        raise DoesNotFitError(str(error).splitlines()[0]) from error
      raise
  return _report(plan, compiled, complaints(log), time.perf_counter() - start)


def _report(plan: Plan, compiled: jax.stages.Compiled, complained: tuple[str, ...], seconds: float) -> Report:
  memory, data = compiled.memory_analysis(), plan.experiment.data
  full = plan.method.cost(plan.model, plan.method.submodels(plan.model)[-1], data.seq_len, {})
  kind = plan.mesh.devices.flat[0].device_kind
  return Report(
    devices=plan.mesh.size,
    device_kind=kind,
    mesh=dict(plan.mesh.shape),
    parameters=full.params_total,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    state=dry_run.state_bytes(plan),
    hbm=HBM_GIB.get(kind, 0) * 2**30,
    flops=3 * full.flops_per_token * data.batch_size * data.seq_len,
    xla_flops=compiled.cost_analysis().get("flops", 0.0),
    collectives=hlo.collectives(compiled.as_text()),
    complaints=complained,
    seconds=seconds,
  )


def describe(report: Report) -> str:
  """The report as text, several tables."""
  r, gib = report, lambda size: f"{size / 2**30:,.2f} GiB"
  where = f"{r.devices} x {r.device_kind}, mesh {r.mesh}, {r.parameters:,} parameters, compiled in {r.seconds:.0f} s"
  memory = [
    ("memory of one device", ""), ("arguments (state and batch)", gib(r.arguments)), ("of which state", gib(r.state)),
    ("outputs", gib(r.outputs)), ("of which in place of arguments", gib(r.aliased)),
    ("temporaries", gib(r.temporaries)), ("program", gib(r.code)), ("total", gib(r.total)),
  ]  # fmt: skip
  if r.hbm:
    memory.append(
      ("of a device's", f"{gib(r.hbm)}, {r.total / r.hbm:.0%}: it {'fits' if r.total <= r.hbm else 'is over'}")
    )
  flops = (
    f"{r.flops / 1e12:,.1f} TFLOP a step for the full model (3 x forward, analytic), {r.flops / r.devices / 1e12:,.3f} "
    f"a device; XLA counts {r.xla_flops / 1e12:,.3f} a device, with the body of each loop once"
  )
  return "\n\n".join([where, dry_run.table(memory), flops, _transfers(r.collectives), _warnings(r.complaints)])


def _transfers(found: hlo.Collectives) -> str:
  rows = [("collective", "over", "times a step", "GB a step")]
  for key, total in found.totals.items():
    rows.append((key.kind, f"{key.devices or '?'} devices", f"{total.count:,}", f"{total.bytes / 1e9:,.3f}"))
  if not found.totals:
    return "no collectives"
  unknown = f"\n{found.unknown_loops} loops of unknown length were counted once" if found.unknown_loops else ""
  return dry_run.table(rows) + "\nbytes of the whole arrays on one device; in loops, times the iterations" + unknown


def _warnings(found: Sequence[str]) -> str:
  if not found:
    return "the partitioner replicated nothing involuntarily"
  return f"WARNING: the partitioner had to replicate {len(found)} arrays:\n" + "\n".join(f"  {line}" for line in found)

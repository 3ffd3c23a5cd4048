"""How many FLOP/s the devices of a run could do at best: what model FLOPs utilisation is a share of.

Data-sheet numbers, dense (without structured sparsity), of one jax device, by the exact `device_kind` that jax reports:
one wrong suffix is another chip (an H100 on a PCIe card has three quarters of an SXM one), so nothing is guessed from a
part of a name. For a kind that is not listed, such as a CPU or a slice of a GPU, a large matrix product is timed.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adaptive import sharding
from adaptive.config import MeshConfig

MEASURED = "measured matmul peak"

# TFLOP/s in bfloat16. Sources: Google Cloud's pages of the TPU versions, NVIDIA's data sheets. A device is one of two
# cores of a TPU v2 or v3, both cores of a v4 or v5p (unless run apart, see _BOTH_CORES), one of two halves of a TPU7x.
_TPU = {
  "TPU v2": 23.0, "TPU v3": 61.5, "TPU v4": 275.0, "TPU v5 lite": 197.0, "TPU v5e": 197.0, "TPU v5": 459.0,
  "TPU v5p": 459.0, "TPU v6 lite": 918.0, "TPU v6e": 918.0, "TPU7x": 1153.5,
}  # fmt: skip
_BOTH_CORES = ("TPU v4", "TPU v5", "TPU v5p")
_GPU = {
  "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
  "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA A10": 125.0, "NVIDIA L4": 121.0, "NVIDIA L40S": 362.0,
  "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.4,
  "NVIDIA H200 NVL": 835.5, "NVIDIA B200": 2250.0, "NVIDIA GB200": 2500.0,
}  # fmt: skip
# In float32; bfloat16 is emulated on these.
_OLD_GPU = {
  "Tesla V100-SXM2-16GB": 15.7, "Tesla V100-SXM2-32GB": 15.7, "Tesla V100-PCIE-16GB": 14.0,
  "Tesla V100-PCIE-32GB": 14.0, "Tesla T4": 8.1,
}  # fmt: skip

_LONG_ENOUGH = 0.02  # seconds of a product that the start of a call does not disturb
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Peak:
  """What all devices of a run could do.

  Attributes:
    flops_per_second: of all devices together, in the run's dtype.
    source: the chip and its dtype, or `MEASURED`.
  """

  flops_per_second: float
  source: str

  @property
  def metric(self) -> str:
    """Name of the share in metrics: `mfu` is kept for known chips."""
    return MEASURED.replace(" ", "_") + "_share" if self.source == MEASURED else "mfu"

  def describe(self, flops_per_second: float) -> str:
    """Such as `1.2 TFLOP/s  MFU 43 %`."""
    share = f"{100 * flops_per_second / self.flops_per_second:.0f} %"
    return f"{format_flops(flops_per_second)}  " + (
      f"{share} of {MEASURED}" if self.source == MEASURED else f"MFU {share}"
    )


def format_flops(flops_per_second: float) -> str:
  """Three digits and a unit, such as `1.2 TFLOP/s`."""
  for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
    if flops_per_second >= size:
      return f"{flops_per_second / size:.3g} {unit}FLOP/s"
  return f"{flops_per_second:.3g} FLOP/s"


def peak_of(devices: Sequence[jax.Device], dtype: str) -> Peak:
  """Peak of all `devices` in `dtype` (`bfloat16` or `float32`): the table's, or measured when it has no such chip.

  Every process of a run calls this alike; a measurement uses the devices of this process and takes the others to be
  as fast.
  """
  device = devices[0]
  known = known_peak(device, dtype)
  if known is not None and all(d.device_kind == device.device_kind for d in devices):
    return Peak(known * len(devices), f"{device.device_kind} in {dtype}")
  local = tuple(d for d in devices if d.process_index == jax.process_index())
  return Peak(measured_matmul_peak(local, dtype) * len(devices) / len(local), MEASURED)


def known_peak(device: jax.Device, dtype: str) -> float | None:
  """FLOP/s of one device in the arithmetic that jax uses for `dtype` unless told otherwise; None when not listed.

  Float32 products are made of bfloat16 ones on a TPU, and of TF32 ones, half as fast, on a GPU that has them. Where
  `jax_default_matmul_precision` asks for more, the peak is another and not listed.
  """
  kind, single = device.device_kind, dtype == "float32"
  if single and jax.config.jax_default_matmul_precision not in (None, "default"):
    return None
  if kind in _TPU:
    alone = kind in _BOTH_CORES and _cores(device) == 1
    return _TPU[kind] * 1e12 / (2 if alone else 1)
  if kind in _GPU:
    return _GPU[kind] * 1e12 / (2 if single else 1)
  return _OLD_GPU[kind] * 1e12 if single and kind in _OLD_GPU else None


def _cores(device: jax.Device) -> int | None:
  """Cores of a TPU that the device stands for; jax has called this by two names."""
  return getattr(device, "num_cores", None) or getattr(device, "core_count", None)


@functools.cache
def measured_matmul_peak(devices: tuple[jax.Device, ...], dtype: str) -> float:
  """Best FLOP/s of products of square matrices on all `devices` of this process at once, each with its own rows.

  At once, because devices may share what they run on, as several of one CPU do. Sizes grow until a product takes long
  enough to be timed: about a second on a CPU, compiling included. Measured once per process.
  """
  mesh = sharding.make_mesh(MeshConfig(), list(devices))
  rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  multiply, best, size = jax.jit(jnp.matmul, out_shardings=rows), 0.0, 256
  with jax.set_mesh(mesh):
    while True:
      left = jax.device_put(jnp.ones((len(devices) * size, size), dtype), rows)
      right = jax.device_put(jnp.ones((size, size), dtype), whole)
      seconds = _fastest(lambda: multiply(left, right))  # noqa: B023 - called before the next round
      best = max(best, 2.0 * len(devices) * size**3 / seconds)
      if seconds > _LONG_ENOUGH or size >= 16384:
        return best
      size *= 2


def _fastest(run) -> float:
  """Seconds of the fastest of a few calls after a first one that compiles."""
  jax.block_until_ready(run())
  fastest = math.inf
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(run())
    fastest = min(fastest, time.perf_counter() - start)
  return max(fastest, 1e-9)

import types

import jax
import jax.numpy as jnp
import pytest
import tiny

from adaptive.training import peak
from adaptive.training.peak import MEASURED, Peak


def chip(kind, **fields):
  return types.SimpleNamespace(device_kind=kind, process_index=0, **fields)


@pytest.mark.parametrize(
  ("kind", "dtype", "tera"),
  [
    ("TPU v4", "bfloat16", 275), ("TPU v4", "float32", 275), ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459), ("TPU v3", "bfloat16", 61.5), ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA A100-SXM4-80GB", "float32", 156), ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 PCIe", "bfloat16", 756.5), ("NVIDIA L4", "float32", 60.5),
    ("Tesla V100-SXM2-16GB", "float32", 15.7),
  ],
)  # fmt: skip
def test_listed_chips(kind, dtype, tera):
  assert peak.known_peak(chip(kind), dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("cpu", "float32"), ("NVIDIA H100", "bfloat16"), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16"),
    ("TPU v5 litepod", "bfloat16"), ("tpu v4", "bfloat16"), ("Tesla V100-SXM2-16GB", "bfloat16"),
  ],
)  # fmt: skip
def test_what_only_looks_like_a_listed_chip_is_not_one(kind, dtype):
  assert peak.known_peak(chip(kind), dtype) is None


def test_one_core_of_a_chip_whose_two_cores_run_apart_is_half_of_it():
  for name in ("num_cores", "core_count"):
    assert peak.known_peak(chip("TPU v4", **{name: 1}), "bfloat16") == pytest.approx(137.5e12)
    assert peak.known_peak(chip("TPU v4", **{name: 2}), "bfloat16") == pytest.approx(275e12)
  assert peak.known_peak(chip("TPU v5 lite", num_cores=1), "bfloat16") == pytest.approx(197e12)


def test_float32_in_full_precision_has_a_peak_that_is_not_listed():
  with jax.default_matmul_precision("highest"):
    assert peak.known_peak(chip("TPU v4"), "float32") is None
    assert peak.known_peak(chip("TPU v4"), "bfloat16") == pytest.approx(275e12)


def test_the_peak_of_a_run_is_that_of_all_its_devices():
  found = peak.peak_of([chip("TPU v4")] * 16, "bfloat16")
  assert found == Peak(16 * 275e12, "TPU v4 in bfloat16")
  assert found.metric == "mfu"
  assert found.describe(1.1e15) == "1.1 PFLOP/s  MFU 25 %"


def test_an_unknown_or_mixed_set_of_devices_is_measured(monkeypatch):
  measured = []
  monkeypatch.setattr(peak, "measured_matmul_peak", lambda devices, dtype: measured.append(len(devices)) or 3e9)
  here, there = chip("cpu"), types.SimpleNamespace(device_kind="cpu", process_index=1)
  found = peak.peak_of([here, here, there, there], "float32")
  assert measured == [2], "of this process"
  assert found == Peak(6e9, MEASURED)
  assert found.metric == "measured_matmul_peak_share"
  assert found.describe(1.5e9) == "1.5 GFLOP/s  25 % of measured matmul peak"
  assert peak.peak_of([chip("TPU v4"), chip("NVIDIA L4")], "bfloat16").source == MEASURED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measured_peak_is_near_what_a_product_of_that_kind_reaches(dtype):
  """Under the mesh of a run, where it is called; a product timed here cannot be much faster than the best."""
  with jax.set_mesh(tiny.mesh(2, 2, 2)):
    found = peak.measured_matmul_peak.__wrapped__(tuple(jax.devices()), dtype)
  x = jnp.ones((512, 512), dtype)
  multiply = jax.jit(jnp.matmul)
  reached = 2 * 512**3 / peak._fastest(lambda: multiply(x, x))
  assert reached / 8 < found < reached * 8 * 4


def test_units():
  numbers = {1.234e15: "1.23 PFLOP/s", 4.5e13: "45 TFLOP/s", 9.99e9: "9.99 GFLOP/s", 2e6: "2 MFLOP/s", 3.0: "3 FLOP/s"}
  assert {peak.format_flops(value) for value in numbers} == set(numbers.values())

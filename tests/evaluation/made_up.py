"""Made-up families for the tests of the reports."""

import dataclasses
import itertools
import math

import numpy as np

from adaptive.evaluation.results import Family, Result


def result(name, dial, loss, flops, **fields):
  """A result with plausible values where the test names none."""
  values = {
    "bits_per_byte": loss / 2.9,
    "accuracy": 0.5 - 0.08 * (loss - 3.5),
    "loss_stderr": 0.004,
    "agreement": 0.8,
    "params_total": int(flops // 2) + 10,
    "params_non_embedding": int(flops // 3),
    "params_active": int(flops // 2),
    "kv_bytes_per_token": 512,
  }
  return Result(name, dial, loss, flops_per_token=flops, **{**values, **fields})


def grid(label="run", depths=range(1, 7), widths=(128, 256, 512, 1024), latency=True, noise=0.01, seed=0):
  """A family of depth times width with the usual diminishing returns."""
  rng = np.random.default_rng(seed)
  results = []
  for depth, width in itertools.product(depths, widths):
    loss = 3.5 + 1 / depth + 0.5 * (128 / width) ** 0.7 + rng.normal(0, noise)
    step = 0.4 + 0.2 * depth * (1 + width / 1024)
    times = {"prefill_ms": 3 * step, "prefill_ms_p90": 3.3 * step, "step_ms": step, "step_ms_p90": 1.1 * step}
    name = f"depth={depth},d_ff={width}"
    dial = {"depth": depth, "d_ff": width}
    results.append(result(name, dial, loss, 4e6 + depth * (6e5 + 1500.0 * width), **(times if latency else {})))
  return Family(label, tuple(results), results[-1].name, {"steps": "3000"}, 0.04)


def replaced(family, index, **fields):
  """The family with some fields of one result changed."""
  results = list(family.results)
  results[index] = dataclasses.replace(results[index], **fields)
  return dataclasses.replace(family, results=tuple(results))


TINY = Family(
  "tiny",
  (
    result("full", {"depth": 3}, 3.0, 40.0, accuracy=0.5, loss_stderr=0.0),
    result("small", {"depth": 1}, 4.0, 10.0, accuracy=0.2),
    result("middle", {"depth": 2}, 2.9, 20.0, accuracy=0.4),
  ),
  "full",
  quality_reference=0.1,
)
DENSE = Family("dense", (result("dense", {}, 3.6, 1.7e7),), "dense")
ODD = replaced(replaced(grid("diverged_$x^2$"), 3, loss=math.nan, accuracy=math.inf), 4, step_ms=None)

"""What an evaluation found: every sub-model of a run on the same held-out rows, and the numbers that sum it up."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.evaluation import pareto

DEFINITIONS = {
  "front": "sub-models that none beats in both loss and FLOPs per token",
  "front_accuracy": "the same for top-1 accuracy and FLOPs per token",
  "hypervolume": (
    "area below the front of accuracy over FLOPs per token, divided by (c_ref - c_min) (q_full - q_ref): c_ref and "
    "q_full are the full model's FLOPs and accuracy, c_min the cheapest sub-model's FLOPs, q_ref the accuracy of a "
    "trivial predictor; 0 for a single model. Bounds are the family's own: to rank families see hypervolume_shared"
  ),
  "hypervolume_shared": (
    "the same area in one box for all families of the file: up to the dearest full model's FLOPs and the best full "
    "model's accuracy, from the cheapest sub-model's FLOPs and the lowest q_ref"
  ),
  "auc_log": "mean over log FLOPs, c_min to c_ref, of the best accuracy within the budget, divided by q_full",
  "retention": "accuracy divided by the full model's accuracy: worst, mean, and the name of the worst",
  "nested": (
    "pairs in which one sub-model lies inside the other; a violation is a smaller one whose loss is lower by more "
    "than twice the paired standard error"
  ),
  "worse_and_dearer": "sub-models that another one beats in loss by more than twice the error, at no more FLOPs",
  "kendall_tau": "rank correlation of FLOPs per token and negative loss",
}


@dataclasses.dataclass(frozen=True)
class Result:
  """One sub-model of one run.

  Attributes:
    name: such as "depth=6,d_ff=384"; unique in its family.
    dial: the setting by name, such as {"depth": 6, "d_ff": 384}.
    loss: mean negative log likelihood, nats per token. bits_per_byte: the same per byte of text.
    accuracy: top-1 next-token accuracy, 0 to 1. agreement: how often its top-1 token is the full model's, 0 to 1.
    loss_stderr: paired standard error, over rows, of (loss - the full model's loss); 0 for the full model.
    params_total, params_non_embedding, params_active: numbers of parameters.
    flops_per_token: forward pass, output head included.
    kv_bytes_per_token: what one more token adds to the cache.
    prefill_ms, prefill_ms_p90, step_ms, step_ms_p90: median and 90th percentile, milliseconds; None if not measured.
    random_loss: loss when the same decisions are made at random, at the same rates; None where nothing is decided.
  """

  name: str
  dial: Mapping[str, int | float | str]
  loss: float
  bits_per_byte: float
  accuracy: float
  loss_stderr: float
  agreement: float
  params_total: int
  params_non_embedding: int
  params_active: int
  flops_per_token: float
  kv_bytes_per_token: int
  prefill_ms: float | None = None
  prefill_ms_p90: float | None = None
  step_ms: float | None = None
  step_ms_p90: float | None = None
  random_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """All sub-models of one run, evaluated on the same held-out rows.

  Attributes:
    label: the run's name in plots and tables.
    results: one per sub-model, in any order.
    full: name of the full model.
    notes: what a reader must know (data fingerprint, steps, device, ...); printed in the reports.
    quality_reference: q_ref of the hypervolume, the accuracy of a trivial predictor (always the commonest token), or 0.
    diagnosis: what the method measured of the full model apart, by name.

  Raises:
    ValueError: no result, two results of one name, or no result named `full`.
  """

  label: str
  results: tuple[Result, ...]
  full: str
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  quality_reference: float = 0.0
  diagnosis: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    names = [r.name for r in self.results]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
      raise ValueError(f"{self.label}: several results are named {', '.join(repeated)}")
    if self.full not in names:
      raise ValueError(f"{self.label}: the full model {self.full!r} is not among the {len(names)} results")

  @property
  def full_index(self) -> int:
    return [r.name for r in self.results].index(self.full)

  def column(self, field: str) -> np.ndarray:
    """[n] float64: one field of every result, nan where it was not measured."""
    values = [getattr(r, field) for r in self.results]
    return np.array([math.nan if value is None else value for value in values], np.float64)

  def front(self, cost: str = "flops_per_token", quality: str = "loss") -> np.ndarray:
    """Indices of the non-dominated results by rising cost; for accuracy and agreement more is better, else less."""
    sign = 1.0 if quality in ("accuracy", "agreement") else -1.0
    return pareto.front(self.column(cost), sign * self.column(quality))

  def worse_and_dearer(self) -> np.ndarray:
    """[n] booleans: another one has a clearly lower loss (twice the standard error) at no more FLOPs."""
    return pareto.worse_and_dearer(self.column("flops_per_token"), -self.column("loss"), self.noise())

  def noise(self) -> np.ndarray:
    """[n] nats: the difference from the full model's loss below which it means nothing, two standard errors."""
    return 2.0 * self.column("loss_stderr")


def summarise(family: Family) -> dict[str, Any]:
  """The numbers of `DEFINITIONS`, with the bounds of the normalisation; plain Python values, nan where undefined."""
  results, full = family.results, family.full_index
  cost, accuracy, loss = (family.column(c) for c in ("flops_per_token", "accuracy", "loss"))
  worst, mean, worst_index = pareto.retention(accuracy, full)
  violations, pairs = pareto.monotonicity_violations([r.dial for r in results], -loss, family.noise())
  return {
    "sub_models": len(results),
    "front": [results[i].name for i in family.front()],
    "front_accuracy": [results[i].name for i in family.front(quality="accuracy")],
    "hypervolume": pareto.normalised_hypervolume(cost, accuracy, full, family.quality_reference),
    "auc_log": pareto.normalised_auc(cost, accuracy, full),
    "retention_worst": worst,
    "retention_worst_name": results[worst_index].name,
    "retention_mean": mean,
    "nested_violations": violations,
    "nested_pairs": pairs,
    "worse_and_dearer": int(family.worse_and_dearer().sum()),
    "kendall_tau": pareto.kendall_tau(cost, -loss),
    "not_finite": int(np.sum(~np.isfinite(loss))),
    "bounds": {
      "c_min": float(cost.min()),
      "c_ref": float(cost[full]),
      "q_ref": float(family.quality_reference),
      "q_full": float(accuracy[full]),
    },
  }


def shared_hypervolumes(families: Sequence[Family]) -> list[float]:
  """One value per family, all in the same box, so that they rank the families; nan where the box is empty.

  A family's own normalised hypervolume does not: a depth-only family that stays close to a costly full model fills
  its own narrow box better than one that reaches much cheaper sub-models.
  """
  costs = [family.column("flops_per_token") for family in families]
  full = [family.results[family.full_index] for family in families]
  c_min, c_ref = min(float(c.min()) for c in costs), max(r.flops_per_token for r in full)
  q_ref, q_best = min(f.quality_reference for f in families), max(r.accuracy for r in full)
  box = (c_ref - c_min) * (q_best - q_ref)
  if not (box > 0 and q_best > q_ref):
    return [math.nan] * len(costs)
  return [pareto.hypervolume(c, f.column("accuracy"), (c_ref, q_ref)) / box for c, f in zip(costs, families)]


def summary_lines(family: Family) -> list[str]:
  """`summarise` in sentences, for the terminal and the pages."""
  s = summarise(family)
  bounds = s["bounds"]
  lines = [
    f"front: {len(s['front'])} of {plural(s['sub_models'], 'sub-model')} by loss, "
    f"{len(s['front_accuracy'])} by accuracy",
    f"normalised hypervolume {number(s['hypervolume'], '.3f')} (accuracy {bounds['q_ref']:.3f} to "
    f"{number(bounds['q_full'], '.3f')}, {compact(bounds['c_min'])} to {compact(bounds['c_ref'])} FLOPs per token)",
    f"accuracy kept: worst {number(s['retention_worst'], '.1%')} ({s['retention_worst_name']}), "
    f"mean {number(s['retention_mean'], '.1%')}",
    f"a smaller one is better in {s['nested_violations']} of {s['nested_pairs']} nested pairs; "
    f"{s['worse_and_dearer']} worse and dearer than another; Kendall's tau {number(s['kendall_tau'], '.2f')}",
  ]
  if family.diagnosis:
    found = ", ".join(f"{name.replace('_', ' ')} {number(value, '.4f')}" for name, value in family.diagnosis.items())
    lines.append(f"full model: {found}")
  if s["not_finite"]:
    lines.append(f"{plural(s['not_finite'], 'sub-model')} with a loss that is not finite")
  return lines


def compact(value: float | None, unit: str = "") -> str:
  """Three significant digits with an SI prefix: 1.20M, 45.6k, 512; "-" for a value that is missing or not finite."""
  if value is None or not math.isfinite(value):
    return "-"
  prefixes, power = ["", "k", "M", "G", "T", "P", "E"], 0
  # 999.5 would round to 1000, which is one prefix further up.
  while abs(value) >= 999.5 and power < len(prefixes) - 1:
    value, power = value / 1000, power + 1
  return f"{three_digits(value)}{prefixes[power]}{unit}" if power or value % 1 else f"{value:.0f}{unit}"


def three_digits(value: float) -> str:
  """Three significant digits, trailing zeros kept, so that numbers below each other compare; never an exponent."""
  if value == 0 or not math.isfinite(value):
    return "0" if value == 0 else "-"
  # The size after rounding decides: 9.996 is 10.0, not 10.00.
  magnitude = math.floor(math.log10(abs(float(f"{value:.2e}"))))
  return f"{value:.{max(0, 2 - magnitude)}f}"


def number(value: float | None, spec: str) -> str:
  """`format(value, spec)`, or "-" for a value that is missing or not finite."""
  return "-" if value is None or not math.isfinite(value) else format(value, spec)


def plural(count: int, noun: str) -> str:
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

"""Every sub-model of a trained run, measured: quality by one program for all, latency on what would be deployed."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import tqdm
from jax.sharding import Mesh

from adaptive.config import Experiment
from adaptive.data import Dataset, validation_batches
from adaptive.evaluation import latency, quality
from adaptive.evaluation.results import Family, Result
from adaptive.methods.contract import Method, Params


def sweep(
  method: Method,
  model: nn.Module,
  params: Params,
  experiment: Experiment,
  dataset: Dataset,
  mesh: Mesh,
  label: str,
  notes: Mapping[str, str],
) -> Family:
  """Evaluates all sub-models on the same held-out rows.

  Args:
    label: the run's name in tables and plots. notes: what else a reader of the report should know.
  """
  settings, submodels = experiment.evaluation, method.submodels(model)
  batches = list(validation_batches(dataset.validation, settings.rows, settings.batch_size, mesh))
  with _bar("quality", len(submodels)) as report:
    measured = quality.measure(method, model, params, batches, mesh, range(len(submodels)), report=report)
  times = _latencies(method, model, params, experiment) if settings.latency else {}
  full = len(submodels) - 1
  results = []
  for i, submodel in enumerate(submodels):
    cost = method.cost(model, submodel, experiment.data.seq_len, measured.realised[i])
    results.append(
      Result(
        name=submodel.name,
        dial=dict(submodel.dial),
        loss=measured.loss(i),
        bits_per_byte=measured.loss(i) / math.log(2) / dataset.validation.bytes_per_prediction,
        accuracy=measured.accuracy(i),
        loss_stderr=measured.paired_error(i, full),
        agreement=measured.agreement(i),
        **dataclasses.asdict(cost),
        **(dataclasses.asdict(times[i]) if i in times else {}),
      )
    )
  notes = {
    **notes,
    "data": f"{dataset.description}, fingerprint {dataset.fingerprint}",
    "held out": f"{len(measured.tokens)} rows, {int(measured.tokens.sum()):,} tokens",
    "device": f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
  }
  diagnosis = method.diagnose(model, params, batches, mesh)
  if times:
    notes["latency"] = f"batch 1, prompt of {settings.prefill_tokens} tokens, then one token; extracted models"
  return Family(label, tuple(results), submodels[full].name, notes, measured.commonest, diagnosis)


def _latencies(method: Method, model: nn.Module, params: Params, experiment: Experiment) -> dict[int, latency.Latency]:
  """By position of the sub-model; those that cannot stand alone are left out."""
  if jax.process_count() > 1:
    print("latency is not measured with several processes: run eval.py on one of them", file=sys.stderr)
    return {}
  settings = experiment.evaluation
  alone = {i: method.extract(model, params, s) for i, s in enumerate(method.submodels(model))}
  alone = {i: found for i, found in alone.items() if found is not None}
  if not alone:
    return {}
  with _bar("latency", len(alone)) as report:
    times = latency.measure(list(alone.values()), settings.prefill_tokens, settings.latency_repeats, report)
  return dict(zip(alone, times))


class _bar:  # noqa: N801 - reads as a function
  """Progress over sub-models: a bar on a terminal, elsewhere a line when it begins."""

  def __init__(self, what: str, total: int):
    first, terminal = jax.process_index() == 0, sys.stderr.isatty()
    self._bar = tqdm.tqdm(total=total, desc=what, unit="sub-model", disable=not (first and terminal))
    if first and not terminal:
      print(f"measuring {what} of {total} sub-models ...", file=sys.stderr, flush=True)

  def __enter__(self) -> Callable[[int], None]:
    return lambda done: self._bar.update(done - self._bar.n) and None

  def __exit__(self, *error) -> None:
    self._bar.close()

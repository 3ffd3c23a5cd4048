"""Every sub-model of a trained run, measured: quality by one program for all, latency on what would be deployed."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from adaptive.config import Experiment
from adaptive.data import Dataset, validation_batches
from adaptive.evaluation import latency, quality
from adaptive.evaluation.results import Family, Result
from adaptive.methods.contract import Batch, Method, Params


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
  chance = _at_random(method, model, params, batches, mesh, measured)
  times, how = _latencies(method, model, params, experiment, dataset) if settings.latency else ([], {})
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
        random_loss=chance[i],
        **dataclasses.asdict(cost),
        **(dataclasses.asdict(times[i]) if times else {}),
      )
    )
  notes = {
    **notes,
    "data": f"{dataset.description}, fingerprint {dataset.fingerprint}",
    "held out": f"{len(measured.tokens)} rows, {int(measured.tokens.sum()):,} tokens",
    "device": f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}",
  }
  diagnosis = method.diagnose(model, params, batches, mesh)
  return Family(label, tuple(results), submodels[full].name, {**notes, **how}, measured.commonest, diagnosis)


def _at_random(
  method: Method, model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh, measured: quality.Quality
) -> list[float | None]:
  """Loss of every sub-model that decides, when chance decides as often."""
  found = method.at_random(model, measured.realised)
  if found is None:
    return [None] * len(measured.realised)
  twin, indices = found
  wanted = sorted({index for index in indices if index is not None})
  with _bar("chance", len(wanted)) as report:
    full = len(method.submodels(twin)) - 1
    losses = quality.measure(method, twin, params, batches, mesh, [*wanted, full], report=report)
  return [None if index is None else losses.loss(wanted.index(index)) for index in indices]


def _latencies(
  method: Method, model: nn.Module, params: Params, experiment: Experiment, dataset: Dataset
) -> tuple[list[latency.Latency], dict[str, str]]:
  """Of every sub-model, on the first device, and a note.

  Nothing where rows are questions, which are no prompts of one length, or where several processes hold the parameters.
  """
  if jax.process_count() > 1:
    print("latency is not measured with several processes: run eval.py on one of them", file=sys.stderr)
    return [], {}
  if "scored" in dataset.validation[0]:
    print("latency is not measured on rows of questions: quiz.py times them", file=sys.stderr)
    return [], {}
  settings, submodels = experiment.evaluation, method.submodels(model)
  number = min(settings.rows, len(dataset.validation))
  rows = np.stack([dataset.validation[i]["inputs"] for i in range(number)])
  with _bar("latency", len(submodels)) as report, jax.default_device(jax.local_devices()[0]):
    params = jax.device_put(params, jax.local_devices()[0])
    decoders = [method.decoder(model, params, submodel) for submodel in submodels]
    run = latency.run_of(decoders)
    prompt = max(1, min(settings.prefill_tokens, rows.shape[1] - run))  # what the config says, if a row has a run more
    times = latency.measure(decoders, rows, prompt, settings.latency_repeats, report)
  return times, {"latency": f"batch 1, held-out prompts of {prompt} tokens, then token by token in runs of {run}"}


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

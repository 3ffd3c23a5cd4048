"""The training loop: evaluate, save, and only then draw a batch, step, and write.

Everything random is a function of the step, so a run that resumes from a checkpoint repeats what one that never stopped
would have done.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from adaptive.config import require
from adaptive.data import train_batches, validation_batches
from adaptive.evaluation import quality
from adaptive.methods.contract import Metrics, SubModel
from adaptive.training import metrics as metric_tools
from adaptive.training import state as states
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS, Run
from adaptive.training.state import TrainState
from adaptive.training.step import compile_step
from adaptive.training.workdir import open_workdir


def train(run: Run, workdir: str) -> None:
  """Trains to the config's last step, from the newest checkpoint of the workdir if there is one.

  Raises:
    ConfigError: the workdir holds another config, was trained on other data, or cannot be written.
  """
  started = time.monotonic()
  settings, steps = run.experiment.training, run.experiment.training.steps
  folder = open_workdir(workdir, run.config_json)
  with Checkpointer(folder / CHECKPOINTS, settings.keep_checkpoints) as checkpointer:
    first = checkpointer.latest_step() or 0
    if first:
      _check_origin(run, workdir, checkpointer.metadata(first))
    resumed = first if first else None
    writers = metric_tools.open_writers(folder, settings, resumed, json.loads(run.config_json))
    with writers, metric_tools.Progress(steps, first) as progress, jax.set_mesh(run.mesh):
      progress.message(_headline(run, first))
      state = _restore(run, checkpointer, first)
      _steps(run, state, first, checkpointer, writers, progress, started)


def _check_origin(run: Run, workdir: str, metadata: Mapping[str, Any]) -> None:
  """Raises ConfigError unless the checkpoint is a training's on the data of this run."""
  require("extracted_from" not in metadata, f"{workdir} holds an extracted sub-model, which has no optimizer state")
  require(
    metadata["data"] == run.dataset.fingerprint,
    f"{workdir} was trained on other data: its fingerprint is {metadata['data']}, that of {run.dataset.description} is "
    f"{run.dataset.fingerprint}; choose another --workdir",
  )


def _steps(run: Run, state: TrainState, first: int, checkpointer, writers, progress, started: float) -> None:
  settings, steps, seed = run.experiment.training, run.experiment.training.steps, run.experiment.seed
  step_fn = compile_step(run.method, run.model, run.optimizer, run.mesh, seed, settings.grad_accum)
  batches = train_batches(run.dataset.train, run.experiment.data.batch_size, seed, first, steps, run.mesh)
  evaluate, delayed, names = _evaluator(run), metric_tools.Delayed(), [s.name for s in run.method.submodels(run.model)]
  static = run.method.static_choice(run.model)

  def record(held: tuple[int, Metrics] | None) -> None:
    if held is None:
      return
    step, values = held[0], metric_tools.mean(_by_name(held[1], names, run.method.sample(run.model, seed, held[0] - 1)))
    progress.update(step, run.experiment.data.batch_size * run.experiment.data.seq_len, values["loss"])
    if step % settings.log_every == 0 or step in (1, steps):
      rate = {} if math.isnan(progress.tokens_per_second) else {"tokens_per_second": progress.tokens_per_second}
      writers.write(step, {**values, **rate})

  for step in range(first, steps + 1):
    if step > first and (step == steps or _due(settings.eval_every, step)):
      record(delayed.flush())
      values = evaluate(state.params)
      writers.write(step, values)
      progress.message(f"step {step}: validation loss {values['validation/loss']:.4f} nats per token")
      progress.restart_rate()
    if step > first and (step == steps or _due(settings.checkpoint_every, step)):
      record(delayed.flush())
      checkpointer.save(step, _items(state), {"step": step, "seed": seed, "data": run.dataset.fingerprint})
    if step == steps:
      break
    batch = next(batches)
    choice = run.method.sample(run.model, seed, step)
    state, values = step_fn(state, batch, choice if static else np.asarray(choice, np.int32))
    record(delayed.push(step + 1, values))
    if step == first:
      jax.block_until_ready(values)
      progress.message(f"first step done {time.monotonic() - started:.1f} s after the loop began (compiling included)")


def _due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def _by_name(values: Metrics, names: list[str], choice: tuple[int, ...]) -> Metrics:
  """Replaces metrics that have one value per sub-model of the choice by one metric for each of those sub-models."""
  flat = {}
  for key, (total, count) in jax.device_get(values).items():
    if not np.ndim(total):
      flat[key] = (total, count)
      continue
    for index, *pair in zip(choice, total, count):  # a sub-model drawn twice adds up
      name = f"{key}/{names[index]}"
      flat[name] = tuple(a + b for a, b in zip(flat.get(name, (0.0, 0.0)), pair))
  return flat


def _items(state: TrainState) -> dict[str, Any]:
  """A checkpoint's parts: the parameters apart, since evaluation reads nothing else."""
  return {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}


def _restore(run: Run, checkpointer: Checkpointer, step: int) -> TrainState:
  """The state of a checkpoint, or a fresh one for step 0."""
  if step == 0:
    return states.create(run.model, run.optimizer, run.mesh, run.experiment.seed)
  items = checkpointer.restore(step, _items(states.abstract(run.model, run.optimizer, run.mesh)))
  return TrainState(items["optimizer"]["step"], items["params"], items["optimizer"]["state"])


def _evaluator(run: Run) -> Callable[[Any], Mapping[str, float]]:
  """Held-out loss of the smallest and the full sub-model, by the program that `eval.py` uses too."""
  settings, submodels = run.experiment.evaluation, run.method.submodels(run.model)
  scorer = quality.make_scorer(run.method, run.model, run.mesh)
  ends: dict[int, SubModel] = {i: submodels[i] for i in (0, len(submodels) - 1)}

  def evaluate(params: Any) -> Mapping[str, float]:
    batches = list(validation_batches(run.dataset.validation, settings.rows, settings.batch_size, run.mesh))
    found = quality.measure(run.method, run.model, params, batches, run.mesh, list(ends), scorer)
    values = {f"validation/loss/{submodel.name}": found.loss(i) for i, submodel in enumerate(ends.values())}
    return {"validation/loss": found.loss(-1), "validation/accuracy": found.accuracy(-1), **values}

  return evaluate


def _headline(run: Run, first: int) -> str:
  submodels = run.method.submodels(run.model)
  seq_len = run.experiment.data.seq_len
  full = run.method.cost(run.model, submodels[-1], seq_len, {})
  where = f"resuming at step {first}" if first else "from scratch"
  return (
    f"{run.method_name}: {full.params_total:,} parameters, {len(submodels)} sub-models, {where}; "
    f"{run.dataset.description}, fingerprint {run.dataset.fingerprint}; mesh {dict(run.mesh.shape)}"
  )

"""The training loop: evaluate, save, and only then draw a batch, step, and write.

Everything random is a function of the step, so a run that resumes from a checkpoint repeats what one that never stopped
would have done.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from adaptive import cluster, sharding
from adaptive.config import require
from adaptive.data import train_batches, validation_batches
from adaptive.evaluation import quality
from adaptive.methods.contract import SubModel
from adaptive.training import guard as guards
from adaptive.training import metrics as metric_tools
from adaptive.training import state as states
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.compile_time import CompileTime
from adaptive.training.guard import BadUpdate
from adaptive.training.position import Position, roll_back
from adaptive.training.profile import Profiler
from adaptive.training.recorder import Recorder
from adaptive.training.run import CHECKPOINTS, Run
from adaptive.training.state import TrainState
from adaptive.training.step import compile_step
from adaptive.training.stopping import StopRequest
from adaptive.training.throughput import Throughput
from adaptive.training.warm_start import check_source, initial_state
from adaptive.training.workdir import CONFIG_FILE, in_use, keep_config, open_workdir, versions


@dataclasses.dataclass(frozen=True)
class _Session:
  """What one process holds while it trains, and keeps when the run rolls back."""

  run: Run
  folder: pathlib.Path
  checkpointer: Checkpointer
  stop: StopRequest
  throughput: Throughput
  compiling: CompileTime
  profiler: Profiler
  started: float


def train(run: Run, workdir: str, profile: tuple[int, int] | None = None, change_config: bool = False) -> None:
  """Trains to the config's last step, from the newest good checkpoint of the workdir if there is one.

  SIGTERM or SIGINT ends the run early and well: the step under way is finished and saved.

  Args:
    profile: updates to trace, as `profile.parse_window` returns them.
    change_config: go on where the workdir holds another config (see `open_workdir`).

  Raises:
    ConfigError: the workdir holds another config, was trained on other data, is in use, or cannot be written.
    RunStopped: an update was bad, and the config says to stop then.
  """
  started, settings = time.monotonic(), run.experiment.training
  cluster.agree("configs or data", run.config_json + run.dataset.fingerprint + run.dataset.tokens_fingerprint)
  if settings.init_from and not (pathlib.Path(workdir) / CONFIG_FILE).exists():  # a run that goes on needs it no more
    cluster.together(lambda: check_source(run))
  folder = cluster.together(lambda: open_workdir(workdir, run.config_json, change_config))
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    cluster.together(lambda: enter(in_use(folder)))
    stop = enter(StopRequest())
    checkpointer = enter(Checkpointer(folder / CHECKPOINTS, settings.keep_checkpoints, settings.keep_best))
    compiling, profiler = enter(CompileTime()), enter(Profiler(profile, folder))
    session = _Session(run, folder, checkpointer, stop, Throughput(run), compiling, profiler, started)
    position = _newest(run, workdir, checkpointer)
    require(
      position.step <= settings.steps, f"{workdir} is at step {position.step}, past training.steps={settings.steps}"
    )
    if change_config:
      keep_config(folder, run.config_json)
    reached = _train(session, workdir, position)
  if reached < settings.steps and jax.process_index() == 0:
    done = f"stopped and saved at step {reached} of {settings.steps}" if reached else "stopped before the first step"
    print(f"{stop.name}: {done}; the same command goes on", flush=True)


def _train(session: _Session, workdir: str, position: Position) -> int:
  """Trains, rolling back where the config says so; the step it came to."""
  while True:
    try:
      try:
        return _train_from(session, position)
      except BadUpdate as error:
        bad = error.with_traceback(None)  # its frames hold the state, of which there is to be but one on the devices
      newest = _newest(session.run, workdir, session.checkpointer)
      position = roll_back(session.run, session.folder, position, newest, bad)
    except jax.errors.JaxRuntimeError as error:
      if jax.process_count() == 1:
        raise
      cluster.leave(error)


def _newest(run: Run, workdir: str, checkpointer: Checkpointer) -> Position:
  """Where the newest good checkpoint stands; the start when there is none.

  Raises:
    ConfigError: it is not a training's on the data of this run.
  """
  step = checkpointer.latest_step()
  if step is None:
    return Position()
  metadata = checkpointer.metadata(step)
  require("extracted_from" not in metadata, f"{workdir} holds an extracted sub-model, which has no optimizer state")
  found, data = metadata["data"], run.dataset
  require(
    found["fingerprint"] == data.fingerprint,
    f"{workdir} was trained on other data: its fingerprint is {found['fingerprint']}, that of {data.description} is "
    f"{data.fingerprint}; choose another --workdir",
  )
  require(
    found["tokens"] == data.tokens_fingerprint,
    f"{workdir} was trained on the same text as other tokens; its tokenizer has changed",
  )
  return Position.of(metadata)


def _train_from(session: _Session, position: Position) -> int:
  """Trains from a position to the end, or until it is asked to stop; the step it came to."""
  run, settings = session.run, session.run.experiment.training
  config = json.loads(run.config_json)
  with contextlib.ExitStack() as stack:
    writers = stack.enter_context(metric_tools.open_writers(session.folder, settings, position.step or None, config))
    progress = stack.enter_context(metric_tools.Progress(settings.steps, position.step, session.throughput.peak))
    stack.enter_context(jax.set_mesh(run.mesh))
    progress.message(_headline(run, position))
    state = _restore(run, session.checkpointer, position.step)
    return _steps(session, state, position, writers, progress)


def _steps(session: _Session, state: TrainState, position: Position, writers, progress) -> int:
  run, experiment, settings = session.run, session.run.experiment, session.run.experiment.training
  seed, first, steps, left_out = experiment.seed, position.step, settings.steps, position.batches_left_out
  step_fn = compile_step(run.method, run.model, run.optimizer, run.mesh, seed, settings.grad_accum, settings.guard)
  batches = train_batches(
    run.dataset.train, experiment.data.batch_size, seed, first + left_out, steps + left_out, run.mesh
  )
  evaluate, recorder, scores = _evaluator(run), Recorder(run, writers, progress, session.throughput), {}
  static = run.method.static_choice(run.model)
  with contextlib.closing(batches):
    for step in range(first, steps + 1):
      moved, stopping = step > first, step < steps and session.stop.at(step)
      if moved and (step == steps or _due(settings.eval_every, step)):
        recorder.flush()
        scores = evaluate(state.params, lambda text, step=step: progress.waits(f"step {step}: {text}"))
        writers.write(step, scores)
        progress.message(f"step {step}: validation loss {scores['validation/loss']:.4f} nats per token")
        progress.restart_rate()
      if moved and (step == steps or stopping or _due(settings.checkpoint_every, step)):
        recorder.flush()
        metadata = _metadata(run, dataclasses.replace(position, step=step), scores)
        session.checkpointer.save(step, _items(state), metadata)
      if step == steps or stopping:
        return step
      scores, batch = {}, next(batches)
      choice = run.method.sample(run.model, seed, step)
      with session.profiler.step(step, state):
        state, values = step_fn(state, batch, choice if static else np.asarray(choice, np.int32))
      traced = session.profiler.done(step + 1, state)
      if traced:
        progress.message(traced)
        progress.restart_rate()  # writing the trace took its time
      recorder.push(step + 1, values)
      if step == first:
        jax.block_until_ready(values)
        seconds = time.monotonic() - session.started
        progress.message(f"first step done {seconds:.1f} s after the loop began; {session.compiling}")


def _due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def _metadata(run: Run, position: Position, scores: Mapping[str, float]) -> dict[str, Any]:
  """What a checkpoint says of itself: enough to repeat the run from there without the workdir around it."""
  return {
    **position.metadata(),
    "data": run.dataset.position(position.batch, run.experiment.data.batch_size),
    "random": {"seed": run.experiment.seed, "implementation": str(jax.random.key_impl(jax.random.key(0)))},
    "config": json.loads(run.config_json),
    "versions": versions(),
    "metrics": dict(scores),
  }


def _items(state: TrainState) -> dict[str, Any]:
  """A checkpoint's parts: the parameters apart, since evaluation reads nothing else."""
  return {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}, "guard": state.guard}


def _restore(run: Run, checkpointer: Checkpointer, step: int) -> TrainState:
  """The state of a checkpoint, or the first one for step 0."""
  guard = run.experiment.training.guard
  if step == 0:
    return initial_state(run)
  wanted = _items(states.abstract(run.model, run.optimizer, run.mesh, guard))
  if not guards.same_window(guard, checkpointer.metadata(step)["config"]["training"]["guard"]):
    del wanted["guard"]  # the user looks for spikes otherwise than before: its window begins anew
  items = checkpointer.restore(step, wanted)
  if "guard" not in wanted:
    items["guard"] = jax.jit(lambda: guards.init(guard), out_shardings=sharding.replicated(run.mesh))()
  return TrainState(items["optimizer"]["step"], items["params"], items["optimizer"]["state"], items["guard"])


def _evaluator(run: Run) -> Callable[[Any, Callable[[str], None]], Mapping[str, float]]:
  """Held-out loss of the smallest and the full sub-model, by the program that `eval.py` uses too.

  It is called with the parameters, and with what shows how far it is.
  """
  settings, submodels = run.experiment.evaluation, run.method.submodels(run.model)
  scorer = quality.make_scorer(run.method, run.model, run.mesh)
  ends: dict[int, SubModel] = {i: submodels[i] for i in (0, len(submodels) - 1)}
  names = [
    "validation/loss",
    "validation/accuracy",
    *(f"validation/loss/{submodel.name}" for submodel in ends.values()),
  ]
  best = run.experiment.training.keep_best
  require(not best or best in names, f"training.keep_best={best!r} is not one of {', '.join(names)}")

  def evaluate(params: Any, show: Callable[[str], None]) -> Mapping[str, float]:
    report = lambda done: show(f"validation on {settings.rows} rows, {done} of {len(ends)} sub-models done")
    report(0)
    batches = list(validation_batches(run.dataset.validation, settings.rows, settings.batch_size, run.mesh))
    found = quality.measure(run.method, run.model, params, batches, run.mesh, list(ends), scorer, report)
    values = {f"validation/loss/{submodel.name}": found.loss(i) for i, submodel in enumerate(ends.values())}
    realised = {f"validation/{name}": value for name, value in found.realised_means(-1).items()}
    return {"validation/loss": found.loss(-1), "validation/accuracy": found.accuracy(-1), **values, **realised}

  return evaluate


def _headline(run: Run, position: Position) -> str:
  submodels = run.method.submodels(run.model)
  seq_len = run.experiment.data.seq_len
  full = run.method.cost(run.model, submodels[-1], seq_len, {})
  begins = f"from {run.experiment.training.init_from}" if run.experiment.training.init_from else "from scratch"
  where = f"resuming at step {position.step}" if position.step else begins
  if position.step == run.experiment.training.steps:
    where = f"at step {position.step} already, its last: nothing to do"
  family = f"{len(submodels)} sub-models" if len(submodels) > 1 else "1 sub-model"
  return (
    f"{run.method_name}: {full.params_total:,} parameters, {family}, {where}; "
    f"{run.dataset.description}, fingerprint {run.dataset.fingerprint}; mesh {dict(run.mesh.shape)}"
  )

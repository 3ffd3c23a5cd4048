"""What `calibrate.py` does: thresholds of early exits for budgets and for floors of quality."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from adaptive.config import ConfigError, require
from adaptive.data import validation_batches
from adaptive.depth.exits import Exiting
from adaptive.evaluation import calibration, thresholds
from adaptive.training.run import load_params, load_run

_NEVER = 1e9


@dataclasses.dataclass(frozen=True)
class Goals:
  """Budgets as shares of the full model's FLOPs; agreements with it, and with which confidence they have to hold."""

  budgets: tuple[float, ...]
  agreements: tuple[float, ...]
  confidence: float

  def check(self) -> None:
    """ConfigError for what can be no goal."""
    for budget in self.budgets:
      thresholds.check_budget(budget)
    for agreement in self.agreements:
      thresholds.check_floor(agreement, self.confidence)


def calibrate(workdir: str, step: int | None, goals: Goals, changes: Sequence[str], rows: int | None) -> None:
  """Prints thresholds for every goal, and how to evaluate them.

  Raises:
    ConfigError: the run has no exits, too little held-out text, or a goal cannot be.
  """
  require(jax.process_count() == 1, "calibrate.py runs in one process")
  goals.check()
  require(rows is None or rows >= 1, f"rows={rows} must be at least 1")
  run = load_run(workdir, changes)
  exits = getattr(run.model, "exits", None)
  require(exits is not None and len(exits.depths) > 1, f"{workdir}: the run's method has no early exits to calibrate")
  settings = run.experiment.evaluation
  rows, skipped = settings.rows if rows is None else rows, -(-settings.rows // settings.batch_size)
  batches = list(
    validation_batches(run.dataset.validation, skipped * settings.batch_size + rows, settings.batch_size, run.mesh)
  )
  require(len(batches) > skipped, f"no held-out rows are left beside the {settings.rows} that are evaluated")
  step, params = load_params(run, workdir, step)
  with jax.set_mesh(run.mesh):
    seen = calibration.collect(exits, params, batches[skipped:], run.experiment.data.seq_len)
  print(
    f"step {step}: {exits.how.signal} at exits {', '.join(map(str, exits.depths[:-1]))} of {exits.depths[-1]} layers; "
    f"{len(seen.rows):,} tokens that evaluations do not use"
  )
  print(f"{'goal':36} {'FLOPs':>6} {'agreement':>10}  thresholds")
  sure = f" with confidence {goals.confidence:g}"
  wanted = [(f"budget {b:g}", functools.partial(thresholds.for_budget, seen, b)) for b in goals.budgets]
  wanted += [
    (f"agreement {a:g}{sure}", functools.partial(thresholds.for_floor, seen, a, goals.confidence))
    for a in goals.agreements
  ]
  every = [value for goal, solve in wanted for value in _solved(goal, solve, exits.how)]
  require(bool(every), "no goal can be met")
  kept = [change for change in changes if not change.startswith("method.exit.per_exit=")]
  settings = [f"--set='{change}'" for change in (*kept, f"method.exit.per_exit=({_text(every)},)")]
  print(f"\nto evaluate them:\n  python eval.py --workdir={workdir} --step={step} {' '.join(settings)}")


def _solved(goal: str, solve: Callable[[], thresholds.Solution], how: Exiting) -> tuple[float, ...]:
  """Prints a goal's line, and returns its thresholds; none where it cannot be met."""
  try:
    solution = solve()
    require(
      not how.decay or min(solution.thresholds) > -1e-9,
      f"needs the threshold {min(solution.thresholds):.3g}, which method.exit.decay={how.decay} would raise",
    )
  except ConfigError as error:
    print(f"{goal:36} {error}")
    return ()
  print(f"{goal:36} {solution.share:6.3f} {solution.agreement:10.4f}  {_text(solution.thresholds)}")
  return solution.thresholds


def _text(values: Sequence[float]) -> str:
  """Exactly, since a threshold is passed or not; never to leave is a number above every signal."""
  return ", ".join(repr(min(float(value), _NEVER)) for value in values)

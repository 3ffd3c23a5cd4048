"""What `calibrate.py` does: thresholds of early exits for budgets and for floors of quality."""

import dataclasses
from collections.abc import Sequence

import jax

from adaptive.config import require
from adaptive.data import validation_batches
from adaptive.evaluation import calibration, thresholds
from adaptive.training.run import load_params, load_run

_NEVER = 1e9


@dataclasses.dataclass(frozen=True)
class Goals:
  """Budgets as shares of the full model's FLOPs; agreements with it, and with which confidence they have to hold."""

  budgets: tuple[float, ...]
  agreements: tuple[float, ...]
  confidence: float


def calibrate(workdir: str, step: int | None, goals: Goals, changes: Sequence[str], rows: int | None) -> None:
  """Prints thresholds for every goal, and how to evaluate them.

  Raises:
    ConfigError: the run has no exits, too little held-out text, or a goal cannot be.
  """
  require(jax.process_count() == 1, "calibrate.py runs in one process")
  run = load_run(workdir, changes)
  exits = getattr(run.model, "exits", None)
  require(exits is not None and len(exits.depths) > 1, f"{workdir}: the run's method has no early exits to calibrate")
  settings = run.experiment.evaluation
  rows, skipped = rows or settings.rows, -(-settings.rows // settings.batch_size)
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
  found = [(f"budget {b:g}", thresholds.for_budget(seen, b)) for b in goals.budgets]
  sure = f" with confidence {goals.confidence:g}"
  found += [(f"agreement {a:g}{sure}", thresholds.for_floor(seen, a, goals.confidence)) for a in goals.agreements]
  for goal, solution in found:
    print(f"{goal:36} {solution.share:6.3f} {solution.agreement:10.4f}  {_text(solution.thresholds)}")
  every = [value for _, solution in found for value in solution.thresholds]
  kept = [change for change in changes if not change.startswith("method.exit.per_exit=")]
  settings = [f"--set='{change}'" for change in (*kept, f"method.exit.per_exit=({_text(every)},)")]
  print(f"\nto evaluate them:\n  python eval.py --workdir={workdir} --step={step} {' '.join(settings)}")


def _text(values: Sequence[float]) -> str:
  """Exactly, since a threshold is passed or not; never to leave is a number above every signal."""
  return ", ".join(repr(min(float(value), _NEVER)) for value in values)

"""Where a run stands, and how it goes back after a bad update.

The batch of update number s is batch s of the data's endless order, until a rollback leaves some out: after one, update
s reads batch s + batches_left_out.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from adaptive.config import RunStopped
from adaptive.data import pipeline
from adaptive.training import guard as guards
from adaptive.training.guard import BadUpdate
from adaptive.training.run import CHECKPOINTS, Run

_ROWS_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Position:
  """`step` finished updates, before which `rollbacks` rollbacks left out `batches_left_out` batches."""

  step: int = 0
  batches_left_out: int = 0
  rollbacks: int = 0

  @classmethod
  def of(cls, metadata: Mapping[str, Any]) -> "Position":
    return cls(**{field.name: metadata[field.name] for field in dataclasses.fields(cls)})

  def metadata(self) -> dict[str, int]:
    return dataclasses.asdict(self)

  @property
  def batch(self) -> int:
    """Number of the batch that the next update reads."""
    return self.step + self.batches_left_out


def roll_back(run: Run, folder: pathlib.Path, position: Position, newest: Position, bad: BadUpdate) -> Position:
  """Where to go on after a bad update: at the newest checkpoint, with the batch after the bad one.

  The batches between are left out too: what made the loss jump may have been in any of them.

  Args:
    position: where this attempt began. newest: of the newest good checkpoint.

  Raises:
    RunStopped: the config says so, or it has gone back too often. The batch is left in the workdir.
  """
  config = run.experiment.training.guard
  action = config.nonfinite if bad.verdict == guards.NOT_FINITE else config.spike
  batch = bad.step - 1 + position.batches_left_out
  if action == "rollback" and position.rollbacks < config.limit:
    if jax.process_index() == 0:
      print(f"rolled back to step {newest.step}, leaving out batches {newest.batch} to {batch}: {bad}", flush=True)
    return Position(newest.step, batch + 1 - newest.step, position.rollbacks + 1)
  often = {"stop": "", "skip": "skips in a row", "rollback": "rollbacks"}[action]
  often = often and f"; more than {config.limit} {often}"
  raise RunStopped(f"{bad}{often}; {_evidence(run, folder, bad.step, batch)}; {_last_good(folder, newest)}")


def _last_good(folder: pathlib.Path, newest: Position) -> str:
  if not newest.step:
    return "there is no checkpoint yet"
  return f"the last good checkpoint is {folder / CHECKPOINTS / str(newest.step)}"


def _evidence(run: Run, folder: pathlib.Path, step: int, batch: int) -> str:
  """Writes the batch for the user to look at, and says which rows it held."""
  rows, size = run.dataset.train, run.experiment.data.batch_size
  indices = pipeline.batch_indices(len(rows), size, run.experiment.seed, batch)
  file = folder / f"bad_batch_of_step_{step}.npz"
  if jax.process_index() == 0:
    try:
      np.savez(file, rows=indices, **pipeline.host_batch(rows, size, run.experiment.seed, batch, np.arange(size)))
    except OSError as error:  # the reason to stop matters more
      file = f"{file}, which could not be written ({error.strerror})"
  named = ", ".join(map(str, indices[:_ROWS_NAMED])) + (", ..." if size > _ROWS_NAMED else "")
  return f"its {size} rows ({named}) are in {file}"

"""Checkpoints: the only file that knows Orbax.

A run's checkpoints hold the whole train state, one folder per step, and restore onto any mesh, whole or the parameters
alone. An extracted sub-model's holds parameters only.

A folder appears under its final name only when everything in it is written, so a killed run leaves the last finished
step. Orbax stores no checksums and tries no older step when the newest is damaged: `manifest.py` tells, and both are
done here.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from adaptive import cluster
from adaptive.config import ConfigError
from adaptive.training import manifest


class CheckpointError(ConfigError):
  """A checkpoint that cannot be written, found, read or fitted. The message is one line."""


def _worth_showing(record: logging.LogRecord) -> bool:
  return record.levelno >= logging.WARNING or f"{os.sep}orbax{os.sep}" not in record.pathname


# Orbax logs dozens of lines per save at level INFO, which absl's app.run shows. A filter, not a level: other libraries
# and the user's --verbosity go through the same logger.
absl_logging.get_absl_logger().addFilter(_worth_showing)


class Checkpointer:
  """The checkpoints of one run; a context manager.

  The step of a checkpoint is the number of finished updates. Every process must call every method.

  Args:
    folder: holds one folder per step; created when writing.
    keep: the newest `keep` steps stay, older ones are deleted. None is for reading: nothing is created, deleted or
      renamed, so that an evaluation can look into the folder of a running training.
    keep_best: name of a metric; the step with the best value of it stays too (see `better`).

  Raises:
    CheckpointError: the folder cannot be created, or holds damaged checkpoints only.
  """

  def __init__(self, folder: str | os.PathLike, keep: int | None, keep_best: str = ""):
    self.folder = pathlib.Path(folder).absolute()
    self._writable = keep is not None
    self._sealing: manifest.Sealing | None = None
    self._checked: set[int] = set()  # reading a large checkpoint to look at its hashes takes long; once is enough
    if self._writable:
      self._set_damaged_aside()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_NewestAndBest(keep, _BestStep(self.folder, keep_best)) if self._writable else None,
      create=self._writable, cleanup_tmp_directories=self._writable, enable_async_checkpointing=True,
    )  # fmt: skip
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    with _one_line(f"cannot use {folder} for checkpoints"):
      self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    if error is None:
      self.close()
      return
    with contextlib.suppress(CheckpointError):  # it would hide the error that is on its way
      self.close()

  def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
    """Starts to save; returns when `state` may be donated or overwritten. Does nothing if the step is saved already.

    Args:
      step: finished updates.
      state: pytree of arrays, sharded in any way.
      metadata: JSON-serialisable; its entry `metrics`, name -> value, is what `keep_best` compares.

    Raises:
      CheckpointError: this save, or the previous one that went on in the background, failed.
    """
    assert self._writable, "opened for reading"
    if step in self._manager.all_steps():
      return
    self.wait()
    args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(dict(metadata)))
    with _one_line(f"cannot save checkpoint {self._path(step)}"):
      self._manager.save(step, args=args, force=True)  # the caller chose the step; Orbax's own policy has no say
    if jax.process_index() == 0:
      self._sealing = manifest.Sealing(self._path(step))

  def steps(self) -> list[int]:
    """All checkpoints, good or not, oldest first. Waits for a save that is under way, and raises as `wait` does."""
    self.wait()
    with _one_line(f"cannot read {self.folder}"):
      if not self._writable and self.folder.exists():
        self._manager.reload()  # the training that writes may have gone on
      return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """Newest checkpoint whose files are as they were written, None if there is none.

    Newer ones that are not are named on stderr, and set aside where the folder is written to.
    """
    steps = self.steps()
    if self._writable:
      self._set_damaged_aside()
      self._manager.reload()
      steps = self.steps()
    for step in reversed(steps):
      found = self._problem(step)
      if found is None:
        return step
      _report(self._path(step), found)
    return None

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Reads a state onto the mesh that `abstract_state` names, whichever it was saved from.

    Args:
      step: one of `steps()`.
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings. When it is a dict, top-level entries of the
        checkpoint that it lacks are not read: an evaluation asks for the parameters alone.

    Returns:
      A pytree of the same structure, shapes, dtypes and shardings.

    Raises:
      CheckpointError: no such checkpoint; its first file that is not as it was written; its first leaf that is missing,
        unknown, or of another shape or dtype; or it cannot be read.
    """
    self._require(step)
    found = self._problem(step)
    if found:
      raise CheckpointError(f"checkpoint {self._path(step)} is damaged: {found}")
    with _one_line(f"cannot read checkpoint {self._path(step)}"):
      stored = self._manager.item_metadata(step).state.tree
    if isinstance(abstract_state, dict):
      stored = {name: part for name, part in stored.items() if name in abstract_state}
    _check_fits(self._path(step), stored, abstract_state)
    shardings = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    with _one_line(f"cannot read checkpoint {self._path(step)}"):
      args = ocp.args.PyTreeRestore(abstract_state, restore_args=shardings, partial_restore=True)
      return self._manager.restore(step, args=ocp.args.Composite(state=args)).state

  def metadata(self, step: int) -> dict[str, Any]:
    """The metadata saved with a step.

    Raises:
      CheckpointError: no such checkpoint, or it cannot be read.
    """
    self._require(step)
    with _one_line(f"cannot read checkpoint {self._path(step)}"):
      return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata

  def wait(self) -> None:
    """Blocks until every save is on disk.

    Raises:
      CheckpointError: a save that went on in the background failed.
    """
    with _one_line(f"cannot save checkpoints in {self.folder}"):
      try:
        self._manager.wait_until_finished()
      finally:
        sealing, self._sealing = self._sealing, None
        if sealing:
          sealing.finish()

  def close(self) -> None:
    """Waits as `wait` does, then lets go of the folder. Raises as `wait` does."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _set_damaged_aside(self) -> None:
    """Renames what is newer than the newest good checkpoint: the run will come to those steps again.

    Nothing is deleted: a checkpoint whose manifest alone was lost may be all that a user has.

    Raises:
      CheckpointError: none is good, and that is not because the run was killed before its first was finished.
    """
    steps = [int(p.name) for p in self.folder.glob("*") if p.name.isdecimal() and p.name == str(int(p.name))]
    for step in sorted(steps, reverse=True):
      found = self._problem(step)
      if found is None:
        return
      if jax.process_index() == 0:
        self._rename(step, found)
    cluster.wait("damaged checkpoints are set aside")
    # A kill leaves one unfinished at most, since a save waits for the manifest of the one before.
    if any(self.folder.glob("*.damaged*")) or len(steps) > 1:
      raise CheckpointError(
        f"no checkpoint in {self.folder} is good and the run would begin anew; mend one, or choose another --workdir"
      )

  def _rename(self, step: int, found: str) -> None:
    path, kind = self._path(step), "damaged" if manifest.is_there(self._path(step)) else "unfinished"
    aside = next(p for i in itertools.count() if not (p := self.folder / f"{step}.{kind}{i or ''}").exists())
    _report(path, f"{found}; set aside as {aside.name}")
    with _one_line(f"cannot rename {path}"):
      path.rename(aside)

  def _problem(self, step: int) -> str | None:
    """`manifest.problem` of a checkpoint, with the reading shared among the processes; the same on all of them."""
    if step in self._checked:
      return None
    found = manifest.problem(self._path(step), jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
      everywhere = multihost_utils.process_allgather(np.array(found is not None))
      if found is None and everywhere.any():
        found = f"says process {everywhere.argmax()}"
    if found is None:
      self._checked.add(step)
    return found

  def _path(self, step: int) -> pathlib.Path:
    return self.folder / str(step)

  def _require(self, step: int) -> None:
    found = self.steps()
    if step not in found:
      there = f"it holds {', '.join(map(str, found))}" if found else "it holds none"
      raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; {there}")


class _BestStep:
  """Which step has the best value of a metric, read from what each checkpoint says of itself."""

  def __init__(self, folder: pathlib.Path, metric: str):
    self._folder, self._metric, self._values = folder, metric, {}

  def __call__(self, steps: Sequence[int]) -> int | None:
    if not self._metric:
      return None
    for step in set(steps) - set(self._values):
      # The step that is being saved has no file yet; it is among the newest, and read the next time.
      with contextlib.suppress(OSError, ValueError):
        text = (self._folder / str(step) / "metadata" / "metadata").read_text(encoding="utf-8")
        self._values[step] = json.loads(text).get("metrics", {}).get(self._metric)
    known = {s: v for s, v in self._values.items() if s in steps and v is not None and math.isfinite(v)}
    return (max if "accuracy" in self._metric else min)(known, key=known.get, default=None)


class _NewestAndBest:
  """Orbax's preservation policy: the newest `keep` steps, and the best."""

  def __init__(self, keep: int, best: _BestStep):
    self._keep, self._best = keep, best

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    steps = [info.step for info in checkpoints]
    kept = {*sorted(steps)[-self._keep :], self._best(steps)}
    return [step in kept for step in steps]


def _report(path: pathlib.Path, found: str) -> None:
  print(f"warning: checkpoint {path} is not used: {found}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
  """Orbax reports trouble as whatever its parts raised; the user gets one line and the cause is chained."""
  try:
    yield
  except Exception as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    failure = CheckpointError(f"{what}: {reason[0]}")
    failure.leaves_threads = True
    raise failure from error


def _check_fits(path: pathlib.Path, stored: Any, wanted: Any) -> None:
  """Orbax would cast another dtype silently, and names no leaf when a shape differs."""
  stored, wanted = _named_leaves(stored), _named_leaves(wanted)
  for name in sorted(stored | wanted):
    there, here = stored.get(name, "missing"), wanted.get(name, "missing")
    if there != here:
      raise CheckpointError(f"checkpoint {path} does not fit: {name} is {there} there and {here} here")


def _named_leaves(tree: Any) -> dict[str, str]:
  """Path -> shape and dtype. Attributes, keys and indices look alike, as they do in what Orbax stored."""

  def describe(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.eval_shape(jax.random.key_data, x)  # Orbax stores the numbers of a random key
    return f"{x.dtype}{list(x.shape)}"

  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(x) for path, x in leaves}

"""What `eval.py` does: evaluate a run, compare runs."""

import dataclasses
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Sequence

import jax

from adaptive.config import ConfigError, require
from adaptive.evaluation import report
from adaptive.evaluation.results import Family
from adaptive.evaluation.sweep import sweep
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS, Run, load_params, load_run
from adaptive.training.workdir import load_config, user_errors

CHANGED = "changed"  # a note of settings that differ from the run's own


def folder(workdir: str, changes: Sequence[str] = ()) -> str:
  """Where results go by themselves: the workdir, or a folder in it that says which of its settings were changed."""
  name = re.sub(r"[^\w.=,+()-]+", "_", "_".join(changes))
  if len(name) > 100:  # file systems take no more than some; yet other changes are other results
    name = f"{name[:91]}-{zlib.crc32(name.encode()):08x}"
  return str(pathlib.Path(workdir) / name) if name else workdir


def evaluate(workdir: str, step: int | None, output: str, changes: Sequence[str] = (), **settings) -> Family:
  """Evaluates all sub-models of a checkpoint, prints the table, and writes the Pareto files into `output`.

  Args:
    step: None is the newest checkpoint. changes: as for `load_run`. settings: replace fields of the run's evaluation
      settings.
  """
  run = load_run(workdir, changes, **settings)
  _make_folder(output)
  step, params = load_params(run, workdir, step)
  family = _sweep(run, workdir, step, params)
  if changes:
    family = dataclasses.replace(family, notes={**family.notes, CHANGED: "; ".join(changes)})
  if jax.process_index() == 0:
    print(report.table(family))
    _write([family], output)
  return family


def _sweep(run: Run, workdir: str, step: int, params) -> Family:
  data = run.experiment.data
  trained = f"{step} steps, {step * data.batch_size * data.seq_len:,} tokens" if step else "elsewhere"
  notes = {"method": run.method_name, "trained": trained}
  label = pathlib.Path(workdir).absolute().name
  return sweep(run.method, run.model, params, run.experiment, run.dataset, run.mesh, label, notes)


def compare(workdirs: Sequence[str], output: str, **settings) -> None:
  """Draws several runs in one plot, evaluating those that have no results yet (all, if settings are given)."""
  folders = [pathlib.Path(workdir).absolute() for workdir in workdirs]
  for workdir, folder in zip(workdirs, folders):
    require(folders.count(folder) == 1, f"--compare names {workdir} twice")
    load_config(workdir)
  _make_folder(output)
  families = []
  for workdir, folder in zip(workdirs, folders):
    found = (not settings and _saved(folder)) or [evaluate(workdir, None, workdir, **settings)]
    if [other.name for other in folders].count(folder.name) > 1:  # a/demo and b/demo would both be "demo"
      found = [dataclasses.replace(family, label=workdir) for family in found]
    families += found
  for family in families:
    if CHANGED in family.notes:
      print(f"warning: the results of {family.label} are with {family.notes[CHANGED]}", file=sys.stderr)
  for note in ("data", "held out"):
    found = dict.fromkeys(str(family.notes.get(note)) for family in families)
    if len(found) > 1:
      print(f"warning: the runs differ in {note!r} ({'; '.join(found)}), their losses do not compare", file=sys.stderr)
  print(report.comparison(families))
  print("\n".join(["", *report.kept(families)]))
  _write(families, output)


def _saved(folder: pathlib.Path) -> list[Family]:
  """What `evaluate` wrote into a workdir, if that was for the newest checkpoint; else empty."""
  file = folder / "pareto.json"
  if not file.is_file():
    return []
  try:
    families = report.read_json(file)
  except ValueError as error:
    raise ConfigError(f"cannot read {file}: {error}; delete it, and the run is evaluated again") from error
  with Checkpointer(folder / CHECKPOINTS, keep=None) as checkpointer:
    newest = checkpointer.latest_step()
  current = all(family.notes.get("trained", "").startswith(f"{newest} steps,") for family in families)
  return families if current or newest is None else []


def _make_folder(output: str) -> None:
  """Finds out that results cannot be written before they have cost anything."""
  with user_errors(f"cannot write results to {output}"):
    pathlib.Path(output).mkdir(parents=True, exist_ok=True)
  require(os.access(output, os.W_OK), f"cannot write results to {output}: Permission denied")


def _write(families: Sequence[Family], output: str) -> None:
  with user_errors(f"cannot write results to {output}"):
    paths = report.write_all(families, output)
  print("\nwrote " + ", ".join(str(path) for path in paths.values()))

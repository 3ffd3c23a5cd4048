"""What `isoflop.py` does: train variants for the same number of FLOPs, and compare what they came to."""

import dataclasses
import functools
import json
import math
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from adaptive import config_dict
from adaptive import cost as costs
from adaptive.config import ConfigError, Experiment, require
from adaptive.evaluation import isoflop
from adaptive.evaluation.isoflop import Trained
from adaptive.evaluation.sweep import sweep
from adaptive.methods import METHODS, parse_config
from adaptive.methods.contract import Method
from adaptive.training import loop
from adaptive.training.run import assemble, load_params, plan
from adaptive.training.workdir import write_atomically

_WARM_UP = 0.05  # of the steps, as in the paper's smallest budget


@dataclasses.dataclass(frozen=True)
class Study:
  """What to compare.

  Attributes:
    config: file with `get_config(variant)`, and the names `VARIANTS`.
    workdir: folder of the runs and of the results.
    budgets: training FLOPs. seeds: of every variant at every budget.
    variants: empty means all of the file.
    accounting: `update`: forward and backward pass, with the head, as in `adaptive.cost`. `paper`: the forward pass
      without the head (Mixture-of-Recursions, Appendix D).
  """

  config: str
  workdir: str
  budgets: tuple[float, ...]
  seeds: tuple[int, ...]
  variants: tuple[str, ...] = ()
  accounting: str = "update"


def compare(study: Study) -> list[Trained]:
  """Trains what is not trained yet, prints the table, and writes isoflop.md, .csv and .png into the workdir.

  Raises:
    ConfigError: a variant or setting that cannot be; a budget that pays for no step.
  """
  module = _read(study.config)
  variants = tuple(dict.fromkeys(study.variants)) or tuple(module["VARIANTS"])
  unknown = sorted(set(variants) - set(module["VARIANTS"]))
  require(not unknown, f"{study.config} has no variant {', '.join(unknown)}; it has {', '.join(module['VARIANTS'])}")
  cells = [(b, v, s) for b in study.budgets for s in study.seeds for v in variants]
  planned = [_plan(module, study, *cell) for cell in cells]  # what cannot be is found before hours of training
  runs = []
  for number, (cell, (method, experiment)) in enumerate(zip(cells, planned), 1):
    budget, variant, seed = cell
    steps = f"{experiment.training.steps:,} steps for {budget:.3g} FLOPs"
    print(f"\n[{number}/{len(cells)}] {variant}, seed {seed}: {steps}", flush=True)
    runs.append(_trained(study, cell, method, experiment))
    folder = pathlib.Path(study.workdir)
    (folder / "isoflop.md").write_text(isoflop.markdown(runs) + "\n", encoding="utf-8")
    isoflop.write_csv(runs, folder / "isoflop.csv")
    isoflop.plot_png(runs, folder / "isoflop.png")
  print("\n" + isoflop.markdown(runs))
  print(f"\nwrote {study.workdir}/isoflop.md, isoflop.csv and isoflop.png")
  return runs


def _read(path: str) -> dict[str, Any]:
  require(pathlib.Path(path).is_file(), f"there is no config file {path}")
  try:
    module = runpy.run_path(path)
  except Exception as error:
    raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
  require(module.get("VARIANTS") and "get_config" in module, f"{path} has no VARIANTS or no get_config(variant)")
  return module


def _plan(module: dict[str, Any], study: Study, budget: float, variant: str, seed: int) -> tuple[Method, Experiment]:
  try:
    config = module["get_config"](variant)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"{study.config}: get_config({variant!r}) failed: {str(error).splitlines()[0]}") from error
  config.seed = seed
  method, experiment = parse_config(config)
  steps = _steps(study, method, experiment, budget)
  require(steps >= 20, f"{budget:.3g} FLOPs pay for {steps} steps of {variant}; choose a larger budget")
  optimizer = dataclasses.replace(experiment.training.optimizer, warmup_steps=max(1, round(_WARM_UP * steps)))
  training = dataclasses.replace(experiment.training, steps=steps, optimizer=optimizer)
  experiment = dataclasses.replace(experiment, training=training)
  plan(method, experiment)
  return method, experiment


def _steps(study: Study, method: Method, experiment: Experiment, budget: float) -> int:
  """The number of steps whose FLOPs are nearest to the budget; they differ where steps train different sub-models."""
  model, data = method.build(experiment.model, experiment.method), experiment.data

  @functools.cache
  def flops(choice: tuple[int, ...]) -> float:
    found = method.update_flops(model, choice, data.seq_len)
    if study.accounting == "paper":
      found = found / costs.update_flops(1.0) - costs.head_flops(experiment.model)
    return found * data.batch_size * data.seq_len

  spent, step = 0.0, 0
  while spent + (one := flops(method.sample(model, experiment.seed, step))) / 2 <= budget:
    spent, step = spent + one, step + 1
  return step


def _trained(study: Study, cell: tuple[float, str, int], method: Method, experiment: Experiment) -> Trained:
  """The run of a cell: from its file when it is there, else trained (on) and evaluated."""
  budget, variant, seed = cell
  workdir = pathlib.Path(study.workdir) / f"{variant.replace(',', '_')}-{budget:.10g}-{study.accounting}-{seed}"
  file, wanted = workdir / "isoflop.json", json.loads(config_dict.to_json(experiment, _name(method)))
  if file.is_file():
    return _read_result(file, wanted)
  run = assemble(method, experiment)
  loop.train(run, str(workdir))
  step, params = load_params(run, str(workdir))
  if step < experiment.training.steps:
    raise SystemExit(0)  # it was asked to stop, and said so; the same command goes on
  family = sweep(method, run.model, params, experiment, run.dataset, run.mesh, variant, {})
  full, tokens = family.results[family.full_index], step * experiment.data.batch_size * experiment.data.seq_len
  top_k = family.diagnosis.get("top_k_loss")
  found = Trained(
    variant, seed, budget, step, tokens, full.params_non_embedding, full.flops_per_token, full.loss, top_k
  )
  write_atomically(file, json.dumps({**dataclasses.asdict(found), "config": wanted}, indent=1))
  return found


def _read_result(file: pathlib.Path, wanted: dict[str, Any]) -> Trained:
  try:
    saved = json.loads(file.read_text(encoding="utf-8"))
    config, found = saved.pop("config"), Trained(**saved)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(f"cannot read {file}: {error!r}; delete it, and the run is evaluated again") from error
  what = "".join(f": {difference}" for difference in config_dict.differences(config, wanted)[:1])
  require(
    config == wanted, f"{file.parent} holds a run of another config{what}; choose another --workdir, or delete it"
  )
  return found


def _name(method: Method) -> str:
  return next(name for name, other in METHODS.items() if other is method)


def parse_numbers(text: Sequence[str], name: str, kind: type) -> tuple:
  """Numbers of a flag, each once and not negative; ConfigError for anything else."""
  given = f"--{name}={','.join(text)}"
  try:
    numbers = tuple(kind(part) for part in text)
  except ValueError:
    whole = "whole numbers" if kind is int else "numbers"
    raise ConfigError(f"{given} must be {whole}, separated by commas") from None
  require(bool(numbers) and all(0 <= n < math.inf for n in numbers), f"{given} must be numbers, not negative")
  require(len(set(numbers)) == len(numbers), f"{given} names a number twice")
  return numbers

"""Runs small enough to train in a test: two layers of width 16 on a few files of one repeated sentence."""

import json
import pathlib

import jax
import numpy as np

from adaptive import methods
from adaptive.methods import parse_config
from adaptive.training import loop, run, state
from adaptive.training.checkpoint import Checkpointer

MODEL = dict(vocab_size=264, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, ff_groups=2)
CLOCK = {"time", "tokens_per_second", "flops_per_second", "mfu", "measured_matmul_peak_share"}
METHOD = {
  "dense": {},
  "early_exit": {"exits": (1,)},
  "first": {"prompt_tokens": 4},
  "jei_dnn": {"exits": (1,), "warmup_steps": 2, "phase_steps": 2},
  "layer_skip": {"rotation": 1},
  "sorted_net": {"depths": (1, 2), "d_ff": (16, 32)},
  "ponder": {"num_recursions": 2},
  "recurrent_depth": {"prelude": 0, "core": 1, "num_recursions": 2},
  "recursive": {"num_recursions": 2, "sharing": "cycle"},
  "dr_llm": {"hidden": 8, "windows": 2, "budgets": (-0.6, -0.5)},
  "mixture_of_depths": {"capacity": 0.5, "capacity_scales": (0.5,)},
  "sec": {"exits": (1,)},
  "mixture_of_recursions": {"num_recursions": 2, "sharing": "cycle", "capacity_scales": (0.5,)},
  "unified_skip": {"speedups": (1.5,)},
}


def corpus(folder: pathlib.Path, files: int = 6) -> str:
  """About 70 training rows of 32 tokens, so that the tests' runs of 16 rows a step cross the border of an epoch."""
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(files):
    (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 11)
  return str(folder)


def config(data: str, method: str = "sorted_net", **fields):
  """A ConfigDict; `fields` are set by dotted name, such as `**{"training.steps": 4}`."""
  settings = methods.default_config(method)
  settings.model.update(MODEL)
  settings.method.update(METHOD[method])
  settings.data.update(source="files", path=data, seq_len=32, batch_size=16)
  settings.training.update(steps=8, log_every=1)
  settings.training.optimizer.update(warmup_steps=1, learning_rate=1e-2)
  if method == "jei_dnn":
    settings.training.optimizer.inactive = "freeze"
  settings.evaluation.update(rows=5, batch_size=8, latency_repeats=5, prefill_tokens=8)
  settings.update_from_flattened_dict(fields)
  return settings


def assemble(data: str, method: str = "sorted_net", **fields) -> run.Run:
  return run.assemble(*parse_config(config(data, method, **fields)))


def lines(workdir: pathlib.Path) -> list[dict]:
  """What metrics.jsonl says, without what depends on the clock."""
  text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in text.splitlines()]


def checkpoint(made: run.Run, workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint, whole, by its path."""
  abstract = loop._items(state.abstract(made.model, made.optimizer, made.mesh))
  with Checkpointer(pathlib.Path(workdir) / run.CHECKPOINTS, keep=None) as checkpoints:
    tree = checkpoints.restore(step, abstract)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

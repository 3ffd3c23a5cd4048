"""What saving costs a run that goes on: windows of steps with one asynchronous save against windows without.

  python benchmarks/checkpoint_cost.py --config=configs/sorted_net_demo.py

The demo's step and state, one save per window of 100 steps, hashes included. The windows take turns, and the first of a
pair is now the one, now the other, so the ratio holds on a noisy machine.
"""

import argparse
import runpy
import statistics
import tempfile
import time

import jax
import numpy as np

from adaptive import data
from adaptive.methods import parse_config
from adaptive.training import loop, run, state
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.step import compile_step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/sorted_net_demo.py")
  parser.add_argument("--window", type=int, default=100, help="steps per save")
  parser.add_argument("--pairs", type=int, default=6)
  arguments = parser.parse_args()
  made = run.assemble(*parse_config(runpy.run_path(arguments.config)["get_config"]()))
  experiment, window, pairs = made.experiment, arguments.window, arguments.pairs
  step_fn = compile_step(made.method, made.model, made.optimizer, made.mesh, 0, experiment.training.grad_accum)
  current = state.create(made.model, made.optimizer, made.mesh, 0)
  batches = data.train_batches(
    made.dataset.train, experiment.data.batch_size, 0, 0, window * (2 * pairs + 1), made.mesh
  )
  seconds = {True: [], False: []}
  with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, keep=2) as checkpoints, jax.set_mesh(made.mesh):
    for turn, saves in enumerate([None, *_turns(pairs)]):  # None: compiles and warms up
      began = time.perf_counter()
      if saves:
        checkpoints.save(turn, loop._items(current), {})
      for i in range(window if saves is not None else 20):
        choice = np.asarray(made.method.sample(made.model, 0, turn * window + i), np.int32)
        current, metrics = step_fn(current, next(batches), choice)
      jax.block_until_ready(metrics)
      checkpoints.wait()
      if saves is not None:
        seconds[saves].append(time.perf_counter() - began)
        print(f"{window} steps {'with' if saves else 'without'} a save: {seconds[saves][-1]:.2f} s", flush=True)
  ratios = [a / b for a, b in zip(seconds[True], seconds[False])]
  each = ", ".join(f"{ratio - 1:+.1%}" for ratio in ratios)
  print(f"one save per {window} steps: {statistics.median(ratios) - 1:+.1%} of the time (pairs: {each})")


def _turns(pairs: int) -> list[bool]:
  """Whether each window saves: with, without, without, with, ..."""
  return [saves for pair in range(pairs) for saves in ((True, False) if pair % 2 == 0 else (False, True))]


if __name__ == "__main__":
  main()

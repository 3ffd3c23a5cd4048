"""Training step of the smallest against the full sub-model, by one compiled program: is what is skipped really saved?

  python benchmarks/submodel_step.py --config=configs/sorted_net_160.py

Times a whole update (forward, backward, optimizer) that trains one sub-model on the whole batch, through the `switch`
executor, beside the same update of the extracted dense model and of the plain dense model of full size. All take turns.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from adaptive.data import train_batches
from adaptive.methods import METHODS, dense, parse_config
from adaptive.training import state as states
from adaptive.training.run import assemble
from adaptive.training.step import compile_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/sorted_net_160.py")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed updates of each.")


class Timed:
  """One training state with its compiled update."""

  def __init__(self, run, method, model):
    self.state = states.create(model, run.optimizer, run.mesh, 0)
    self.step = compile_step(method, model, run.optimizer, run.mesh, 0, 1)
    self.times = {}

  def __call__(self, name: str, batch, index: int) -> None:
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, batch, np.array([index], np.int32))
    jax.block_until_ready(metrics)
    self.times.setdefault(name, []).append(time.perf_counter() - start)


def main(argv: list[str]) -> None:
  method, experiment = parse_config(_CONFIG.value)
  experiment = dataclasses.replace(
    experiment, method=dataclasses.replace(experiment.method, scheme="uniform", num_sampled=1)
  )
  run = assemble(method, experiment)
  submodels = method.submodels(run.model)
  small_config, _ = method.extract(run.model, states.create(run.model, run.optimizer, run.mesh, 0).params, submodels[0])
  nested = Timed(run, method, run.model)
  full = Timed(run, METHODS["dense"], dense.build(experiment.model, dense.Config()))
  small = Timed(run, METHODS["dense"], dense.build(small_config, dense.Config()))
  data = experiment.data
  with jax.set_mesh(run.mesh):
    for batch in train_batches(run.dataset.train, data.batch_size, 0, 0, _REPEATS.value + 2, run.mesh):
      nested(submodels[-1].name, batch, len(submodels) - 1)
      nested(submodels[0].name, batch, 0)
      full("dense of full size", batch, 0)
      small("dense of the smallest's size", batch, 0)
  times = {**nested.times, **full.times, **small.times}
  medians = {name: float(np.median(values[2:])) for name, values in times.items()}
  reference = medians[submodels[-1].name]
  for name, seconds in medians.items():
    print(f"{name:36} {1000 * seconds:8.1f} ms  {seconds / reference:.3f} of the full sub-model's step")
  print(f"programs compiled for the nested model: {nested.step._cache_size()}, for {len(submodels)} sub-models")
  costs = [method.cost(run.model, s, data.seq_len, {}).flops_per_token for s in (submodels[0], submodels[-1])]
  print(
    f"FLOPs of the smallest over the full: {costs[0] / costs[1]:.3f}; {data.batch_size} rows of {data.seq_len} tokens"
  )


if __name__ == "__main__":
  app.run(main)

"""How far do the layers that a step leaves out move? AdamW and Muon, `training.optimizer.inactive` keep and freeze.

  python benchmarks/inactive_update.py --config=configs/sorted_net_demo.py

Trains the full sub-model for some steps, then the smallest one alone, and prints how large the update of the layers
that only the full one has still is, as a share of what it was in the last full step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from adaptive.data import train_batches
from adaptive.methods import parse_config
from adaptive.training import optim
from adaptive.training import state as states
from adaptive.training.run import assemble
from adaptive.training.step import compile_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/sorted_net_demo.py")
_FULL_STEPS = flags.DEFINE_integer("full_steps", 20, "Updates of the full sub-model first.")
_SHOWN = (1, 3, 10, 30)


@jax.jit
def _rms(before, after):
  """Root mean square of the change of all matrices."""
  changes = [(a - b).ravel() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)) if a.ndim > 2]
  return jnp.sqrt(jnp.mean(jnp.concatenate(changes) ** 2))


def _shares(run, settings, depth: int) -> list[float]:
  """RMS update of the layers from `depth` on in each step after the last full one, over that of the last full one."""
  optimizer = optim.make_optimizer(settings, 1000)
  state = states.create(run.model, optimizer, run.mesh, 0)
  step = compile_step(run.method, run.model, optimizer, run.mesh, 0, 1)
  full, sizes = len(run.method.submodels(run.model)) - 1, []
  steps = _FULL_STEPS.value + _SHOWN[-1]
  beyond = lambda state: jax.tree.map(lambda x: x[depth:], state.params["layers"])
  for i, batch in enumerate(train_batches(run.dataset.train, run.experiment.data.batch_size, 0, 0, steps, run.mesh)):
    before = beyond(state)
    state, _ = step(state, batch, np.array([full if i < _FULL_STEPS.value else 0], np.int32))
    sizes.append(float(_rms(before, beyond(state))))
  last = sizes[_FULL_STEPS.value - 1]
  return [size / last for size in sizes[_FULL_STEPS.value :]]


def main(argv: list[str]) -> None:
  method, experiment = parse_config(_CONFIG.value)
  once = dataclasses.replace(experiment.method, scheme="uniform", num_sampled=1)
  run = assemble(method, dataclasses.replace(experiment, method=once))
  depth = method.submodels(run.model)[0]["depth"]
  print(f"{'steps since':14}" + "".join(f"{number:8}" for number in _SHOWN))
  with jax.set_mesh(run.mesh):
    for name in ("adamw", "muon"):
      for inactive in ("keep", "freeze"):
        settings = dataclasses.replace(
          experiment.training.optimizer, name=name, inactive=inactive, warmup_steps=0, decay_fraction=0.0
        )
        shares = _shares(run, settings, depth)
        print(f"{name + ', ' + inactive:14}" + "".join(f"{shares[number - 1]:8.2f}" for number in _SHOWN), flush=True)


if __name__ == "__main__":
  app.run(main)

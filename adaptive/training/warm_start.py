"""The state that a run begins with: fresh, or with the parameters of a trained model in it."""

import dataclasses

import jax

from adaptive.config import ModelConfig, require
from adaptive.methods import METHODS
from adaptive.methods.contract import Params
from adaptive.training import state as states
from adaptive.training.run import Plan, Run, load_params, load_plan
from adaptive.training.state import TrainState

# How a model computes may change; what it computes may not.
_FREE = ("dtype", "param_dtype", "remat", "scan_unroll", "attention", "init_std")


def initial_state(run: Run) -> TrainState:
  """The state before the first update.

  Raises:
    ConfigError: `training.init_from` names no run, or one whose model is not of this run's shape, or which is neither a
      dense model nor of this run's method.
  """
  e = run.experiment
  state = states.create(run.model, run.optimizer, run.mesh, e.seed, e.training.guard)
  if not e.training.init_from:
    return state
  plan = check_source(run)
  dense = plan.method is METHODS["dense"]
  source = load_params(dataclasses.replace(plan, mesh=run.mesh), e.training.init_from)[1]
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  taken = {name: part for name, part in state.params.items() if name in source}
  require(
    dense or shapes(source) == shapes(taken),
    f"training.init_from={e.training.init_from} has other parameters than this run: its method's settings differ",
  )
  frozen = [name for name, rate in run.method.learning_rates(run.model).items() if rate == 0 and name in state.params]
  new = sorted(set(frozen) - set(source))
  require(
    not new,
    f"training.init_from={e.training.init_from} has no {', '.join(new)}; this run does not train what it would lack",
  )
  where = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  cast = lambda new, old: jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)

  def put_in(params: Params, source: Params) -> Params:
    put = run.method.init_from(run.model, params, source, e.training.init_layers, e.seed) if dense else source
    return cast({**params, **put}, params)  # what the source's settings did without stays fresh

  with jax.set_mesh(run.mesh):
    return dataclasses.replace(state, params=jax.jit(put_in, out_shardings=where)(state.params, source))


def check_source(run: Run) -> Plan:
  """The run, or published model, that this one begins with; reads no parameters.

  Raises:
    ConfigError: it does not go with this one, as far as its config says.
  """
  workdir, wanted = run.experiment.training.init_from, run.experiment.model
  source = load_plan(workdir)  # the mesh that trained it need not exist here
  dense = source.method is METHODS["dense"]
  require(
    dense or source.method is run.method,
    f"training.init_from={workdir} holds a model of method {source.method_name!r}: it must be a dense one, as eval.py "
    f"extracts them, or of this run's method",
  )
  for field in dataclasses.fields(ModelConfig):
    there, here = getattr(source.experiment.model, field.name), getattr(wanted, field.name)
    require(
      there == here or field.name in _FREE,
      f"training.init_from={workdir} has model.{field.name}={there}, this run {here}: they must be equal",
    )
  return source

"""A run put together from its config, with everything that can be wrong found before anything is compiled."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from adaptive import config as configs
from adaptive import config_dict, sharding
from adaptive.config import Experiment, require
from adaptive.data import Dataset
from adaptive.data import load as load_data
from adaptive.depth.exits import check_end
from adaptive.methods import METHODS, parse_config
from adaptive.methods.contract import Method, Params, SubModel
from adaptive.pretrained.load import load
from adaptive.pretrained.published import Published, is_published
from adaptive.training import state as states
from adaptive.training.checkpoint import Checkpointer, CheckpointError
from adaptive.training.optim import make_optimizer
from adaptive.training.workdir import load_config

CHECKPOINTS = "checkpoints"
_ATTEMPTS = 5
_LONG_ROWS = 1024  # tokens: a published model takes longer rows only when told to
_HOW_TO_COMPUTE = ("model.dtype", "model.param_dtype", "model.attention", "model.ff_groups", "model.scan_unroll")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run without its data: all that the training step is compiled from."""

  experiment: Experiment
  method: Method
  model: nn.Module
  optimizer: optax.GradientTransformation
  mesh: Mesh

  @property
  def method_name(self) -> str:
    return next(name for name, method in METHODS.items() if method is self.method)

  @property
  def config_json(self) -> str:
    return config_dict.to_json(self.experiment, self.method_name)


@dataclasses.dataclass(frozen=True)
class Run(Plan):
  """What training and evaluation share: nothing here depends on a step."""

  dataset: Dataset


def plan(
  method: Method, experiment: Experiment, training: bool = True, devices: Sequence[jax.Device] | None = None
) -> Plan:
  """Builds model, optimizer and mesh; reads no data and allocates nothing.

  Args:
    training: whether it is to train: then the devices have to share the training batches too.
    devices: of the mesh, those of this process by default. They may be a topology's, which nobody has to own.

  Raises:
    ConfigError: the first setting that cannot work.
  """
  e, devices = experiment, jax.devices() if devices is None else devices
  require(0 <= e.seed < 2**32, f"seed={e.seed} must lie in 0 .. {2**32 - 1}")
  require(
    e.model.attention != "cudnn" or (devices[0].platform == "gpu" and e.model.dtype == "bfloat16"),
    f"model.attention='cudnn' needs a GPU and model.dtype='bfloat16', not {devices[0].platform} and {e.model.dtype}",
  )
  model = method.build(e.model, e.method)
  if training:
    method.check_training(model, e)
  mesh = sharding.make_mesh(e.mesh, devices)
  m = e.model
  sizes = dict(vocab=m.vocab_size, embed=m.d_model, kv_heads=m.num_kv_heads, mlp_groups=m.ff_groups)
  rows_over = sharding.batch_parts(mesh)
  require(
    e.evaluation.batch_size % rows_over == 0,
    f"evaluation.batch_size={e.evaluation.batch_size} is not divisible by {rows_over} data-parallel devices",
  )
  sharding.check_divisible(mesh, batch=e.evaluation.batch_size, **sizes)
  parts = e.training.grad_accum * method.batch_parts(model)
  require(
    not training or e.data.batch_size % (parts * rows_over) == 0,
    f"data.batch_size={e.data.batch_size} must be a multiple of {parts * rows_over}: {parts} micro-batches (training."
    f"grad_accum x sub-models that split a batch) on {rows_over} data-parallel devices",
  )
  optimizer = make_optimizer(e.training.optimizer, e.training.steps, method.learning_rates(model))
  return Plan(e, method, model, optimizer, mesh)


def assemble(method: Method, experiment: Experiment, training: bool = True) -> Run:
  """The plan of a run on this process's devices, with its data loaded.

  Raises:
    ConfigError: the first thing that cannot work, from shapes to data.
  """
  planned = plan(method, experiment, training)
  dataset = load_data(experiment.data, experiment.model.vocab_size, experiment.model.num_layers)
  check_end(planned.model, dataset.tokenizer.eos)
  return Run(experiment, method, planned.model, planned.optimizer, planned.mesh, dataset)


def load_run(workdir: str, changes: Sequence[str] = (), **overrides) -> Run:
  """The run that a workdir holds, for evaluation; or one of a published model, which has no steps.

  Args:
    changes: settings that are not trained, as `field=value` texts, such as method.exit.signal=margin.
    overrides: replace fields of its evaluation settings.

  Raises:
    ConfigError: no workdir, or its config does not work any more.
  """
  return assemble(*_settings(workdir, changes, **overrides), training=False)


def load_plan(workdir: str, changes: Sequence[str] = ()) -> Plan:
  """As `load_run`, for who needs none of the run's data."""
  return plan(*_settings(workdir, changes), training=False)


def _settings(workdir: str, changes: Sequence[str], **overrides) -> tuple[Method, Experiment]:
  if is_published(workdir):
    model = Published(pathlib.Path(workdir))
    saved, free = _published_config(model), ("data", *_HOW_TO_COMPUTE)
  else:
    saved, free = load_config(workdir), ()
  method, experiment = parse_config(config_dict.changed(saved, changes, free))
  evaluation = dataclasses.replace(experiment.evaluation, **overrides)
  # The mesh that trained the run need not exist here; any other holds the same parameters and scores the same rows.
  devices = jax.device_count()
  evaluation = dataclasses.replace(evaluation, batch_size=-(-evaluation.batch_size // devices) * devices)
  return method, dataclasses.replace(experiment, evaluation=evaluation, mesh=configs.MeshConfig())


def _published_config(model: Published) -> dict[str, Any]:
  """Of a dense run that would end with this model; its data are any, read with its tokenizer."""
  longest = min(model.max_len or _LONG_ROWS, _LONG_ROWS)
  data = configs.DataConfig(tokenizer=model.tokenizer, seq_len=longest, prefix="template")
  experiment = Experiment(model=model.config, data=data, method=METHODS["dense"].Config())
  return config_dict.to_config_dict(experiment, "dense").to_dict()


def find_submodel(run: Plan, name: str) -> SubModel:
  """The sub-model of that name, or the `full` one; ConfigError with the nearest name when there is none."""
  submodels = {s.name: s for s in run.method.submodels(run.model)}
  submodels["full"] = run.method.submodels(run.model)[-1]
  with_it = [known for known in submodels if set(name.split(",")) < set(known.split(","))]
  listed = f"with it there are {', '.join(with_it[:6])}" + (" and more" if len(with_it) > 6 else "")
  require(name in submodels, f"no sub-model {name!r}; {listed if with_it else configs.nearest(name, submodels)}")
  return submodels[name]


def load_params(run: Plan, workdir: str, step: int | None = None) -> tuple[int, Params]:
  """Step and parameters of a checkpoint, the newest unless told otherwise.

  Of a published model they are those that its files hold, and the step is 0.

  Raises:
    CheckpointError: there is none.
    ConfigError: the files of a published model do not fit its config, or are damaged.
  """
  if is_published(workdir):
    require(step is None, f"{workdir} is a published model, which has no steps: leave out --step")
    abstract = states.abstract(run.model, run.optimizer, run.mesh)
    return 0, load(Published(pathlib.Path(workdir)).source(), run.experiment.model, abstract.params)
  with Checkpointer(pathlib.Path(workdir) / CHECKPOINTS, keep=None) as checkpointer:
    for attempt in range(_ATTEMPTS):
      chosen = checkpointer.latest_step() if step is None else step
      if chosen is None:
        raise CheckpointError(f"{workdir} holds no finished checkpoint yet")
      abstract = states.abstract(run.model, run.optimizer, run.mesh)
      try:
        return chosen, checkpointer.restore(chosen, {"params": abstract.params})["params"]
      except CheckpointError:
        # A training that goes on may have deleted it for a newer one in the meantime.
        if step is not None or attempt == _ATTEMPTS - 1 or checkpointer.latest_step() == chosen:
          raise

"""A run put together from its config, with everything that can be wrong found before anything is compiled."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from adaptive import config as configs
from adaptive import sharding
from adaptive.config import Experiment, require
from adaptive.data import Dataset
from adaptive.data import load as load_data
from adaptive.methods import METHODS, parse_config
from adaptive.methods.contract import Method, Params
from adaptive.training import state as states
from adaptive.training.checkpoint import Checkpointer, CheckpointError
from adaptive.training.optim import make_optimizer
from adaptive.training.workdir import load_config

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
  """What training and evaluation share: nothing here depends on a step."""

  experiment: Experiment
  method: Method
  model: nn.Module
  optimizer: optax.GradientTransformation
  mesh: Mesh
  dataset: Dataset

  @property
  def method_name(self) -> str:
    return next(name for name, method in METHODS.items() if method is self.method)

  @property
  def config_json(self) -> str:
    return configs.to_json(self.experiment, self.method_name)


def assemble(method: Method, experiment: Experiment, training: bool = True) -> Run:
  """Builds model, optimizer and mesh and loads the data.

  Args:
    training: whether the devices have to share the training batches too.

  Raises:
    ConfigError: the first thing that cannot work, from shapes to data.
  """
  e = experiment
  require(0 <= e.seed < 2**32, f"seed={e.seed} must lie in 0 .. {2**32 - 1}")
  require(
    e.model.attention != "cudnn" or (jax.default_backend() == "gpu" and e.model.dtype == "bfloat16"),
    f"model.attention='cudnn' needs a GPU and model.dtype='bfloat16', not {jax.default_backend()} and {e.model.dtype}",
  )
  model = method.build(e.model, e.method)
  mesh = sharding.make_mesh(e.mesh)
  m = e.model
  sizes = dict(vocab=m.vocab_size, embed=m.d_model, kv_heads=m.num_kv_heads, mlp_groups=m.ff_groups)
  devices = sharding.batch_parts(mesh)
  require(
    e.evaluation.batch_size % devices == 0,
    f"evaluation.batch_size={e.evaluation.batch_size} is not divisible by {devices} data-parallel devices",
  )
  sharding.check_divisible(mesh, batch=e.evaluation.batch_size, **sizes)
  parts = e.training.grad_accum * method.batch_parts(model)
  require(
    not training or e.data.batch_size % (parts * devices) == 0,
    f"data.batch_size={e.data.batch_size} must be a multiple of {parts * devices}: {parts} micro-batches (training."
    f"grad_accum x sub-models that split a batch) on {devices} data-parallel devices",
  )
  optimizer = make_optimizer(e.training.optimizer, e.training.steps)
  return Run(e, method, model, optimizer, mesh, load_data(e.data, e.model.vocab_size))


def load_run(workdir: str, **overrides) -> Run:
  """The run that a workdir holds, for evaluation; `overrides` replace fields of its evaluation settings.

  Raises:
    ConfigError: no workdir, or its config does not work any more.
  """
  method, experiment = parse_config(load_config(workdir))
  evaluation = dataclasses.replace(experiment.evaluation, **overrides)
  # The mesh that trained the run need not exist here; any other holds the same parameters and scores the same rows.
  devices = jax.device_count()
  evaluation = dataclasses.replace(evaluation, batch_size=-(-evaluation.batch_size // devices) * devices)
  experiment = dataclasses.replace(experiment, evaluation=evaluation, mesh=configs.MeshConfig())
  return assemble(method, experiment, training=False)


def load_params(run: Run, workdir: str, step: int | None = None) -> tuple[int, Params]:
  """Step and parameters of a checkpoint, the newest unless told otherwise.

  Raises:
    CheckpointError: there is none.
  """
  with Checkpointer(pathlib.Path(workdir) / CHECKPOINTS, keep=None) as checkpointer:
    step = checkpointer.latest_step() if step is None else step
    if step is None:
      raise CheckpointError(f"{workdir} holds no finished checkpoint yet")
    abstract = states.abstract(run.model, run.optimizer, run.mesh)
    return step, checkpointer.restore(step, {"params": abstract.params})["params"]

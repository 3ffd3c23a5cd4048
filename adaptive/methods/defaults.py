"""The functions of the contract for methods with nothing to say there; a method's module imports those that fit it."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
from jax.sharding import Mesh

from adaptive.config import Experiment
from adaptive.methods.contract import Batch, Metrics, Params, SubModel

__all__ = [
  "at_random", "batch_parts", "check_training", "control", "diagnose", "init_from", "ladder",
  "learning_rates", "sample", "static_choice", "ticker",
]  # fmt: skip


def sample(model: nn.Module, seed: int, step: int) -> tuple[int, ...]:
  """One model is trained, whatever the step."""
  return (0,)


def static_choice(model: nn.Module) -> bool:
  """One program for all steps."""
  return False


def batch_parts(model: nn.Module) -> int:
  """Every row is for the one model."""
  return 1


def check_training(model: nn.Module, experiment: Experiment) -> None:
  """Trains in whatever way."""


def control(model: nn.Module, params: Params, metrics: Metrics) -> Params:
  """Gradients decide everything."""
  return params


def ladder(model: nn.Module, params: Params, drafts: Sequence[SubModel] | None) -> None:
  """No part of the model can draft for it."""


def learning_rates(model: nn.Module) -> Mapping[str, float]:
  """One for all parameters."""
  return {}


def init_from(model: nn.Module, params: Params, source: Params, how: str, seed: int) -> Params:
  """The dense model's parameters where it has them; what the method adds stays fresh."""
  return {**params, **source}


def at_random(model: nn.Module, realised: Sequence[Metrics]) -> None:
  """Nothing depends on the input."""


def diagnose(model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
  """The loss says it all."""
  return {}


def ticker(model: nn.Module, params: Params, submodel: SubModel) -> None:
  """No depth-wise batching."""

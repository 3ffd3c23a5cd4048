"""The train state: what a step reads and writes, created in its shards and never whole on one device."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive import sharding
from adaptive.backbone.transformer import init_params
from adaptive.config import GuardConfig
from adaptive.training import guard as guards
from adaptive.training.guard import GuardState


@flax.struct.dataclass
class TrainState:
  """`step` counts updates, those the guard skipped included, int32 []. Randomness and data are functions of it."""

  step: jax.Array
  params: Any
  opt_state: optax.OptState
  guard: GuardState


def fresh(params: Any, optimizer: optax.GradientTransformation, guard: GuardConfig = guards.DEFAULT) -> TrainState:
  """The state of a run that starts from these parameters."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guards.init(guard))


def _init(
  model: nn.Module, optimizer: optax.GradientTransformation, seed: int, guard: GuardConfig
) -> tuple[TrainState, Any]:
  """A fresh state, and its parameters once more, still boxed with their logical axis names."""
  boxed = init_params(model, jax.random.key(seed))
  return fresh(nn.unbox(boxed), optimizer, guard), boxed


def shardings(
  model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, guard: GuardConfig = guards.DEFAULT
) -> TrainState:
  """Where each array of the state lies. Optimizer moments lie with their parameters, whatever the optimizer."""
  state, boxed = jax.eval_shape(lambda: _init(model, optimizer, 0, guard))
  params = sharding.state_shardings(boxed, mesh)
  everywhere = sharding.replicated(mesh)
  masked = lambda x: isinstance(x, optax.MaskedNode)  # stands where one optimizer of several has no moments
  opt_state = optax.tree_map_params(
    optimizer,
    lambda x, where: x if masked(x) else where,
    state.opt_state,
    params,
    transform_non_params=lambda x: x if masked(x) else everywhere,
    is_leaf=masked,
  )
  return TrainState(everywhere, params, opt_state, jax.tree.map(lambda _: everywhere, state.guard))


def abstract(
  model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, guard: GuardConfig = guards.DEFAULT
) -> TrainState:
  """The state's shapes, dtypes and shardings; allocates nothing."""
  state, _ = jax.eval_shape(lambda: _init(model, optimizer, 0, guard))
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    state,
    shardings(model, optimizer, mesh, guard),
  )


def create(
  model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, guard: GuardConfig = guards.DEFAULT
) -> TrainState:
  """A fresh state for a seed, initialised on the devices that hold it."""
  where = shardings(model, optimizer, mesh, guard)
  with jax.set_mesh(mesh):
    return jax.jit(lambda: _init(model, optimizer, seed, guard)[0], out_shardings=where)()

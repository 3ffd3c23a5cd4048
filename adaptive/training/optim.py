"""Optimizers and learning-rate schedules, all from optax; what is ours is which parameter gets which treatment."""

import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive.config import OptimizerConfig, require

Params = Any


def schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
  """Learning rate at each of `steps` updates.

  Raises:
    ConfigError: warm-up and decay do not fit into the run.
  """
  warmup, final = config.warmup_steps, peak * config.final_fraction
  require(warmup < steps, f"training.optimizer.warmup_steps={warmup} must be less than training.steps={steps}")
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
  decay = round(steps * config.decay_fraction)
  require(
    warmup + decay <= steps,
    f"warm-up ({warmup} steps) and decay ({decay} steps) are longer than training.steps={steps}",
  )
  rise = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
  fall = optax.linear_schedule(peak, final, decay) if decay else optax.constant_schedule(peak)
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])


def decay_mask(params: Params) -> Params:
  """True where weight decay applies: matrices, but not norms, biases, or the embedding table, which is a look-up."""
  return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path[-1].key), params)


def _is_matrix(name: str) -> bool:
  return name not in ("scale", "table") and not name.endswith("bias")


def muon_dimensions(params: Params) -> Params:
  """Muon's view of each stacked matrix: which axes it reads, which it writes; None leaves a parameter to AdamW.

  Matrices that write to the residual stream have d_model last; the others read it first, after the layer axis.
  """

  def dimensions(path, leaf):
    names = [key.key for key in path]
    if names[0] != "layers" or not _is_matrix(names[-1]):
      return None
    axes = tuple(range(1, leaf.ndim))
    split = len(axes) - 1 if names[-1] in ("out", "down") else 1
    return optax.contrib.MuonDimensionNumbers(reduction_axis=axes[:split], output_axis=axes[split:])

  return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(
  config: OptimizerConfig, steps: int, factors: Mapping[str, float] = types.MappingProxyType({})
) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024).

  Args:
    factors: of the learning rate, by top-level name of the parameters, where it is not 1. Parameters of one factor are
      clipped together; those of factor 0 stay as they are, and have no moments.
  """
  groups = {str(factor): _one_rate(config, steps, factor) for factor in {1.0, *factors.values()}}
  factor_of = lambda path: factors.get(path[0].key, 1.0) if path else 1.0  # optax asks without parameters, too
  label = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: str(factor_of(path)), params)
  update = optax.partition(groups, label) if factors else groups["1.0"]
  return freeze_inactive(update) if config.inactive == "freeze" else update


def _one_rate(config: OptimizerConfig, steps: int, factor: float) -> optax.GradientTransformation:
  if factor == 0:
    return optax.set_to_zero()
  rate = schedule(config, steps, config.learning_rate * factor)
  mu_dtype = config.mu_dtype or None
  if config.name == "adamw":
    adam = dict(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=mu_dtype)
    update = optax.adamw(rate, **adam, weight_decay=config.weight_decay, mask=decay_mask)
  else:
    update = optax.contrib.muon(
      schedule(config, steps, config.muon_learning_rate * factor),
      beta=config.b1,
      eps=config.eps,
      mu_dtype=mu_dtype,
      weight_decay=config.weight_decay,
      weight_decay_mask=decay_mask,
      adam_b1=config.b1,
      adam_b2=config.b2,
      adam_learning_rate=rate,
      adam_weight_decay=0.0,  # what is left to AdamW is norms, biases and both sides of the embedding
      muon_weight_dimension_numbers=muon_dimensions,
    )
  if config.clip_norm:
    update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
  return update


def freeze_inactive(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer, but parameters and moments stay bitwise as they are wherever the gradient is exactly zero.

  That is outside the union of a step's sub-models, whose undrawn parts momentum and weight decay move otherwise; and in
  an untied embedding the rows of tokens that the batch lacks. The state is that of the optimizer: counters go on.
  """
  masked = lambda x: isinstance(x, optax.MaskedNode)  # stands where one optimizer of several has no moments

  def update(grads, state, params=None):
    active = jax.tree.map(lambda g: g != 0, grads)
    updates, moved = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda on, u: jnp.where(on, u, jnp.zeros_like(u)), active, updates)
    moments_active = optax.tree_map_params(
      optimizer,
      lambda moment, on: moment if masked(moment) else on,
      state,
      active,
      transform_non_params=lambda x: x if masked(x) else True,
      is_leaf=masked,
    )
    return updates, jax.tree.map(jnp.where, moments_active, moved, state)

  return optax.GradientTransformation(optimizer.init, update)

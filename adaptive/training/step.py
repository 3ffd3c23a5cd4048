"""One update as a pure function of (state, batch, choice of sub-models)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive import sharding
from adaptive.methods.contract import Batch, Method, Metrics, Params
from adaptive.training import state as states
from adaptive.training.state import TrainState

StepFn = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def make_step(
  method: Method, model: nn.Module, optimizer: optax.GradientTransformation, seed: int, grad_accum: int
) -> StepFn:
  """The update, not yet compiled. Metrics are those of the method and `grad_norm`, before clipping."""

  def step(state: TrainState, batch: Batch, choice: Any) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params: Params, rows: Batch):
      return method.loss(model, params, rows, choice, key, state.step)

    grads, metrics = _gradients(loss_fn, state.params, batch, grad_accum)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {**metrics, "grad_norm": (optax.tree.norm(grads), jnp.ones(()))}
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

  return step


def _gradients(loss_fn: Callable, params: Params, batch: Batch, parts: int) -> tuple[Params, Metrics]:
  """Gradient of the mean loss over all tokens of the batch, computed on one micro-batch at a time.

  Micro-batches weigh by their number of tokens, so the result does not depend on how many there are, unless the method
  itself splits a batch between sub-models: then it decides which rows reach which.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  if parts == 1:
    return gradient(params, batch)

  def add_part(total, rows):
    grads, metrics = gradient(params, rows)
    tokens = metrics["loss"][1]
    return jax.tree.map(jnp.add, total, (jax.tree.map(lambda g: g * tokens.astype(g.dtype), grads), tokens)), metrics

  start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
  (grads, tokens), metrics = jax.lax.scan(add_part, start, sharding.split_rows(batch, parts))
  scale = 1.0 / jnp.maximum(tokens, 1.0)
  return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), jax.tree.map(lambda x: jnp.sum(x, 0), metrics)


def compile_step(
  method: Method, model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, grad_accum: int
) -> Any:
  """The jitted update with the state donated. Where the method wants static choices, each choice compiles its own."""
  where = states.shardings(model, optimizer, mesh)
  return jax.jit(
    make_step(method, model, optimizer, seed, grad_accum),
    donate_argnums=0,
    static_argnums=2 if method.static_choice(model) else (),
    out_shardings=(where, sharding.replicated(mesh)),
  )

"""One update as a pure function of (state, batch, choice of sub-models)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from adaptive import losses, sharding
from adaptive.config import GuardConfig
from adaptive.methods.contract import Batch, Method, Metrics, Params
from adaptive.training import guard as guards
from adaptive.training import state as states
from adaptive.training.state import TrainState

StepFn = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def make_step(
  method: Method,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  seed: int,
  grad_accum: int,
  guard: GuardConfig = guards.DEFAULT,
) -> StepFn:
  """The update, not yet compiled.

  Metrics are those of the method, `grad_norm` before clipping, and what the guard says: `verdict` of this update,
  `skipped_updates` so far, and `skipped_in_a_row`.
  """

  def step(state: TrainState, batch: Batch, choice: Any) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(params: Params, rows: Batch, part: int | jax.Array):
      return method.loss(model, params, rows, choice, jax.random.fold_in(key, part), state.step)

    grads, metrics = _gradients(loss_fn, state.params, batch, grad_accum)
    grad_norm = optax.tree.norm(grads)
    verdict, judged = guards.judge(guard, state.guard, losses.mean(metrics["loss"]), grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    made = method.control(model, optax.apply_updates(state.params, updates), metrics), opt_state
    params, opt_state = guards.choose(verdict, made, (state.params, state.opt_state))
    found = dict(grad_norm=grad_norm, verdict=verdict, skipped_updates=judged.skipped, skipped_in_a_row=judged.in_a_row)
    metrics = {**metrics, **{name: (value, jnp.ones(())) for name, value in found.items()}}
    return TrainState(state.step + 1, params, opt_state, judged), metrics

  return step


def _gradients(loss_fn: Callable, params: Params, batch: Batch, parts: int) -> tuple[Params, Metrics]:
  """Gradient of the mean loss over all tokens of the batch, computed on one micro-batch at a time.

  Micro-batches weigh by their number of tokens, so the result does not depend on how many there are, unless the method
  itself splits a batch between sub-models: then it decides which rows reach which.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  if parts == 1:
    return gradient(params, batch, 0)

  def add_part(total, part_and_rows):
    part, rows = part_and_rows
    grads, metrics = gradient(params, rows, part)
    tokens = metrics["loss"][1]
    return jax.tree.map(jnp.add, total, (jax.tree.map(lambda g: g * tokens, grads), tokens)), metrics

  # In float32 whatever the parameters are: bfloat16 cannot even count the tokens of a batch.
  start = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), jnp.zeros(()))
  (grads, tokens), metrics = jax.lax.scan(add_part, start, (jnp.arange(parts), sharding.split_rows(batch, parts)))
  grads = jax.tree.map(lambda g, p: (g / jnp.maximum(tokens, 1.0)).astype(p.dtype), grads, params)
  return grads, jax.tree.map(lambda x: jnp.sum(x, 0), metrics)


def compile_step(
  method: Method,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  seed: int,
  grad_accum: int,
  guard: GuardConfig = guards.DEFAULT,
) -> Any:
  """The jitted update with the state donated. Where the method wants static choices, each choice compiles its own."""
  where = states.shardings(model, optimizer, mesh, guard)
  return jax.jit(
    make_step(method, model, optimizer, seed, grad_accum, guard),
    donate_argnums=0,
    static_argnums=2 if method.static_choice(model) else (),
    out_shardings=(where, sharding.replicated(mesh)),
  )

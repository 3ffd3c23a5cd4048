"""Losses over masked tokens as (sum, count) pairs, and the mean of a loss over several sub-models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive import sharding

SumCount = tuple[jax.Array, jax.Array]
PyTree = Any


def counted(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Whose predictions losses and accuracies are taken over, bool [b, t].

  Those that the field `scored` names, as of the answers to questions; where a batch has none, all but padding. What a
  mask of real tokens means (who is computed, seen or paid for) is `segment_ids > 0` in either case.
  """
  return batch["scored"] > 0 if "scored" in batch else batch["segment_ids"] > 0


def prompt(batch: Mapping[str, jax.Array]) -> jax.Array | None:
  """Which tokens are given, bool [b, t]: those up to the one that predicts the answer's first token.

  A row in which nothing is scored is all prompt. None for a batch without `scored`, in which nothing is an answer.
  """
  if "scored" not in batch:
    return None
  scored = (batch["scored"] > 0).astype(jnp.int32)
  nothing_before = jnp.cumsum(scored, axis=1) == scored  # of a row's earlier tokens, none is scored
  return nothing_before & (batch["segment_ids"] > 0)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy of each token in nats, float32 [b, t], from logits [b, t, v] and targets [b, t]."""
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> SumCount:
  """Sum of the cross entropy over tokens where mask [b, t] is true, and their number."""
  return jnp.sum(token_losses(logits, targets) * mask), jnp.sum(mask, dtype=jnp.float32)


def soft_cross_entropy(logits: jax.Array, teacher: jax.Array, mask: jax.Array, temperature: float = 1.0) -> SumCount:
  """Cross entropy to the teacher's softened distribution, times temperature squared (Hinton et al. 2015, Section 2).

  The teacher's logits [b, t, v] carry no gradient.
  """
  soft = jax.nn.softmax(jax.lax.stop_gradient(teacher) / temperature, axis=-1)
  losses = -jnp.sum(soft * jax.nn.log_softmax(logits / temperature, axis=-1), axis=-1) * temperature**2
  return jnp.sum(losses * mask), jnp.sum(mask, dtype=jnp.float32)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> SumCount:
  """Sum over the masked entries of the cross entropy of sigmoid(logits) to boolean targets, and their number."""
  each = jax.nn.softplus(logits) - logits * targets
  return jnp.sum(each * mask), jnp.sum(mask, dtype=jnp.float32)


def correct(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> SumCount:
  """Number of tokens whose arg max is the target, and the number of tokens."""
  hits = (jnp.argmax(logits, axis=-1) == targets) & mask
  return jnp.sum(hits, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)


def masked_sum(values: jax.Array, mask: jax.Array) -> SumCount:
  """Sum of the values where the mask is true, and their number."""
  return jnp.sum(values * mask, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)


def mean(pair: SumCount) -> jax.Array:
  """sum / count; zero when nothing was counted."""
  return pair[0] / jnp.maximum(pair[1], 1.0)


def totals(measure: Callable, params: PyTree, batches: Sequence[PyTree], mesh: Mesh) -> PyTree:
  """What `measure(params, batch)` finds, as NumPy arrays, added up over batches that lie on a mesh."""
  program = jax.jit(measure, out_shardings=sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    found = [jax.device_get(program(params, batch)) for batch in batches]
  return jax.tree.map(lambda *parts: np.sum(np.stack(parts), axis=0), *found)


def mean_over(loss_fn: Callable, params: PyTree, shared: PyTree, entries: PyTree) -> tuple[jax.Array, PyTree]:
  """Mean of `loss_fn` over entries, one after the other, holding the activations of one at a time.

  This is SortedNet's gradient accumulation over sub-models: the gradient of each entry is taken inside the loop and
  added up in float32 or better, whatever the parameters are stored as, so differentiating the result costs no
  recomputation and one more copy of the gradient.

  Args:
    loss_fn: (params, shared, entry) -> (loss, metrics).
    params: the differentiated argument.
    shared: arrays that every entry sees, such as the batch; not differentiated.
    entries: arrays with a leading axis of n entries, looped over by `lax.scan`; or a list of n static values, for
      which the loop is unrolled.

  Returns:
    Mean loss, and metrics stacked on a leading axis [n].
  """
  unrolled = isinstance(entries, list)
  length = len(entries) if unrolled else jax.tree.leaves(entries)[0].shape[0]

  def loop(step: Callable, start: PyTree, scanned: PyTree) -> tuple[PyTree, PyTree]:
    if not unrolled:
      return jax.lax.scan(step, start, scanned)
    outputs = []
    for entry in entries:
      start, output = step(start, entry)
      outputs.append(output)
    return start, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  @jax.custom_vjp
  def run(params, shared, scanned):
    def step(total, entry):
      loss, metrics = loss_fn(params, shared, entry)
      return total + loss, metrics

    total, metrics = loop(step, jnp.zeros(()), scanned)
    return total / length, metrics

  def forward(params, shared, scanned):
    def step(carry, entry):
      (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, shared, entry)
      return jax.tree.map(jnp.add, carry, (loss, grads)), metrics

    zeros = lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32))
    start = (jnp.zeros(()), jax.tree.map(zeros, params))
    (total, grads), metrics = loop(step, start, scanned)
    return (total / length, metrics), grads

  dtypes = jax.tree.map(lambda p: p.dtype, params)

  def backward(grads, cotangents):
    return jax.tree.map(lambda g, dtype: (g * (cotangents[0] / length)).astype(dtype), grads, dtypes), None, None

  run.defvjp(forward, backward)
  # A custom derivative must not close over traced values, so arrays are passed; static entries are closed over.
  return run(params, shared, None if unrolled else entries)

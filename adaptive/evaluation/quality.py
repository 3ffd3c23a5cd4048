"""Loss, accuracy and agreement of sub-models on the same held-out rows, with one compiled program for all of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive import losses, sharding
from adaptive.methods.contract import Batch, Method, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Quality:
  """What n sub-models did on r rows.

  Attributes:
    losses: summed cross entropy of each row in nats, [n, r]. correct: right top-1 tokens, [n, r].
    agreeing: tokens whose top-1 is the full model's, [n, r]. tokens: predicted tokens of each row, [r].
    commonest: share of the tokens that are the commonest one: the accuracy of a trivial predictor.
    realised: (sum, count) pairs by name of each sub-model: what `Output.aux` measured on all rows.
  """

  losses: np.ndarray
  correct: np.ndarray
  agreeing: np.ndarray
  tokens: np.ndarray
  commonest: float
  realised: tuple[Metrics, ...] = ()

  def loss(self, i: int) -> float:
    """Nats per token."""
    return float(self.losses[i].sum() / self.tokens.sum())

  def accuracy(self, i: int) -> float:
    return float(self.correct[i].sum() / self.tokens.sum())

  def agreement(self, i: int) -> float:
    return float(self.agreeing[i].sum() / self.tokens.sum())

  def realised_means(self, i: int) -> dict[str, float]:
    """What the forward passes of sub-model i measured, such as the share of the tokens that a recursion kept."""
    return {name: float(total / max(count, 1.0)) for name, (total, count) in self.realised[i].items()}

  def paired_error(self, i: int, j: int) -> float:
    """Standard error over rows of loss(i) - loss(j), a ratio estimate; nan for a single row."""
    rows, total = len(self.tokens), self.tokens.sum()
    difference = self.losses[i] - self.losses[j]
    residual = difference - self.tokens * (difference.sum() / total)
    return float(math.sqrt(rows / (rows - 1) * np.sum(residual**2)) / total) if rows > 1 else math.nan


def make_scorer(method: Method, model: nn.Module, mesh: Mesh) -> Callable:
  """Jitted (params, batch, index, reference [b, t]) -> row sums (loss, correct, agreeing, tokens), top-1 and aux."""

  def score(params: Params, batch: Batch, index: jax.Array, reference: jax.Array):
    logits, aux = method.forward(model, params, batch, index)
    mask = losses.counted(batch)
    top = jnp.argmax(logits, axis=-1)
    nll = losses.token_losses(logits, batch["targets"]) * mask
    rows = (nll, (top == batch["targets"]) & mask, (top == reference) & mask, mask)
    return tuple(jnp.sum(x, axis=1, dtype=jnp.float32) for x in rows), top, aux

  rows, tokens = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  return jax.jit(score, out_shardings=(rows, tokens, rows))


def measure(
  method: Method,
  model: nn.Module,
  params: Params,
  batches: Sequence[Batch],
  mesh: Mesh,
  indices: Sequence[int],
  scorer: Callable | None = None,
  report: Callable[[int], None] = lambda done: None,
) -> Quality:
  """Scores sub-models on batches of held-out rows.

  Args:
    indices: positions in `method.submodels(model)`; agreement is with the last one, so put the full model there.
    scorer: of `make_scorer`, to be used again by later calls.
    report: called with the number of sub-models done.
  """
  scorer = scorer or make_scorer(method, model, mesh)
  references = [batch["targets"] for batch in batches]  # placeholders until the full model has been scored
  found, realised = {}, {}
  with jax.set_mesh(mesh):
    for done, index in enumerate(reversed(indices), 1):
      outputs = [scorer(params, batch, np.int32(index), ref) for batch, ref in zip(batches, references)]
      if done == 1:
        references = [top for _, top, _ in outputs]
        outputs = [((*sums[:2], sums[3], sums[3]), top, aux) for sums, top, aux in outputs]  # it agrees with itself
      found[index] = np.concatenate([np.stack(jax.device_get(sums)) for sums, _, _ in outputs], axis=1)
      realised[index] = jax.tree.map(lambda *parts: float(sum(parts)), *[jax.device_get(aux) for *_, aux in outputs])
      report(done)
  scores = np.stack([found[index] for index in indices]).astype(np.float64)
  real = scores[0, 3] > 0  # rows that only fill up the last batch hold no tokens
  loss, correct, agreeing, tokens = np.moveaxis(scores[:, :, real], 1, 0)
  return Quality(loss, correct, agreeing, tokens[0], _commonest(batches, mesh), tuple(realised[i] for i in indices))


def _commonest(batches: Sequence[Batch], mesh: Mesh) -> float:
  look = lambda batch: (batch["targets"], losses.counted(batch))
  everywhere = jax.jit(look, out_shardings=sharding.replicated(mesh))  # a process holds but its own rows
  predicted = []
  for batch in batches:
    targets, mask = jax.device_get(everywhere(batch))
    predicted.append(targets[mask])
  counts = np.bincount(np.concatenate(predicted))
  return float(counts.max() / counts.sum())

"""Log-probabilities of given continuations under a sub-model: what multiple choice and perplexity are made of."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from adaptive import losses, sharding
from adaptive.data.pieces import Piece, continuation
from adaptive.methods.contract import Batch, Method, Params

__all__ = ["Piece", "Score", "Scorer", "continuation"]

_SMALLEST = 32


class Score(NamedTuple):
  """Of a piece: the sum of its scored tokens' log-probabilities, and whether each was the likeliest."""

  log_prob: float
  greedy: bool


class Scorer:
  """Scores pieces in batches of equal length, each length compiled once.

  Args:
    index: of the sub-model. rows: pieces at a time; rounded up to what the mesh divides.
  """

  def __init__(self, method: Method, model: nn.Module, params: Params, index: int, mesh: Mesh, rows: int = 8):
    parts = sharding.batch_parts(mesh)
    self._params, self._mesh, self._rows = params, mesh, -(-rows // parts) * parts

    def score(params: Params, batch: Batch, prompts: bool):
      seen = batch if prompts else {name: rows for name, rows in batch.items() if name != "scored"}
      return score_rows(method.forward(model, params, seen, index).logits, batch["targets"], batch["scored"])

    self._score = jax.jit(score, static_argnums=2, out_shardings=sharding.replicated(mesh))

  def __call__(self, pieces: Sequence[Piece], show: bool = False, prompts: bool = True) -> list[Score]:
    """Scores in the order of the pieces.

    Args:
      show: draws a bar. prompts: whether what is given is a prompt; otherwise pieces are parts of running text.
    """
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].tokens))  # the longest first: memory fails at once
    found: list[Score | None] = [None] * len(pieces)
    with jax.set_mesh(self._mesh), tqdm.tqdm(total=len(pieces), desc="scoring", disable=not show) as bar:
      for start in range(0, len(order), self._rows):
        chosen = order[start : start + self._rows]
        sums, right = self._score(self._params, self._batch([pieces[i] for i in chosen]), prompts)
        for i, total, greedy in zip(chosen, np.asarray(sums), np.asarray(right)):
          found[i] = Score(float(total), bool(greedy))
        bar.update(len(chosen))
    return found

  def _batch(self, pieces: Sequence[Piece]) -> Batch:
    length = _bucket(max(len(piece.tokens) for piece in pieces) - 1)
    return sharding.global_batch(rows_of(pieces, self._rows, length), self._mesh)


def score_rows(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of each row the fields of a `Score`, [b] both, from logits [b, t, v]; `scored` [b, t] says which targets count."""
  right = jnp.argmax(logits, axis=-1) == targets
  return -jnp.sum(losses.token_losses(logits, targets) * scored, axis=1), jnp.all(right | (scored == 0), axis=1)


def rows_of(pieces: Sequence[Piece], rows: int, length: int) -> dict[str, np.ndarray]:
  """Pieces as rows filled up with padding, and those that are missing as rows of it, int32 [rows, length] each.

  `scored` is which predictions count.
  """
  names = ("inputs", "targets", "segment_ids", "positions", "scored")
  batch = {name: np.zeros((rows, length), np.int32) for name in names}
  for i, (tokens, given) in enumerate(pieces):
    size = len(tokens) - 1
    batch["inputs"][i, :size], batch["targets"][i, :size] = tokens[:-1], tokens[1:]
    batch["segment_ids"][i, :size], batch["positions"][i, :size] = 1, np.arange(size)
    batch["scored"][i, given - 1 : size] = 1
  return batch


def _bucket(length: int) -> int:
  """A length at least as long, of few, since each is compiled: steps of a quarter of the next power of two."""
  step = max(_SMALLEST, 1 << max((length - 1).bit_length() - 2, 0))
  return -(-length // step) * step

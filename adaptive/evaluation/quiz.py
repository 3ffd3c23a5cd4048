"""Questions put to several contenders in turns: what they answer, how many layers they run, and how long they take.

A contender is a sub-model, its twin that decides by chance, or a fixed path of layers. All see one question after the
other, its options as the rows of one batch, so what a contender leaves out is time that it saves, and each is timed
beside the others.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from adaptive import sharding
from adaptive.data.pieces import Piece
from adaptive.evaluation import likelihood
from adaptive.methods.contract import Batch, Metrics, Output, Params

STRIDE = 16  # rows are filled up to its multiples: each length is compiled once
CHANCE = "chance, as "  # what the name of a twin that decides by chance begins with
_RESAMPLED = 10_000
_AT_ONCE = 1 << 22  # differences that are held at a time


class Contender(NamedTuple):
  """Who is asked.

  Attributes:
    name: of its line in the table. params: for `forward`.
    forward: (params, batch, index) -> logits; contenders that share the function share its programs.
    index: of the sub-model; None where `forward` knows only one.
    layers: that every token runs, where `forward` does not measure it; nan where that is not known either.
  """

  name: str
  params: Params
  forward: Callable[[Params, Batch, Any], Output]
  index: int | None
  layers: float = np.nan


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a contender made of q questions.

  Attributes:
    log_probs, greedy: of each question's options [o]: their tokens' summed log-probability, and whether each token is
      the likeliest.
    realised: of each question, what `Output.aux` measured. seconds: [q] of each question.
  """

  log_probs: list[np.ndarray]
  greedy: list[np.ndarray]
  realised: list[Metrics]
  seconds: np.ndarray


def ask(
  contenders: Sequence[Contender],
  questions: Sequence[Sequence[Piece]],
  mesh: Mesh,
  report: Callable[[], None] = lambda: None,
) -> list[Answers]:
  """Puts every question to every contender, whose order changes from question to question.

  Args:
    questions: each one's options, after their prompt. report: called after every question.
  """
  parts, most = sharding.batch_parts(mesh), max(map(len, questions))
  rows = -(-most // parts) * parts
  programs = {contender.forward: jax.jit(_scored(contender.forward)) for contender in contenders}
  found = [Answers([], [], [], np.zeros(len(questions))) for _ in contenders]
  warm: set[tuple[Callable, int]] = set()
  with jax.set_mesh(mesh):
    for number, pieces in enumerate(questions):
      length = -(-max(len(piece.tokens) - 1 for piece in pieces) // STRIDE) * STRIDE
      batch = sharding.global_batch(likelihood.rows_of(pieces, rows, length), mesh)
      for place in range(len(contenders)):
        which = (place + number) % len(contenders)
        one = contenders[which]
        index = None if one.index is None else np.int32(one.index)
        run = lambda one=one, index=index, batch=batch: programs[one.forward](one.params, batch, index)
        if (one.forward, length) not in warm:
          jax.block_until_ready(run())
          warm.add((one.forward, length))
        began = time.perf_counter()
        sums, greedy, aux = jax.device_get(jax.block_until_ready(run()))
        found[which].seconds[number] = time.perf_counter() - began
        found[which].log_probs.append(np.asarray(sums[: len(pieces)], np.float64))
        found[which].greedy.append(greedy[: len(pieces)])
        found[which].realised.append(aux)
      report()
  return found


def _scored(forward: Callable[[Params, Batch, Any], Output]) -> Callable:
  def score(params: Params, batch: Batch, index: jax.Array | None):
    logits, aux = forward(params, batch, index)
    return *likelihood.score_rows(logits, batch["targets"], batch["scored"]), aux

  return score


def added(realised: Sequence[Metrics]) -> Metrics:
  """Of several questions together."""
  return jax.tree.map(lambda *parts: float(sum(parts)), *realised) if realised else {}


@dataclasses.dataclass
class Line:
  """What is told of one contender.

  Attributes:
    rewards, layers, seconds: of each question; layers are nan where nothing says how many ran.
    against: mean difference of the rewards to the full model's, and its 95 % interval. time: share of the full model's.
  """

  name: str
  rewards: np.ndarray
  layers: np.ndarray
  seconds: np.ndarray
  against: tuple[float, float, float] = (0.0, 0.0, 0.0)
  time: float = 1.0


def interval(rewards: np.ndarray, others: np.ndarray | float, seed: int = 0) -> tuple[float, float, float]:
  """Mean difference of the rewards [q] of two contenders, and its 95 % interval: questions drawn anew, in pairs."""
  difference, rng = rewards - others, np.random.default_rng(seed)
  number, means = len(difference), []
  while len(means) < _RESAMPLED:
    draws = min(max(_AT_ONCE // number, 1), _RESAMPLED - len(means))
    means.extend(difference[rng.integers(0, number, (draws, number))].mean(1))
  low, high = np.quantile(means, (0.025, 0.975))
  return float(difference.mean()), float(low), float(high)

"""One compiled program that runs any layers any number of times: many questions, each on a path of its own, per call.

Layers are scanned, and in each of them the pairs of question and path take turns: a layer's weights are read once for
all of them. A pair costs the visits that it makes, and less: two paths agree up to some layer, and what enters the
layers is kept for the paths that a question was scored on last, so a new one begins where it first differs.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.attention import Context, rope_table
from adaptive.backbone.transformer import Block, Params, Transformer
from adaptive.config import ModelConfig
from adaptive.search.trees import Tree
from adaptive.search.visits import Visits

KEPT = 6  # paths of a question whose streams are kept
_READ_TOGETHER = 4  # pairs whose predictions are read as one batch


class Options(NamedTuple):
  """What a path makes of a question, for each of its options.

  Attributes:
    log_probs: of all its tokens together. tokens: how many those are. greedy: whether each of them is the likeliest.
  """

  log_probs: np.ndarray
  tokens: np.ndarray
  greedy: np.ndarray


class PathScorer:
  """Scores (question, path) pairs.

  Args:
    config, params: of a dense model.
    trees: questions, which requests name by their index.
    pairs: in one call of the program. Fewer are filled up with pairs that make no visit.
    together: pairs that run a layer as one batch, where any of them does: 1 suits a CPU, which one row keeps busy.
    kept: paths of each question whose streams are kept.

  Attributes:
    visits: layer visits that requests asked for. computed: those that were made. scored: requests.
    programs: that were compiled. rate: requests in a second, of the calls that compiled nothing.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    trees: Sequence[Tree],
    pairs: int = 16,
    together: int = 1,
    kept: int = KEPT,
  ):
    self._config, self._params, self._trees = config, params, trees
    self._together, self._pairs, self._kept = together, -(-pairs // together) * together, kept
    self._options = max(len(tree.sizes) for tree in trees)
    self._program = jax.jit(lambda params, rows: _score(config, self._options, together, params, rows))
    self._streams: dict[int, OrderedDict[Visits, np.ndarray]] = {}
    self._shapes: set[tuple[int, int]] = set()
    self.visits = self.computed = self.scored = self._warm = 0
    self._seconds = 0.0

  @property
  def programs(self) -> int:
    return len(self._shapes)

  @property
  def rate(self) -> float:
    return self._warm / self._seconds if self._seconds else 0.0

  def __call__(self, requests: Sequence[tuple[int, Visits]]) -> list[Options]:
    """In the order of the requests."""
    found: list[Options | None] = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: self._trees[requests[i][0]].shape)
    start = 0
    while start < len(order):
      shape = self._trees[requests[order[start]][0]].shape
      same = [i for i in order[start : start + self._pairs] if self._trees[requests[i][0]].shape == shape]
      for i, options in zip(same, self._call(shape, [requests[i] for i in same])):
        found[i] = options
      start += len(same)
    return found

  def forget(self, question: int) -> None:
    """Frees the streams of a question that is done."""
    self._streams.pop(question, None)

  def _call(self, shape: tuple[int, int], requests: Sequence[tuple[int, Visits]]) -> list[Options]:
    layers, width = self._config.num_layers, self._config.d_model
    filling = self._pairs - len(requests)
    trees = [self._trees[question] for question, _ in requests]
    stack = lambda name: np.stack([getattr(tree, name) for tree in trees] + [getattr(trees[0], name)] * filling)
    rows = {name: stack(name) for name in ("inputs", "positions", "options", "source", "target", "scored")}
    begun = [self._begin(question, visits) for question, visits in requests]
    rows["scored"][len(requests) :] = 0
    rows["visits"] = np.zeros((self._pairs, layers), np.int32)
    rows["start"] = np.zeros((self._pairs,), np.int32)
    rows["stream"] = np.zeros((self._pairs, shape[0], width), self._config.dtype)
    for i, ((_, visits), (start, streams)) in enumerate(zip(requests, begun)):
      rows["visits"][i, start:] = visits[start:]
      rows["start"][i] = start
      if start:
        rows["stream"][i] = streams[start]
      self.visits, self.computed = self.visits + sum(visits), self.computed + sum(visits[start:])
    began, fresh = time.monotonic(), shape not in self._shapes
    log_probs, greedy, streams = jax.block_until_ready(self._program(self._params, rows))
    self._shapes.add(shape)
    self.scored += len(requests)
    if not fresh:
      self._warm, self._seconds = self._warm + len(requests), self._seconds + time.monotonic() - began
    log_probs, greedy, streams = np.asarray(log_probs), np.asarray(greedy), np.asarray(streams)
    for i, ((question, visits), (start, before)) in enumerate(zip(requests, begun)):
      self._keep(question, visits, start, before, streams[:, i])
    log_probs = np.where(np.isnan(log_probs), -np.inf, log_probs)  # of a path that overflows: nothing is likely
    each = enumerate(tree.sizes for tree in trees)
    return [Options(log_probs[i, : len(n)].astype(np.float64), n, greedy[i, : len(n)]) for i, n in each]

  def _begin(self, question: int, visits: Visits) -> tuple[int, np.ndarray | None]:
    """The layer from which on a path has to be run, and the streams that enter layers before and there."""
    best, streams = 0, None
    kept = self._streams.get(question, {})
    for path in kept:
      same = next((i for i, (a, b) in enumerate(zip(path, visits)) if a != b), len(visits) - 1)
      if same > best:
        best, streams = same, kept[path]
    return best, streams

  def _keep(self, question: int, visits: Visits, start: int, before: np.ndarray | None, after: np.ndarray) -> None:
    """Streams [l, t, d] that enter each layer on a path; before `start` they are those of the path that it left."""
    if not self._kept:
      return
    kept = self._streams.setdefault(question, OrderedDict())
    kept[visits] = after.copy() if before is None else np.concatenate([before[:start], after[start:]])
    if len(kept) > self._kept:  # the first, the default path, stays
      kept.pop(next(path for i, path in enumerate(kept) if i == 1))


def _score(config: ModelConfig, options: int, together: int, params: Params, rows: dict[str, jax.Array]):
  """Log-probabilities and greediness [n, o], and the stream that enters each layer, [l, n, t, d]."""
  model, block = Transformer(config), Block(config)
  split = lambda leaf: leaf.reshape(-1, together, *leaf.shape[1:])
  rows = jax.tree.map(split, rows)
  embed = lambda tokens: model.apply({"params": params}, tokens, method=lambda m, t: m.embedding.encode(t))
  begin = lambda r: jnp.where((r["start"] == 0)[:, None, None], embed(r["inputs"]), r["stream"])
  x = jax.lax.map(begin, {name: rows[name] for name in ("start", "inputs", "stream")})

  def layer(x, inputs):
    weights, visits = inputs  # none before a pair's start

    def some(inputs):
      x, positions, readers, number = inputs
      context = Context(*rope_table(config, positions), tree_mask(readers))

      def visit(i, x):
        y, _ = block.apply({"params": weights}, x, context)
        return jnp.where((i < number)[:, None, None], y, x)

      return jax.lax.fori_loop(0, jnp.max(number), visit, x)

    return jax.lax.map(some, (x, rows["positions"], rows["options"], visits)), x

  x, streams = jax.lax.scan(layer, x, (params["layers"], jnp.moveaxis(rows["visits"], 2, 0)))

  def read(inputs):
    x, source, target, scored = inputs
    x = jnp.take_along_axis(x, source[..., None], axis=1)
    logits = model.apply({"params": params}, x, method="head")
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
    own = (scored[..., None] >> jnp.arange(options)[None, None] & 1).astype(chosen.dtype)  # 0: only filling
    wrong = (jnp.argmax(logits, axis=-1) != target).astype(jnp.float32)
    return jnp.einsum("np,npo->no", chosen, own), jnp.einsum("np,npo->no", wrong, own) == 0

  join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])
  # The head's weights are most of what a few predictions read.
  at_once = math.gcd(_READ_TOGETHER, join(x).shape[0])
  few = lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[2:])
  nothing = jnp.zeros((at_once, options)), jnp.zeros((at_once, options), bool)
  some = lambda inputs: jax.lax.cond(jnp.any(inputs[-1] != 0), read, lambda _: nothing, inputs)
  found = jax.lax.map(some, jax.tree.map(few, (x, rows["source"], rows["target"], rows["scored"])))
  return *map(join, found), streams.reshape(streams.shape[0], -1, *streams.shape[3:])


def tree_mask(options: jax.Array) -> jax.Array:
  """Which keys a token sees, bool [b, 1, t, t]: earlier ones that are read by all options that read it.

  options: bit masks [b, t]. Options that part never meet again, so those keys are the token's own beginning.
  """
  length = options.shape[1]
  query, key = options[:, :, None], options[:, None, :]
  return (query & key == query)[:, None] & jnp.tril(jnp.ones((length, length), bool))[None, None]

"""Passes of a shared block once more, in NumPy float64: token after token, pass after pass, with a book of keys.

Written from the papers and from the table of rules in `adaptive.depth.visits`, not from `adaptive.depth.exits`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy_transformer as plain
import slow_visits


class Model(NamedTuple):
  """A prelude of layers, then passes of a block.

  `start` (e, position) and `enter` (s, e) are of the state, `decide` (pass from 1, state, state before, logits, logits
  before, what it returned last) -> (whether the token halts, what to remember). `weigh`, if any, turns the states and
  what was remembered, from the first pass to the last one made, into what the head reads.
  """

  prelude: int
  block: int
  passes: int
  kv: str
  decide: Callable
  start: Callable = lambda e, position: e
  enter: Callable = lambda s, e: s
  weigh: Callable = lambda states, memories: states[-1]


def run(config, params, batch, model):
  """Logits [b, t, v] and the passes of each token [b, t]."""
  params = plain._as_float64(params)
  rows = [
    _row(config, params, model, *map(np.asarray, row))
    for row in zip(batch["inputs"], batch["segment_ids"], batch["positions"])
  ]
  return tuple(map(np.stack, zip(*rows)))


def _row(config, params, model, tokens, segments, positions):
  book, found, passes = {}, [], []
  for t in range(len(tokens)):
    token = _Token(config, params, model, book, segments, positions, t)
    logits, number = token.climb(params["embedding"]["table"][tokens[t]].copy())
    found.append(logits)
    passes.append(number)
  return np.stack(found), np.array(passes)


class _Token:
  def __init__(self, config, params, model, book, segments, positions, t):
    self.config, self.params, self.model, self.book = config, params, model, book
    self.segments, self.positions, self.t = segments, positions, t
    self.newest, self.newest_of = None, {}

  def weights(self, layer):
    return plain._layer(self.params["layers"], layer)

  def head(self, x):
    head = self.params["embedding"]["table"].T if self.config.tied_embeddings else self.params["embedding"]["head"]
    return plain._rms(x, self.params["final_norm"]["scale"], self.config.norm_eps) @ head

  def visit(self, layer, number, x):
    page = self.book.setdefault((layer, number), {})
    page[self.t] = slow_visits._key_value(self.config, self.weights(layer), x, self.positions[self.t])
    self.newest = self.newest_of[layer] = page[self.t]
    seen = [page[s] for s in range(self.t + 1) if s in page and self.segments[s] == self.segments[self.t]]
    return slow_visits._block(self.config, self.weights(layer), x, self.positions[self.t], seen)

  def stay_away(self, layer, number, x):
    page = self.book.setdefault((layer, number), {})
    match self.model.kv:
      case "project":
        page[self.t] = slow_visits._key_value(self.config, self.weights(layer), x, self.positions[self.t])
      case "copy":
        page[self.t] = self.newest
      case "latest":
        page[self.t] = self.newest_of[layer]

  def climb(self, x):
    model, before, memory = self.model, (x, None), 0.0
    for layer in range(model.prelude):
      x = self.visit(layer, 0, x)
    e, s = x, model.start(x, self.positions[self.t])
    states, memories, halted = [], [], False
    for number in range(model.passes):
      x = model.enter(s, e)
      for layer in range(model.prelude, model.prelude + model.block):
        if halted:
          self.stay_away(layer, number, x)
        else:
          x = self.visit(layer, number, x)
      if not halted:
        s, logits = x, self.head(x)
        halted, memory = model.decide(number + 1, s, before[0], logits, before[1], memory)
        before = s, logits
        states.append(s)
        memories.append(memory)
    return self.head(model.weigh(states, memories)), len(states)

"""Mixture-of-Depths once more, in NumPy: row by row, layer by layer, with lists of the positions that a layer takes.

Written from the paper (arXiv 2404.02258), not from `adaptive.methods`. Numbers are complex, as in `slow_rows`; what
carries no gradient reads real parts only.
"""

import math

import numpy as np
import slow_rows


def run(model, params, batch, dial=None):
  """(logits [b, t, v], loss of the routers); and of each row and each routed layer the positions that it took.

  Args:
    dial: of a sub-model, under the causal rule; None is training, with top-k.
  """
  rows = [_Row(model, params, row, dial) for row in slow_rows.rows_of(batch)]
  method, loss = model.method, 0.0
  for entries in zip(*(row.judged for row in rows)):
    seen = [entry for row in entries for entry in row]
    entropy = sum(np.log(1 + np.exp(-score if chosen else score)) for score, chosen in seen) / len(seen)
    loss += (1.0 if method.inference == "predictor" else method.router_loss) * entropy
  return np.stack([row.logits for row in rows]), loss, [row.taken for row in rows]


class _Row(slow_rows.Row):
  """One row's forward pass.

  Attributes:
    logits: [t, v]. taken: positions by routed layer. judged: by routed layer, (score that decides at inference, whether
      the token was taken) of each real token.
  """

  def __init__(self, model, params, row, dial):
    super().__init__(model.config, params, row)
    method, stream, everyone = model.method, self.stream, list(range(self.length))
    self.taken, self.judged = [], []
    for index in range(model.config.num_layers):
      if index not in (method.routed or range(method.every - 1, model.config.num_layers, method.every)):
        stream = self.layer(index, stream, everyone)
        continue
      which = len(self.taken)
      score = {t: self.router("routers", which, stream[t])[0] for t in everyone}
      decision = score
      if method.inference == "predictor":
        decision = {t: self.router("predictors", which, stream[t].real)[0] for t in everyone}
      if dial is None:
        taken = self.top(score, method.capacity, method.capacity_chunk)
      else:
        taken = self.passing(decision, method.capacity, **dial)
      self.taken.append(taken)
      self.judged.append([(decision[t], t in taken) for t in everyone if self.segments[t] > 0])
      outputs = self.layer(index, [stream[t] for t in taken], taken) if taken else []
      for t, output in zip(taken, outputs):
        stream[t] = stream[t] + _gate(method.gate, score[t]) * (output - stream[t])
    self.logits = self.head(stream)

  def passing(self, decision, capacity, score_shift=0.0, capacity_scale=math.inf):
    """Token after token: those above the threshold, as long as their document has room for them."""
    passed, document = [], {}
    for t in range(self.length):
      number = document.get(self.segments[t], 0)
      room = (
        number < math.ceil(round(capacity_scale * capacity * (self.positions[t] + 1), 6)) if capacity_scale < 1 else 1
      )
      if self.segments[t] > 0 and decision[t] + score_shift > 0 and room:
        document[self.segments[t]] = number + 1
        passed.append(t)
    return passed


def _gate(kind, score):
  match kind:
    case "score":
      return score
    case "sigmoid":
      return 1 / (1 + np.exp(-score))
    case "tanh":
      return np.tanh(score)
    case "none":
      return 1.0

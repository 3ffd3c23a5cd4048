"""Mixture-of-Recursions' training pass once more, in NumPy: row by row and head by head, with lists of positions.

Written from the paper (arXiv 2507.10524), not from `adaptive.methods`: no scan, no gather, no sort of an array. Numbers
are complex, as in `slow_rows`; what carries no gradient reads real parts only.
"""

import numpy as np
import slow_rows


def run(model, params, batch):
  """(logits [b, t, v], router losses), complex, and for each row and each recursion the list of positions that it ran.

  Parameters may be complex.
  """
  rows = [_Row(model, params, row) for row in slow_rows.rows_of(batch)]
  return np.stack([row.logits for row in rows]), _router_losses(model.method, rows), [row.chosen for row in rows]


class _Row(slow_rows.Row):
  """One row's forward pass.

  Attributes:
    logits: [t, v]. chosen: positions by recursion. scores: what routers said of real candidates, as `_router_losses`
      reads it.
  """

  def __init__(self, model, params, row):
    super().__init__(model.config, params, row)
    self.method, stream = model.method, self.stream
    self.chosen, self.scores, self.base = [], [], {}
    everyone = list(range(self.length))
    before, block, after = _cut(model)
    for layer in before:
      stream = self.layer(layer, stream, everyone)
    stream = self.expert_choice(block, stream) if self.method.expert_choice else self.token_choice(block, stream)
    for layer in after:
      stream = self.layer(layer, stream, everyone)
    self.logits = self.head(stream)

  def expert_choice(self, block, stream):
    method, active = self.method, list(range(self.length))
    for r, share in enumerate(method.capacities):
      score = {t: self.router("router", r, stream[t])[0] for t in active}
      judged = score
      if method.inference == "aux_router":
        judged = {t: self.router("aux_router", r, stream[t].real)[0] for t in active}
      chosen = self.top(score, share, method.capacity_chunk)
      self.chosen.append(chosen)
      self.scores.append([(judged[t], score[t], t in chosen) for t in active if self.segments[t] > 0])
      outputs = self.block(r, block, [stream[t] for t in chosen], chosen)
      for t, output in zip(chosen, outputs):
        function = np.tanh(score[t]) if method.gate == "tanh" else 1 / (1 + np.exp(-score[t]))
        weight = method.alpha * function if method.gating == "weighted" else 1.0
        stream[t] = stream[t] + weight * output
      active = chosen
    return stream

  def token_choice(self, block, stream):
    method, start = self.method, list(stream)
    gates, depth, last = [], [], {}
    for t in range(self.length):
      scores = self.router("router", 0, stream[t])
      soft = np.exp(scores) / np.sum(np.exp(scores))
      gates.append(method.alpha * (soft if method.gate == "softmax" else 1 / (1 + np.exp(-scores))))
      bias = self.params["router"]["bias"].real if method.balance == "loss_free" else 0.0
      depth.append(int(np.argmax(gates[t].real + bias)))
      if self.segments[t] > 0:
        self.scores.append((scores, gates[t], depth[t]))
    active = [t for t in range(self.length) if self.segments[t] > 0]
    for r in range(method.num_recursions):
      active = [t for t in active if depth[t] >= r]
      if method.capacities:
        active = active[: max(1, int(round(method.capacities[r] * self.length, 6)))]
      self.chosen.append(active)
      outputs = self.block(r, block, [stream[t] for t in active], active) if active else []
      for t, output in zip(active, outputs):
        stream[t] = gates[t][r] * output if method.composition == "every" else output
        last[t] = r
    for t, r in last.items():
      stream[t] = start[t] + (gates[t][r] * stream[t] if method.composition == "last" else stream[t])
    return stream

  def router(self, name, which, x):
    return super().router(name, which, x / self.method.temperature)

  def block(self, recursion, layers, xs, chosen):
    for layer in layers:
      xs = self.layer(layer, xs, chosen, recursion)
    return xs

  def keys(self, which, weights, normed, at, recursion):
    """Under the key/value rule of the shared block; `recursion` is None outside of it."""
    rule = "recursion_wise" if recursion is None else self.method.kv_cache
    if rule == "shared" and recursion > 0:
      return self.base[which]
    fresh = super().keys(which, weights, normed, at, recursion)
    if rule == "recursion_wise":
      return fresh
    if recursion == 0:
      self.base[which] = fresh
      return fresh
    key, value, everyone = self.base[which]
    key, value = key.copy(), value.copy()
    for i, t in enumerate(at):
      key[everyone.index(t)], value[everyone.index(t)] = fresh[0][i], fresh[1][i]
    return key, value, everyone


def _cut(model):
  """Unique layers before the loop, of the block, and after it."""
  layers, repeats = model.config.num_layers, model.method.num_recursions
  if model.method.sharing == "cycle":
    return [], list(range(layers // repeats)), []
  size = (layers - 2) // repeats
  return [0], list(range(1, 1 + size)), [1 + size]


def _router_losses(method, rows):
  """Means over the real tokens of all rows."""
  total = 0.0
  if method.expert_choice:
    for r in range(method.num_recursions):
      seen = [entry for row in rows for entry in row.scores[r]]
      entropies = [np.log(1 + np.exp(-score if chosen else score)) for score, _, chosen in seen]
      total += (1.0 if method.inference == "aux_router" else method.router_loss) * sum(entropies) / len(seen)
      total += method.z_loss * sum(score**2 for _, score, _ in seen) / len(seen)
    return total
  seen = [entry for row in rows for entry in row.scores]
  total += method.z_loss * sum(np.log(np.sum(np.exp(scores))) ** 2 for scores, _, _ in seen) / len(seen)
  if method.balance == "loss":
    for i in range(method.num_recursions):
      share = sum(depth == i for _, _, depth in seen) / len(seen)
      mean_gate = sum(gates[i] for _, gates, _ in seen) / len(seen)
      total += method.balance_loss * method.num_recursions * share * mean_gate
  return total

"""Mixture-of-Recursions' training pass once more, in NumPy: row by row and head by head, with lists of positions.

Written from the paper (arXiv 2507.10524), not from `adaptive.methods`: no scan, no gather, no sort of an array. It
computes in complex numbers, for derivatives by the complex step: the imaginary part of f(x + i e d) / e is the
derivative of f along d, exact to rounding, when e is as small as 1e-30. What decides (who is chosen, who is seen) reads
real parts only, and so does what carries no gradient.
"""

import math

import numpy as np
import scipy.special

EPSILON = 1e-30


def run(model, params, batch):
  """(logits [b, t, v], router losses), complex, and for each row and each recursion the list of positions that it ran.

  Parameters may be complex.
  """
  parts = [dict(zip(batch, row)) for row in zip(*(np.asarray(part) for part in batch.values()))]
  rows = [_Row(model, params, row) for row in parts]
  return np.stack([row.logits for row in rows]), _router_losses(model.method, rows), [row.chosen for row in rows]


class _Row:
  """One row's forward pass.

  Attributes:
    logits: [t, v]. chosen: positions by recursion. scores: what routers said of real candidates, as `_router_losses`
      reads it.
  """

  def __init__(self, model, params, row):
    self.config, self.method, self.params = model.config, model.method, params
    self.segments, self.positions = row["segment_ids"], row["positions"]
    self.length, self.chosen, self.scores, self.base = len(self.segments), [], [], {}
    stream = [params["embedding"]["table"][token] for token in row["inputs"]]
    everyone = list(range(self.length))
    before, block, after = _cut(model)
    for layer in before:
      stream = self.layer(layer, stream, everyone)
    stream = self.expert_choice(block, stream) if self.method.expert_choice else self.token_choice(block, stream)
    for layer in after:
      stream = self.layer(layer, stream, everyone)
    self.logits = _rms(np.stack(stream), params["final_norm"]["scale"], self.config) @ params["embedding"]["table"].T

  def expert_choice(self, block, stream):
    method, active = self.method, list(range(self.length))
    for r, share in enumerate(method.capacities):
      score = {t: self.router("router", r, stream[t])[0] for t in active}
      judged = score
      if method.inference == "aux_router":
        judged = {t: self.router("aux_router", r, stream[t].real)[0] for t in active}
      chosen = []
      for piece in self.pieces():
        known = {t: score[t].real if self.segments[t] > 0 else -math.inf for t in active if t in piece}
        best = sorted(known, key=lambda t: (-known[t], t))
        chosen += sorted(best[: self.places(share, len(piece))])
      self.chosen.append(chosen)
      self.scores.append([(judged[t], score[t], t in chosen) for t in active if self.segments[t] > 0])
      outputs = self.block(r, block, [stream[t] for t in chosen], chosen)
      for t, output in zip(chosen, outputs):
        function = np.tanh(score[t]) if method.gate == "tanh" else 1 / (1 + np.exp(-score[t]))
        weight = method.alpha * function if method.gating == "weighted" else 1.0
        stream[t] = stream[t] + weight * output
      active = chosen
    return stream

  def pieces(self):
    size = self.method.capacity_chunk or self.length
    return [range(start, start + size) for start in range(0, self.length, size)]

  def places(self, share, size):
    """Tokens of a piece that are taken: of chunks rounded up, of whole rows rounded down."""
    exact = round(share * size, 6)
    return max(1, math.ceil(exact) if self.method.capacity_chunk else math.floor(exact))

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
        active = active[: self.places(method.capacities[r], self.length)]
      self.chosen.append(active)
      outputs = self.block(r, block, [stream[t] for t in active], active) if active else []
      for t, output in zip(active, outputs):
        stream[t] = gates[t][r] * output if method.composition == "every" else output
        last[t] = r
    for t, r in last.items():
      stream[t] = start[t] + (gates[t][r] * stream[t] if method.composition == "last" else stream[t])
    return stream

  def router(self, name, which, x):
    weights, x = self.params[name], x / self.method.temperature
    if self.method.router != "linear":
      x = x @ weights["hidden"][which]
      x = x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2)))
    return x @ weights["weight"][which]

  def block(self, recursion, layers, xs, chosen):
    for layer in layers:
      xs = self.layer(layer, xs, chosen, recursion)
    return xs

  def layer(self, index, xs, at, recursion=None):
    """One layer for the tokens at some positions; `recursion` is None outside of the shared block."""
    config, layers = self.config, self.params["layers"]
    weights = {
      name: leaf["scale"][index] if name.endswith("_norm") else leaf[index]
      for part in ("attention", "mlp")
      for name, leaf in layers[part].items()
    }
    x = np.stack(xs)
    normed = _rms(x, layers["attention_norm"]["scale"][index], config)
    for head in range(config.num_heads):
      group, member = divmod(head, config.num_heads // config.num_kv_heads)
      query = normed @ weights["query"][:, group, member]
      if config.qkv_bias:
        query = query + weights["query_bias"][group, member]
      query = self.rotate(_rms(query, weights["query_norm"], config) if config.qk_norm else query, at)
      key, value, keys_at = self.keys((index, group), weights, normed, at, recursion)
      for i, t in enumerate(at):
        seen = [j for j, s in enumerate(keys_at) if s <= t and self.segments[s] == self.segments[t]]
        scores = key[seen] @ query[i] / math.sqrt(config.head_size)
        powers = np.exp(scores - max(scores.real))
        x[i] += powers / sum(powers) @ value[seen] @ weights["out"][group, member]
    normed = _rms(x, layers["mlp_norm"]["scale"][index], config)
    for m in range(config.ff_groups):
      gate = normed @ weights["gate"][:, m]
      x = x + gate / (1 + np.exp(-gate)) * (normed @ weights["up"][:, m]) @ weights["down"][m]
    return list(x)

  def keys(self, which, weights, normed, at, recursion):
    """Keys and values that the heads of one group of a layer read, and the positions that they are of."""
    rule, group = "recursion_wise" if recursion is None else self.method.kv_cache, which[1]
    if rule == "shared" and recursion > 0:
      return self.base[which]
    key, value = normed @ weights["key"][:, group], normed @ weights["value"][:, group]
    if self.config.qkv_bias:
      key, value = key + weights["key_bias"][group], value + weights["value_bias"][group]
    fresh = self.rotate(_rms(key, weights["key_norm"], self.config) if self.config.qk_norm else key, at), value, at
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

  def rotate(self, x, at):
    """[n, h]: the pairs (i, i + h / 2) turned by the tokens' positions in their documents."""
    half = x.shape[1] // 2
    angles = np.array([[self.positions[t] * self.config.rope_theta ** (-i / half) for i in range(half)] for t in at])
    real, imaginary = x[:, :half], x[:, half:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=1)


def _cut(model):
  """Unique layers before the loop, of the block, and after it."""
  layers, repeats = model.config.num_layers, model.method.num_recursions
  if model.method.sharing == "cycle":
    return [], list(range(layers // repeats)), []
  size = (layers - 2) // repeats
  return [0], list(range(1, 1 + size)), [1 + size]


def _rms(x, scale, config):
  return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + config.norm_eps) * scale


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

"""A row of tokens and the layers of the transformer in NumPy, head by head, for slow passes of methods that route.

A layer runs on the tokens at some positions, given as a list, which see each other and nobody else. It computes in
complex numbers, for derivatives by the complex step: the imaginary part of f(x + i e d) / e is the derivative of f
along d, exact to rounding, when e is as small as 1e-30. What decides (who is chosen, who is seen) reads real parts.
"""

import math

import jax
import numpy as np
import scipy.special

EPSILON = 1e-30


def rows_of(batch):
  """The rows of a batch, each a dict as the batch is."""
  return [dict(zip(batch, row)) for row in zip(*(np.asarray(part) for part in batch.values()))]


def slope(function, params, number, along):
  """How a function of parameters grows when one of their leaves, counted from 0, moves along a direction."""
  leaves, tree = jax.tree.flatten(params)
  leaves[number] = leaves[number] + 1j * EPSILON * along
  return function(tree.unflatten(leaves)).imag / EPSILON


class Row:
  """One row. Parameters may be complex."""

  def __init__(self, config, params, row):
    self.config, self.params = config, params
    self.segments, self.positions = row["segment_ids"], row["positions"]
    self.length = len(self.segments)
    self.stream = [params["embedding"]["table"][token] for token in row["inputs"]]

  def top(self, scores, share, chunk):
    """The positions of the best of each piece of the row, among those that have a score (a dict); padding is last."""
    size, chosen = chunk or self.length, []
    exact = round(share * size, 6)
    places = max(1, math.ceil(exact) if chunk else math.floor(exact))  # of chunks rounded up, of rows rounded down
    for start in range(0, self.length, size):
      piece = range(start, start + size)
      known = {t: s.real if self.segments[t] > 0 else -math.inf for t, s in scores.items() if t in piece}
      chosen += sorted(sorted(known, key=lambda t: (-known[t], t))[:places])
    return chosen

  def router(self, name, which, x):
    """Scores [outputs] of one token."""
    weights = self.params[name]
    if "hidden" in weights:
      x = x @ weights["hidden"][which]
      x = x * 0.5 * (1 + scipy.special.erf(x / math.sqrt(2)))
    return x @ weights["weight"][which]

  def head(self, stream):
    """[t, v]."""
    return rms(np.stack(stream), self.params["final_norm"]["scale"], self.config) @ self.params["embedding"]["table"].T

  def layer(self, index, xs, at, recursion=None):
    """One layer for the tokens xs at some positions; `recursion` is for `keys`."""
    config, layers = self.config, self.params["layers"]
    weights = {
      name: leaf["scale"][index] if name.endswith("_norm") else leaf[index]
      for part in ("attention", "mlp")
      for name, leaf in layers[part].items()
    }
    x = np.stack(xs)
    normed = rms(x, layers["attention_norm"]["scale"][index], config)
    for head in range(config.num_heads):
      group, member = divmod(head, config.num_heads // config.num_kv_heads)
      query = normed @ weights["query"][:, group, member]
      if config.qkv_bias:
        query = query + weights["query_bias"][group, member]
      query = self.rotate(rms(query, weights["query_norm"], config) if config.qk_norm else query, at)
      key, value, keys_at = self.keys((index, group), weights, normed, at, recursion)
      for i, t in enumerate(at):
        seen = [j for j, s in enumerate(keys_at) if s <= t and self.segments[s] == self.segments[t]]
        scores = key[seen] @ query[i] / math.sqrt(config.head_size)
        powers = np.exp(scores - max(scores.real))
        x[i] += powers / sum(powers) @ value[seen] @ weights["out"][group, member]
    normed = rms(x, layers["mlp_norm"]["scale"][index], config)
    for m in range(config.ff_groups):
      gate = normed @ weights["gate"][:, m]
      x = x + gate / (1 + np.exp(-gate)) * (normed @ weights["up"][:, m]) @ weights["down"][m]
    return list(x)

  def keys(self, which, weights, normed, at, recursion):
    """Keys and values that the heads of one group of a layer read, and the positions that they are of."""
    group = which[1]
    key, value = normed @ weights["key"][:, group], normed @ weights["value"][:, group]
    if self.config.qkv_bias:
      key, value = key + weights["key_bias"][group], value + weights["value_bias"][group]
    return self.rotate(rms(key, weights["key_norm"], self.config) if self.config.qk_norm else key, at), value, at

  def rotate(self, x, at):
    """[n, h]: the pairs (i, i + h / 2) turned by the tokens' positions in their documents."""
    half = x.shape[1] // 2
    angles = np.array([[self.positions[t] * self.config.rope_theta ** (-i / half) for i in range(half)] for t in at])
    real, imaginary = x[:, :half], x[:, half:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=1)


def rms(x, scale, config):
  return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + config.norm_eps) * scale

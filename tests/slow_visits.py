"""Visits of layers once more, in NumPy float64: token after token, layer after layer, visit after visit.

Every visit keeps a book of who left which key and value there; a token reads the books of earlier tokens of its own
document. Written from the table of rules, not from `adaptive.depth`.
"""

import math

import numpy as np
import numpy_transformer as plain


def logits(config, params, batch, visits, rule, most) -> np.ndarray:
  """[b, t, v] for visits [l, b, t]."""
  params = plain._as_float64(params)
  rows = zip(batch["inputs"], batch["segment_ids"], batch["positions"], np.moveaxis(np.asarray(visits), 1, 0))
  return np.stack([_row(config, params, *map(np.asarray, row), rule, most) for row in rows])


def streams(config, params, tokens, segments, positions, visits, rule, most):
  """The last stream of each token of a row, given its visits [l, t]."""
  book, out = {}, []
  for t, token in enumerate(tokens):
    x, last = params["embedding"]["table"][token].copy(), _nothing(config)
    for layer in range(config.num_layers):
      weights = plain._layer(params["layers"], layer)
      for visit in range(most):
        active, page = visits[layer, t] > visit, book.setdefault((layer, visit), {})
        mine = _key_value(config, weights, x, positions[t])
        last = mine if active else last
        left = mine if active or rule == "project" else last if rule == "copy" else None
        if left is not None:
          page[t] = left
        if active:
          seen = [page[s] for s in range(t + 1) if s in page and segments[s] == segments[t]]
          x = _block(config, weights, x, positions[t], seen)
    out.append(x)
  return out


def _row(config, params, tokens, segments, positions, visits, rule, most):
  head = params["embedding"]["table"].T if config.tied_embeddings else params["embedding"]["head"]
  found = streams(config, params, tokens, segments, positions, visits, rule, most)
  return np.stack([plain._rms(x, params["final_norm"]["scale"], config.norm_eps) @ head for x in found])


def _nothing(config):
  return [(np.zeros(config.head_size), np.zeros(config.head_size))] * config.num_kv_heads


def _key_value(config, weights, x, position):
  """(key, value) of every key/value head."""
  normed = [plain._rms(x, weights["attention_norm"]["scale"], config.norm_eps)]
  read = lambda name, group: plain._heads(config, weights["attention"], name, (slice(None), group), normed)[0]
  return [(plain.rotate(config, read("key", g), position), read("value", g)) for g in range(config.num_kv_heads)]


def _block(config, weights, x, position, seen):
  attention = weights["attention"]
  normed, total = [plain._rms(x, weights["attention_norm"]["scale"], config.norm_eps)], np.zeros_like(x)
  for group in range(config.num_kv_heads):
    for member in range(config.q_per_kv):
      query = plain._heads(config, attention, "query", (slice(None), group, member), normed)[0]
      query = plain.rotate(config, query, position)
      scores = [query @ pair[group][0] / math.sqrt(len(query)) for pair in seen]
      powers = [math.exp(score - max(scores)) for score in scores]
      read = sum(power / sum(powers) * pair[group][1] for power, pair in zip(powers, seen))
      total += read @ attention["out"][group, member]
  x = x + total
  return x + plain._feed_forward(weights["mlp"], plain._rms(x, weights["mlp_norm"]["scale"], config.norm_eps))

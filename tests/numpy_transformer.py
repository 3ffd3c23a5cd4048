"""The transformer once more, in NumPy float64 with loops over rows, heads and positions: slow, and easy to believe.

Written from the papers and from the Llama, Qwen2 and Qwen3 models' definitions, not from `adaptive.backbone`.
"""

import cmath
import math

import numpy as np


def logits(config, params, batch) -> np.ndarray:
  """[b, t, v]."""
  params = _as_float64(params)
  return np.stack(
    [
      _row(config, params, np.asarray(tokens), np.asarray(segments), np.asarray(positions))
      for tokens, segments, positions in zip(batch["inputs"], batch["segment_ids"], batch["positions"])
    ]
  )


def _as_float64(tree):
  return {k: _as_float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def _row(config, params, tokens, segments, positions):
  table = params["embedding"]["table"]
  stream = [table[token].copy() for token in tokens]
  for layer in range(config.num_layers):
    weights = _layer(params["layers"], layer)
    normed = [_rms(x, weights["attention_norm"]["scale"], config.norm_eps) for x in stream]
    attended = _attention(config, weights["attention"], normed, segments, positions)
    stream = [x + a for x, a in zip(stream, attended)]
    for t, x in enumerate(stream):
      stream[t] = x + _feed_forward(weights["mlp"], _rms(x, weights["mlp_norm"]["scale"], config.norm_eps))
  head = table.T if config.tied_embeddings else params["embedding"]["head"]
  return np.stack([_rms(x, params["final_norm"]["scale"], config.norm_eps) @ head for x in stream])


def _layer(tree, index):
  return {k: _layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def _rms(x, scale, eps):
  return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * scale


def _feed_forward(weights, x):
  """One channel of one group after another."""
  total = np.zeros_like(x)
  _, groups, channels = weights["gate"].shape
  for m in range(groups):
    for f in range(channels):
      gate = x @ weights["gate"][:, m, f]
      total += gate / (1 + math.exp(-gate)) * (x @ weights["up"][:, m, f]) * weights["down"][m, f]
  return total


def _attention(config, weights, xs, segments, positions):
  outputs = [np.zeros_like(x) for x in xs]
  for head in range(config.num_heads):
    group, member = divmod(head, config.num_heads // config.num_kv_heads)
    query = _heads(config, weights, "query", (slice(None), group, member), xs)
    key = _heads(config, weights, "key", (slice(None), group), xs)
    value = _heads(config, weights, "value", (slice(None), group), xs)
    query = [rotate(config, q, p) for q, p in zip(query, positions)]
    key = [rotate(config, k, p) for k, p in zip(key, positions)]
    for t in range(len(xs)):
      seen = [s for s in range(t + 1) if segments[s] == segments[t]]
      scores = [query[t] @ key[s] / math.sqrt(len(query[t])) for s in seen]
      powers = [math.exp(score - max(scores)) for score in scores]
      attended = sum(power / sum(powers) * value[s] for power, s in zip(powers, seen))
      outputs[t] += attended @ weights["out"][group, member]
  return outputs


def _heads(config, weights, name, where, xs):
  """Queries, keys or values of one head at every position, before the rotation."""
  found = [x @ weights[name][where] for x in xs]
  if config.qkv_bias:
    found = [y + weights[f"{name}_bias"][where[1:]] for y in found]
  if config.qk_norm and name != "value":
    found = [_rms(y, weights[f"{name}_norm"]["scale"], config.norm_eps) for y in found]
  return found


def rotate(config, x, position):
  """RoPE as multiplication of complex numbers, of which x holds the real parts and then the imaginary parts."""
  half = len(x) // 2
  turned = [complex(x[i], x[i + half]) * cmath.exp(1j * position * frequency(config, i, len(x))) for i in range(half)]
  return np.array([z.real for z in turned] + [z.imag for z in turned])


def frequency(config, pair, head_size):
  """Radians per position of a pair, with Llama 3.1's published rule in terms of wavelengths."""
  plain, scaling = config.rope_theta ** (-2 * pair / head_size), config.rope_scaling
  if scaling.kind == "none":
    return plain
  if scaling.kind == "linear":
    return plain / scaling.factor
  wavelength = 2 * math.pi / plain
  if wavelength < scaling.original_max_len / scaling.high_freq_factor:
    return plain
  if wavelength > scaling.original_max_len / scaling.low_freq_factor:
    return plain / scaling.factor
  span = scaling.high_freq_factor - scaling.low_freq_factor
  smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / span
  return (1 - smooth) * plain / scaling.factor + smooth * plain

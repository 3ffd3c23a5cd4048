"""What a document's prompt decides, once more in NumPy float64: the prompt alone, in models of ever more layers."""

import numpy as np
import numpy_transformer
import slow_visits
import tiny


def probabilities(config, params, batch, prompt) -> np.ndarray:
  """Of running each routed layer after the prompt, by the document of each token, [l - 2, b, t]."""
  params = numpy_transformer._as_float64(params)
  segments, positions = np.asarray(batch["segment_ids"]), np.asarray(batch["positions"])
  found = np.zeros((config.num_layers - 2, *segments.shape))
  for row, segment in {(r, s) for r, line in enumerate(segments) for s in line}:
    document = segments[row] == segment
    where = np.flatnonzero(document)[:prompt]
    tokens, at = np.asarray(batch["inputs"])[row, where], positions[row, where]
    for layer in range(1, config.num_layers - 1):
      below = tiny.model_config(num_layers=layer, qk_norm=config.qk_norm)
      everyone = np.ones((layer, len(where)), int)
      enter = slow_visits.streams(below, params, tokens, [1] * len(where), at, everyone, "hole", 1)
      weight, bias = (params["routers"][name][layer - 1] for name in ("weight", "bias"))
      found[layer - 1, row, document] = 1 / (1 + np.exp(-(np.mean(enter, axis=0) @ weight[:, 0] + bias)))
  return found


def visits(config, params, batch, prompt, threshold) -> np.ndarray:
  """How often each token runs each layer, int [l, b, t]: prompts, and the first and the last layer, once."""
  ran = np.ones((config.num_layers, *batch["inputs"].shape), np.int32)
  later = np.asarray(batch["positions"]) >= prompt
  ran[1:-1] = ~later | (probabilities(config, params, batch, prompt) > threshold)
  return ran

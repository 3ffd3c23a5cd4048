"""Tokens that leave early once more, in NumPy float64: token after token, exit after exit, on the slow visits."""

from collections.abc import Callable

import numpy as np
import numpy_transformer as plain
import slow_visits


def left(config, params, batch, depths, kv: str, asker: Callable) -> tuple[np.ndarray, np.ndarray]:
  """After how many layers each token leaves [b, t], and with which stream [b, t, d].

  Args:
    depths: of the exits, the model's own last. kv: rule for layers that a token did not run.
    asker: (position) -> ask, for one token; ask(exit, stream [d]) says whether it leaves there.
  """
  params = plain._as_float64({name: params[name] for name in ("embedding", "layers")})
  found = [_row(config, params, *row, depths, kv, asker) for row in _rows(batch)]
  return tuple(np.stack(parts) for parts in zip(*found))


def _rows(batch):
  return zip(*(np.asarray(batch[name]) for name in ("inputs", "segment_ids", "positions")))


def _row(config, params, tokens, segments, positions, depths, kv, asker):
  depth, streams = np.zeros(len(tokens), int), []
  for t, position in enumerate(positions):  # what a token sees depends on where those before it left
    ask = asker(position)
    for which, depth[t] in enumerate(depths):
      visits = (np.arange(config.num_layers)[:, None] < depth[: t + 1]).astype(int)
      upto = (part[: t + 1] for part in (tokens, segments, positions))
      x = slow_visits.streams(config, params, *upto, visits, kv, 1)[t]
      if which == len(depths) - 1 or ask(which, x):
        break
    streams.append(x)
  return depth, np.stack(streams)


def logits(config, params, x: np.ndarray, exit_: int | None = None) -> np.ndarray:
  """[..., d] -> [..., v] through the model's head, or an exit's own."""
  params = plain._as_float64({name: part for name, part in params.items() if name != "layers"})
  table = params["embedding"]["table"].T if config.tied_embeddings else params["embedding"]["head"]
  scale, matrix = params["final_norm"]["scale"], table
  if exit_ is not None:
    scale, matrix = params["exit_heads"]["scale"][exit_], params["exit_heads"]["matrix"][exit_]
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale @ matrix

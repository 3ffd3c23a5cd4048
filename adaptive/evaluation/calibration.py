"""What a model with early exits shows on held-out text: what `adaptive.evaluation.thresholds` chooses by."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive.backbone.transformer import Batch, Params
from adaptive.depth import climb
from adaptive.depth import walk as walking
from adaptive.depth.exits import Exits
from adaptive.evaluation.thresholds import Seen


def collect(exits: Exits, params: Params, batches: Sequence[Batch], seq_len: int) -> Seen:
  """Signals and agreement at every exit of the tokens of some rows, with the keys of the full model."""
  look = jax.jit(lambda params, batch: _look(exits, params, batch))
  found, rows, number = [], [], 0
  for batch in batches:
    signal, right = jax.device_get(look(params, batch))
    real = np.asarray(batch["segment_ids"]) > 0
    found.append((signal[:, real], right[:, real]))
    rows.append(number + np.nonzero(real)[0])
    number += len(real)
  signal, right = (np.concatenate(parts, axis=1) for parts in zip(*found))
  return Seen(signal, right, np.concatenate(rows), exit_costs(exits, seq_len))


def _look(exits: Exits, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Signals [e - 1, b, t] and whether the likeliest token is the model's [e, b, t]."""
  hidden, positions = climb.streams(exits, params, batch), batch["positions"]
  x, _ = exits.model.apply({"params": params}, batch, method="embed")
  walk, found, tops = walking.begin(exits, x, jnp.ones(x.shape[:2], bool)), [], []
  for which, x in enumerate(hidden[:-1]):
    walk = walk._replace(x=x)
    value, logits, read, mean = walking.look(exits, params, which, walk, positions)
    logits = exits.head(params, which, read) if logits is None else logits
    memory = exits.signal(params, which).remember(value, walk.memory)
    walk = walk._replace(previous=(x, logits), memory=memory, mean=mean)
    found.append(value / walking.decay(exits.how, positions))  # instead of each threshold times it
    tops.append(jnp.argmax(logits, axis=-1))
  last = exits.head(params, len(found), walking.last_read(walk._replace(x=hidden[-1])))
  tops.append(jnp.argmax(last, axis=-1))
  return jnp.stack(found), jnp.stack(tops) == tops[-1][None]


def exit_costs(exits: Exits, seq_len: int) -> np.ndarray:
  """FLOPs of a token that leaves at each exit, [e]: its layers, what asked and read it, keys of layers above."""
  config, full = exits.config, exits.depths[-1]
  layer, head = costs.layer_flops(config, (seq_len + 1) / 2), costs.head_flops(config)
  above = costs.key_value_flops(config) if exits.how.kv == "project" else 0.0
  loop, found = exits.loop.flops if exits.loop else 0.0, []
  for which, depth in enumerate(exits.depths):
    heads = which + 1 if exits.reads_logits else 1
    asked = sum(map(exits.asked_flops, range(which + 1)))
    entered = len(exits.depths) if exits.how.kv == "project" else which + 1
    found.append(depth * layer + (full - depth) * above + heads * head + asked + entered * loop)
  return np.array(found)

"""What a model with early exits shows on held-out text: what `adaptive.evaluation.thresholds` chooses by."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors
from adaptive.backbone.transformer import Batch, Params
from adaptive.depth import signals
from adaptive.depth.exits import Exits, decay
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
  x, _ = exits.model.apply({"params": params}, batch, method="embed")
  hidden = executors.exits(exits.config, params, batch, exits.depths)
  measure: Callable = signals.SIGNALS[exits.how.signal].value
  before, agreed, found, tops = (x, None), jnp.zeros(x.shape[:2], jnp.int32), [], []
  for which, x in enumerate(hidden):
    logits = exits.head(params, which, x)
    tops.append(jnp.argmax(logits, axis=-1))
    found.append(measure(signals.Seen(logits, before[1], x, before[0], agreed)))
    before, agreed = (x, logits), found[-1].astype(jnp.int32)  # only patience reads it, and counts in its signal
  found = [signal / decay(exits.how, batch["positions"]) for signal in found]  # instead of each threshold times it
  return jnp.stack(found[:-1]), jnp.stack(tops) == tops[-1][None]


def exit_costs(exits: Exits, seq_len: int) -> np.ndarray:
  """FLOPs of a token that leaves at each exit, [e]: its layers, the heads that were asked, keys of layers above."""
  config, how = exits.config, exits.how
  layer, head = costs.layer_flops(config, (seq_len + 1) / 2), costs.head_flops(config)
  above = costs.key_value_flops(config) if how.kv == "project" else 0.0
  asked = [which + 1 if signals.SIGNALS[how.signal].reads_logits else 1 for which in range(len(exits.depths))]
  return np.array([d * layer + (exits.depths[-1] - d) * above + n * head for d, n in zip(exits.depths, asked)])

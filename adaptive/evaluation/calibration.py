"""What a model with early exits shows on held-out text: what `adaptive.evaluation.thresholds` chooses by."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.transformer import Batch, Params
from adaptive.depth import climb, exit_costs
from adaptive.depth import exits as exiting
from adaptive.depth import walk as walking
from adaptive.depth.exits import Exits
from adaptive.evaluation.thresholds import Seen


def collect(exits: Exits, params: Params, batches: Sequence[Batch], seq_len: int) -> Seen:
  """Signals and agreement at every exit of the tokens of some rows, with the keys of the full model."""
  look = jax.jit(lambda params, batch: _look(exits, params, batch))
  found, rows, segments, number = [], [], [], 0
  for batch in batches:
    signal, right = jax.device_get(look(params, batch))
    segments.append(np.asarray(batch["segment_ids"]))
    real = segments[-1] > 0
    found.append((signal[:, real], right[:, real]))
    rows.append(number + np.nonzero(real)[0])
    number += len(real)
  signal, right = (np.concatenate(parts, axis=1) for parts in zip(*found))
  flops = flops_where_left(exits, seq_len, np.concatenate(segments))
  return Seen(
    signal, right, np.concatenate(rows), flops, full_flops(exits, seq_len), counts=exits.how.signal == "patience"
  )


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
    value = value / walking.decay(exits.how, positions)  # instead of each threshold times it
    found.append(jnp.where(walking.may_leave(exits, positions), value, -jnp.inf))
    tops.append(jnp.argmax(logits, axis=-1))
  last = exits.head(params, len(found), walking.last_read(walk._replace(x=hidden[-1])))
  tops.append(jnp.argmax(last, axis=-1))
  return jnp.stack(found), jnp.stack(tops) == tops[-1][None]


def full_flops(exits: Exits, seq_len: int) -> float:
  """FLOPs of a token of the full model, which asks nobody on the way."""
  *_, rule = exiting.rules(exits).values()
  return exit_costs.cost(exits, rule, seq_len, {}).flops_per_token


def flops_where_left(exits: Exits, seq_len: int, segment_ids: np.ndarray) -> Callable[[np.ndarray], float]:
  """Mean FLOPs of a token of some rows, as a function of the exit where each left.

  Args:
    segment_ids: of the rows, int32 [b, t]; the function takes one exit for each token that is no padding, int [n].
  """
  real = segment_ids > 0
  rule = exiting.Rule(exits.depths[-1], (0.0,) * (len(exits.depths) - 1))  # whichever: the shares are measured
  measure = jax.jit(lambda left: climb.realised(exits, _ran(exits, left), jnp.asarray(segment_ids)))

  def flops(left: np.ndarray) -> float:
    where = np.zeros(segment_ids.shape, np.int32)
    where[real] = left
    return exit_costs.cost(exits, rule, seq_len, jax.device_get(measure(where))).flops_per_token

  return flops


def _ran(exits: Exits, left: jax.Array) -> list[jax.Array]:
  """Who ran the layers before each exit, bool [b, t] each, of tokens that left at some exit, int32 [b, t]."""
  return [left >= which for which in range(len(exits.depths))]

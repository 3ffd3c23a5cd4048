"""How far inference is from training: the loss under top-k, which looks ahead, beside the causal one."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive import losses
from adaptive.methods.contract import Batch, Params
from adaptive.methods.depth.mixture_of_recursions import causal
from adaptive.methods.depth.mixture_of_recursions.config import capacity_tokens
from adaptive.methods.depth.mixture_of_recursions.model import causal_logits


def diagnose(model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
  """Of the full model on held-out rows.

  Returns:
    `capacity/r`: share of the tokens that recursion r kept under the causal rule. Of expert choice also
    `top_k_loss`: nats per token when each recursion takes its top k of the row, which looks ahead;
    `causal_loss`: of the same rows;
    `disagreement/r`: share of the tokens on which the two differ, of those that either has as candidates;
    `dead_positions`: share of the positions of a row that top-k never chose for the last recursion.
  """
  totals = losses.totals(functools.partial(_measure, model), params, batches, mesh)
  if "chosen" in totals:
    ever, total = totals.pop("chosen")
    totals["dead_positions"] = (np.sum((ever == 0) & (total > 0)), np.sum(total > 0))
  return {name: float(total / max(count, 1)) for name, (total, count) in totals.items()}


def _measure(model: nn.Module, params: Params, batch: Batch) -> dict[str, tuple]:
  """(sum, count) pairs; `chosen` is by position, [t]."""
  config, real = model.method, batch["segment_ids"] > 0
  full = causal.Rule(config.num_recursions)
  logits, keeps = causal_logits(model, params, batch, full)
  found = dict(causal.realised(model, keeps, real))
  if not config.expert_choice:
    return found
  seq_len = real.shape[1]
  chunks = seq_len // config.capacity_chunk if config.capacity_chunk else 1
  ahead = causal.top_k(capacity_tokens(config, seq_len), chunks)
  ahead_logits, ahead_keeps = causal_logits(model, params, batch, full, ahead)
  counted = losses.counted(batch)
  found["causal_loss"] = losses.cross_entropy(logits, batch["targets"], counted)
  found["top_k_loss"] = losses.cross_entropy(ahead_logits, batch["targets"], counted)
  candidates = real
  for which, (mine, theirs) in enumerate(zip(keeps, ahead_keeps), 1):
    found[f"disagreement/{which}"] = (jnp.sum(mine ^ theirs, dtype=jnp.float32), jnp.sum(candidates, dtype=jnp.float32))
    candidates = mine | theirs
  found["chosen"] = (jnp.sum(ahead_keeps[-1], axis=0), jnp.sum(real, axis=0))
  return found

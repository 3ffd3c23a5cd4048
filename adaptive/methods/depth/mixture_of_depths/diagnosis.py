"""How far inference is from training: the loss under top-k, which looks ahead, beside the causal one."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
from jax.sharding import Mesh

from adaptive import losses
from adaptive.methods.contract import Batch, Metrics, Params
from adaptive.methods.depth.mixture_of_depths.model import Rule, causal_logits, realised, training_logits


def diagnose(model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
  """Of the full model on held-out rows.

  Returns:
    `capacity/l`: share of the tokens that passed layer l under the causal rule;
    `agreement/l`: share of the tokens of which the causal rule, on the stream of the top-k pass, says what top-k does;
    `top_k_loss`: nats per token when each routed layer takes its top k of the row, which looks ahead;
    `causal_loss`: of the same rows.
  """
  found = losses.totals(functools.partial(_measure, model), params, batches, mesh)
  return {name: float(total / max(count, 1)) for name, (total, count) in found.items()}


def _measure(model: nn.Module, params: Params, batch: Batch) -> Metrics:
  real, counted = batch["segment_ids"] > 0, losses.counted(batch)
  logits, keeps = causal_logits(model, params, batch, Rule())
  ahead, judged = training_logits(model, params, batch)
  right, number = judged["router_accuracy"]
  return {
    **realised(model, keeps, real),
    **{f"agreement/{layer}": (right[i], number[i]) for i, layer in enumerate(model.routed)},
    "causal_loss": losses.cross_entropy(logits, batch["targets"], counted),
    "top_k_loss": losses.cross_entropy(ahead, batch["targets"], counted),
  }

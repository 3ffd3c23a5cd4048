"""What Mixture-of-Recursions costs, from the capacities it was given or those that an evaluation measured."""

from collections.abc import Sequence

import flax.linen as nn

from adaptive import cost as costs
from adaptive import routing
from adaptive.methods.contract import Metrics, SubModel
from adaptive.methods.depth.mixture_of_recursions.config import Config, capacity_tokens


def cost(model: nn.Module, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  """Without measurements: with the nominal capacities, scaled where the sub-model scales them."""
  config, model_config, sharing = model.method, model.config, model.sharing
  if realised:
    shares = [_mean(realised[f"capacity/{r + 1}"]) for r in range(config.num_recursions)]
  else:
    scale = dict(submodel.dial).get("capacity_scale", 1.0)
    shares = [config.bound(r, scale) if r < submodel["recursions"] else 0.0 for r in range(config.num_recursions)]
  table = model_config.vocab_size * model_config.d_model
  non_embedding = sharing.unique * costs.layer_params(model_config) + model_config.d_model + _router_params(model)
  layers = _cached_layers(config, shares) * sharing.block_size + 2 * sharing.middle
  bytes_per_value = 2 if model_config.dtype == "bfloat16" else 4
  return costs.Cost(
    params_total=non_embedding + table * (1 if model_config.tied_embeddings else 2),
    params_non_embedding=non_embedding,
    params_active=non_embedding + table,
    flops_per_token=_flops(model, shares, seq_len),
    kv_bytes_per_token=round(2 * layers * model_config.num_kv_heads * model_config.head_size * bytes_per_value),
  )


def update_flops(model: nn.Module, choice: tuple[int, ...], seq_len: int) -> float:
  """With the tokens that the recursions take; token choice counts as even use of all depths, unless it is bounded."""
  config = model.method
  shares = config.shares
  if config.expert_choice or config.capacities:
    stage = choice[0] if config.warmup_steps and choice[0] < config.warmup_stages else None
    shares = [tokens / seq_len for tokens in capacity_tokens(config, seq_len, stage)]
  return costs.update_flops(_flops(model, shares, seq_len))


def _flops(model: nn.Module, shares: Sequence[float], seq_len: int) -> float:
  """Forward pass per token of the row when recursion r computes a share of them (App. D, with routers and head)."""
  config, model_config, sharing = model.method, model.config, model.sharing
  everyone = (seq_len + 1) / 2
  total = 2 * sharing.middle * costs.layer_flops(model_config, everyone) + costs.head_flops(model_config)
  for which, share in enumerate(shares):
    alone = config.kv_cache == "recursion_wise"
    attended = (share * seq_len + 1) / 2 if alone else everyone
    layer = costs.layer_flops(model_config, attended)
    if config.kv_cache == "shared" and which > 0:
      layer -= costs.key_value_flops(model_config)
    total += share * sharing.block_size * layer
  return total + _router_flops(model, shares)


def _router_flops(model: nn.Module, shares: Sequence[float]) -> float:
  """2 per weight and token that a router reads: the candidates of its recursion."""
  config = model.method
  if config.router == "random":
    return 0.0
  one = 2 * _one_router(model)
  if not config.expert_choice:
    return one
  candidates = sum(before for before, share in zip((1.0, *shares), shares) if share > 0)
  return (2 if config.inference == "aux_router" else 1) * one * candidates


def _router_params(model: nn.Module) -> int:
  config = model.method
  if config.router == "random":
    return 0
  if not config.expert_choice:
    return _one_router(model) + (config.num_recursions if config.balance == "loss_free" else 0)
  return _one_router(model) * config.num_recursions * (2 if config.inference == "aux_router" else 1)


def _one_router(model: nn.Module) -> int:
  config = model.method
  outputs = 1 if config.expert_choice else config.num_recursions
  return routing.router_weights(config.router, model.config.d_model, outputs)


def _cached_layers(config: Config, shares: Sequence[float]) -> float:
  """Copies of the block's keys and values that a token leaves in the cache."""
  return {"recursion_wise": sum(shares), "shared": 1.0, "hybrid": float(sum(share > 0 for share in shares))}[
    config.kv_cache
  ]


def _mean(pair) -> float:
  return float(pair[0]) / max(float(pair[1]), 1.0)

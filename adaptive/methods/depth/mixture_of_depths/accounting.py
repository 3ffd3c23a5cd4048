"""What Mixture-of-Depths costs, from the capacity it was given or from the shares that an evaluation measured."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn

from adaptive import cost as costs
from adaptive import routing
from adaptive.methods.contract import Metrics, SubModel


def cost(model: nn.Module, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  """Without measurements: with the nominal capacity, scaled where the sub-model scales it."""
  config, number = model.config, len(model.routed)
  if realised:
    pairs = [realised[f"capacity/{layer}"] for layer in model.routed]
    shares = [float(passed) / max(float(tokens), 1.0) for passed, tokens in pairs]
  else:
    shares = [model.method.bound(dict(submodel.dial).get("capacity_scale", 1.0))] * number
  dense = costs.with_params(costs.dense_cost(config, seq_len), number * _router_weights(model))
  ordinary = config.num_layers - number
  return dataclasses.replace(
    dense,
    flops_per_token=_flops(model, shares, seq_len),
    kv_bytes_per_token=round(dense.kv_bytes_per_token * (ordinary + sum(shares)) / config.num_layers),
  )


def update_flops(model: nn.Module, choice: tuple[int, ...], seq_len: int) -> float:
  """With the tokens that the routed layers take in training."""
  shares = [model.method.tokens(seq_len) / seq_len] * len(model.routed)
  return costs.update_flops(_flops(model, shares, seq_len))


def _flops(model: nn.Module, shares: Sequence[float], seq_len: int) -> float:
  """Forward pass per token of the row: a routed layer computes a share of them, which attend to each other alone."""
  config, number = model.config, len(model.routed)
  ordinary = (config.num_layers - number) * costs.layer_flops(config, (seq_len + 1) / 2)
  routed = sum(share * costs.layer_flops(config, (share * seq_len + 1) / 2) for share in shares)
  return ordinary + routed + 2.0 * number * _router_weights(model) + costs.head_flops(config)


def _router_weights(model: nn.Module) -> int:
  """Of one routed layer, all of which every token is multiplied with."""
  predictor = routing.router_weights("small_mlp", model.config.d_model, 1)
  return routing.router_weights("linear", model.config.d_model, 1) + (
    predictor if model.method.inference == "predictor" else 0
  )

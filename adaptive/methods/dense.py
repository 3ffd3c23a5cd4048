"""The plain backbone: nothing is left out. The ruler for every other method, and the shortest example of one."""

import dataclasses

import jax

from adaptive import cost as costs
from adaptive import losses
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index
from adaptive.methods.defaults import (
  at_random,
  batch_parts,
  check_training,
  control,
  diagnose,
  init_from,
  ladder,
  learning_rates,
  sample,
  static_choice,
  ticker,
)

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """No settings: the dial has one position."""


def build(model_config: ModelConfig, config: Config) -> Transformer:
  return Transformer(model_config)


def submodels(model: Transformer) -> tuple[SubModel, ...]:
  return (SubModel.of(depth=model.config.num_layers),)


def loss(model: Transformer, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy."""
  pair = losses.cross_entropy(forward(model, params, batch, 0).logits, batch["targets"], losses.counted(batch))
  return losses.mean(pair), {"loss": pair}


def forward(model: Transformer, params: Params, batch: Batch, index) -> Output:
  check_index(index, 1)
  return Output(model.apply({"params": params}, batch), {})


def cost(model: Transformer, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  return costs.dense_cost(model.config, seq_len)


def update_flops(model: Transformer, choice: tuple[int, ...], seq_len: int) -> float:
  return costs.update_flops(costs.dense_cost(model.config, seq_len).flops_per_token)


def extract(model: Transformer, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params]:
  return model.config, params


def decoder(model: Transformer, params: Params, submodel: SubModel) -> Decoder:
  return Decoder(*decoding.dense(model.config, params))

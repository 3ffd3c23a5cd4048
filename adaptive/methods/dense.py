"""The plain backbone: nothing is left out. The ruler for every other method, and the shortest example of one."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from adaptive import cost as costs
from adaptive import losses
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index


@dataclasses.dataclass(frozen=True)
class Config:
  """No settings: the dial has one position."""


def build(model_config: ModelConfig, config: Config) -> Transformer:
  return Transformer(model_config)


def submodels(model: Transformer) -> tuple[SubModel, ...]:
  return (SubModel.of(depth=model.config.num_layers),)


def sample(model: Transformer, seed: int, step: int) -> tuple[int, ...]:
  return (0,)


def static_choice(model: Transformer) -> bool:
  return False


def batch_parts(model: Transformer) -> int:
  return 1


def loss(model: Transformer, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy."""
  pair = losses.cross_entropy(forward(model, params, batch, 0).logits, batch["targets"], batch["segment_ids"] > 0)
  return losses.mean(pair), {"loss": pair}


def control(model: Transformer, params: Params, metrics: Metrics) -> Params:
  return params


def learning_rates(model: Transformer) -> Mapping[str, float]:
  return {}


def init_from(model: Transformer, params: Params, source: Params, how: str, seed: int) -> Params:
  return source


def forward(model: Transformer, params: Params, batch: Batch, index) -> Output:
  check_index(index, 1)
  return Output(model.apply({"params": params}, batch), {})


def diagnose(model: Transformer, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
  return {}


def cost(model: Transformer, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  return costs.dense_cost(model.config, seq_len)


def update_flops(model: Transformer, choice: tuple[int, ...], seq_len: int) -> float:
  return costs.update_flops(costs.dense_cost(model.config, seq_len).flops_per_token)


def extract(model: Transformer, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params]:
  return model.config, params


def decoder(model: Transformer, params: Params, submodel: SubModel) -> Decoder:
  return Decoder(*decoding.dense(model.config, params))


def ticker(model: Transformer, params: Params, submodel: SubModel) -> None:
  """Every token takes the same path."""

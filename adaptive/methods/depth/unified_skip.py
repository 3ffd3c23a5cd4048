"""Unified Layer Skipping: a target speed-up says how many layers run, evenly spaced, the same ones for every token.

Liu et al., "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy" (arXiv 2404.06954).
A speed-up of x keeps int(L / x) of the L layers, the first and the last among them, and the model is trained under that
plan. No token decides anything, so rows of a batch stay together and time falls as the number of layers does.

Departures, with reasons:
- the prompt runs under the plan too. In the paper it runs all layers, and later tokens copy the caches of layers that
  they skip from the layer below. With one plan for all tokens nobody reads those caches; without them a sub-model is an
  ordinary dense model of its layers, with its own keys from the first token on: prompts become faster as well, caches
  smaller, and what is trained is what decodes;
- `spacing="rounded"` by default. The released rule, `divisible`, takes the first multiples of int(L / (n - 1)) until n
  layers are kept, which can leave one large gap at the end: of 16 layers at x = 1.5 it keeps 0 to 8, and 15;
- several speed-ups share one network, a step training one of them or all: the paper tunes a network for each;
- the cosine loss reads the stream before the final norm, where the plan's model and the full one end alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors, losses
from adaptive import subnet as subnets
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require, require_range
from adaptive.depth import ladder as ladders
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index, drafts_of
from adaptive.methods.defaults import (
  at_random,
  batch_parts,
  check_training,
  control,
  diagnose,
  init_from,
  learning_rates,
  ticker,
)

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of Unified Layer Skipping.

  Attributes:
    speedups: targets, each more than 1, increasing; a sub-model for each, beside the full model.
    spacing: of the layers that are kept. `rounded`: the nearest to evenly spaced. `divisible`: the released code's.
    train: whether a step trains `each` of the sub-models in turn, drawn, or the mean over `all`; the full one included.
    cosine_loss: weight of 1 - cosine between a sub-model's last stream and the full model's, which learns nothing from
      it (the paper's optional loss); one more forward pass of the full model.
  """

  speedups: tuple[float, ...] = (1.5, 2.0, 3.0)
  spacing: Literal["rounded", "divisible"] = "rounded"
  train: Literal["each", "all"] = "each"
  cosine_loss: float = 0.0

  def __post_init__(self):
    increasing = list(self.speedups) == sorted(set(self.speedups))
    require(
      increasing and all(1 < x < float("inf") for x in self.speedups),
      f"method.speedups={self.speedups} must be increasing and more than 1, which is the full model",
    )
    require_range(self, "method.", "cosine_loss", 0)


class UnifiedSkip(Transformer):
  """The backbone, with the method's settings. It has the backbone's parameters and no others."""

  method: Config = Config()


def build(model_config: ModelConfig, config: Config) -> UnifiedSkip:
  full = model_config.num_layers
  numbers = [kept(full, speedup) for speedup in config.speedups]
  require(
    min(numbers, default=2) >= 2,
    f"method.speedups={config.speedups} of {full} layers keep {numbers}: the first and the last make two at least",
  )
  require(
    len({*numbers, full}) == len(numbers) + 1,
    f"method.speedups={config.speedups} of {full} layers keep {numbers}: numbers below {full} that differ are needed",
  )
  return UnifiedSkip(model_config, method=config)


def kept(num_layers: int, speedup: float) -> int:
  """Number of layers that run at a speed-up: int(L / x)."""
  return int(num_layers / speedup + 1e-9)  # 33 layers at 1.1 are 30, whatever floating point makes of it


def layer_path(num_layers: int, number: int, spacing: str) -> tuple[int, ...]:
  """The layers that run, `number` of them, at least two: the first, the last, and others between them."""
  last = num_layers - 1
  if spacing == "rounded":  # i last / (number - 1), a half upwards, in whole numbers
    return tuple((2 * i * last + number - 1) // (2 * (number - 1)) for i in range(number))
  interval = num_layers // (number - 1)
  return (0, *range(interval, last, interval)[: number - 2], last)


def submodels(model: UnifiedSkip) -> tuple[SubModel, ...]:
  """The largest speed-up first; 1 is the full model."""
  return tuple(SubModel.of(speedup=float(speedup)) for speedup in (*reversed(model.method.speedups), 1))


def subnet_of(model: UnifiedSkip, submodel: SubModel) -> subnets.Subnet:
  """The part of the backbone that a sub-model runs."""
  full = subnets.prefix(model.config)
  if submodel["speedup"] == 1:
    return full
  layers = model.config.num_layers
  path = layer_path(layers, kept(layers, submodel["speedup"]), model.method.spacing)
  return dataclasses.replace(full, layer_path=path)


def _family(model: UnifiedSkip) -> tuple[subnets.Subnet, ...]:
  return tuple(subnet_of(model, submodel) for submodel in submodels(model))


def sample(model: UnifiedSkip, seed: int, step: int) -> tuple[int, ...]:
  """All sub-models, or one, keyed by (seed, step) with a counter-based generator."""
  number = len(submodels(model))
  if model.method.train == "all":
    return tuple(range(number))
  return (int(np.random.Generator(np.random.Philox(key=[seed, step])).integers(number)),)


def static_choice(model: UnifiedSkip) -> bool:
  """Each plan is a program of its own, which computes no more than it needs."""
  return True


def loss(model: UnifiedSkip, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Mean over the step's sub-models of the next-token cross entropy, and of the cosine loss."""
  family, weight = _family(model), model.method.cosine_loss
  teacher = _stream(model.config, jax.lax.stop_gradient(params), batch, family[-1]) if weight else None

  def plan_loss(params, shared, index):
    (batch, teacher), mask = shared, losses.counted(shared[0])
    x = _stream(model.config, params, batch, family[index])
    logits = model.apply({"params": params}, x, method="head")
    metrics = {"submodel_loss": losses.cross_entropy(logits, batch["targets"], mask)}
    total = losses.mean(metrics["submodel_loss"])
    if weight:
      metrics["cosine_loss"] = cosine_loss(x, teacher, mask)
      total += weight * losses.mean(metrics["cosine_loss"])
    return total, metrics

  total, metrics = losses.mean_over(plan_loss, params, (batch, teacher), list(choice))
  return total, {"loss": jax.tree.map(jnp.sum, metrics["submodel_loss"]), **metrics}


def _stream(config: ModelConfig, params: Params, batch: Batch, part: subnets.Subnet) -> jax.Array:
  """Residual stream [b, t, d] after the layers of a part."""
  small = {"params": subnets.extract(config, params, part)}

  def run(model: Transformer, batch: Batch) -> jax.Array:
    x, context = model.embed(batch)
    return model.layers(x, context, None)[0]

  return Transformer(subnets.config_of(config, part)).apply(small, batch, method=run)


def cosine_loss(x: jax.Array, teacher: jax.Array, mask: jax.Array) -> losses.SumCount:
  """1 - cosine of the angle between two streams [b, t, d], summed where mask [b, t] is true, and their number."""
  x, teacher = x.astype(jnp.float32), teacher.astype(jnp.float32)
  lengths = jnp.sum(x * x, axis=-1) * jnp.sum(teacher * teacher, axis=-1)
  cosine = jnp.sum(x * teacher, axis=-1) * jax.lax.rsqrt(jnp.maximum(lengths, 1e-30))
  return jnp.sum((1 - cosine) * mask), jnp.sum(mask, dtype=jnp.float32)


def forward(model: UnifiedSkip, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits of one sub-model: cut out when the index is an int, else one program for all."""
  family = _family(model)
  check_index(index, len(family))
  if isinstance(index, int):
    return Output(executors.static(model.config, params, batch, family[index]), {})
  return Output(executors.switch(model.config, params, batch, executors.choices(model.config, family), index), {})


def cost(model: UnifiedSkip, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  return costs.dense_cost(subnets.config_of(model.config, subnet_of(model, submodel)), seq_len)


def update_flops(model: UnifiedSkip, choice: tuple[int, ...], seq_len: int) -> float:
  """Every sub-model of the choice sees the batch; the cosine loss's teacher runs its layers once, forward only."""
  family = submodels(model)
  forward = sum(cost(model, family[index], seq_len, {}).flops_per_token for index in choice)
  full = costs.dense_cost(model.config, seq_len).flops_per_token - costs.head_flops(model.config)
  return costs.update_flops(forward) + (full if model.method.cosine_loss else 0.0)


def extract(model: UnifiedSkip, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params]:
  """The sub-model as an ordinary dense checkpoint."""
  part = subnet_of(model, submodel)
  return subnets.config_of(model.config, part), subnets.extract(model.config, params, part)


def decoder(model: UnifiedSkip, params: Params, submodel: SubModel) -> Decoder:
  """The extracted sub-model's: what is left out is neither stored nor computed."""
  return Decoder(*decoding.dense(*extract(model, params, submodel)))


def ladder(model: UnifiedSkip, params: Params, drafts: Sequence[SubModel] | None) -> ladders.Ladder | None:
  """Any plan may draft: it shares its first layers with the full model, and runs the others on caches of its own."""
  full = subnets.prefix(model.config).layer_path
  wanted = drafts_of(submodels(model), drafts)
  paths = {subnet_of(model, submodel).layer_path for submodel in wanted} - {full}
  order = sorted(paths, key=lambda path: (ladders.shared_layers(full, path), len(path)))
  return ladders.of_paths(model.config, params, full, order) if order else None

"""Fixed-depth recursion: layers share weights and every token passes through all of them, a baseline.

Universal Transformers (Dehghani et al., arXiv 1807.03819) without halting; the recursive baseline of
Mixture-of-Recursions (arXiv 2507.10524, Sections 2.1 and 4). Sharing schemes are in `adaptive.recursion`.

A sub-model repeats the shared block fewer times. With `train_fewer` it is trained for that: the number of a step is
drawn, as in models of random depth; else only the full number is trained, and what fewer give is what they give.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import losses, recursion
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig
from adaptive.depth import ladder as ladders
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index, drafts_of
from adaptive.methods.defaults import at_random, batch_parts, check_training, control, diagnose, learning_rates, ticker

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of fixed-depth recursion.

  Attributes:
    num_recursions: passes through the shared block. sharing: which layers are shared, see `adaptive.recursion`.
    train_fewer: whether a step trains one number of passes, drawn from all.
  """

  num_recursions: int = 3
  sharing: recursion.Scheme = "middle_cycle"
  train_fewer: bool = False


class Recursive(Transformer):
  """Parameters: those of the backbone, with the unique layers in `layers`."""

  method: Config = Config()

  @property
  def sharing(self) -> recursion.Sharing:
    return recursion.Sharing(self.method.sharing, self.config.num_layers, self.method.num_recursions)

  @property
  def stacked(self) -> int:
    return self.sharing.unique

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the token after each position."""
    if self.is_initializing():
      return super().__call__(batch)
    params = nn.unbox(self.variables["params"])
    return _logits(self.clone(parent=None), params, batch, self.method.num_recursions)


def build(model_config: ModelConfig, config: Config) -> Recursive:
  recursion.Sharing(config.sharing, model_config.num_layers, config.num_recursions)  # refuses what does not divide
  return Recursive(model_config, method=config)


def submodels(model: Recursive) -> tuple[SubModel, ...]:
  return tuple(SubModel.of(recursions=1 + r) for r in range(model.method.num_recursions))


def sample(model: Recursive, seed: int, step: int) -> tuple[int, ...]:
  number = model.method.num_recursions
  if not model.method.train_fewer:
    return (number - 1,)
  return (int(np.random.Generator(np.random.Philox(key=[seed, step])).integers(number)),)


def static_choice(model: Recursive) -> bool:
  """Each number of passes is a program of its own, which computes no more than it needs."""
  return model.method.train_fewer


def loss(model: Recursive, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy."""
  index = choice[0] if model.method.train_fewer else model.method.num_recursions - 1
  logits = forward(model, params, batch, index).logits
  pair = losses.cross_entropy(logits, batch["targets"], losses.counted(batch))
  return losses.mean(pair), {"loss": pair}


def forward(model: Recursive, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  number = model.method.num_recursions
  check_index(index, number)
  repeats = index + 1 if isinstance(index, int) else jnp.minimum(index, number - 1) + 1
  return Output(_logits(model, params, batch, repeats), {})


def _logits(model: Recursive, params: Params, batch: Batch, repeats: int | jax.Array) -> jax.Array:
  x, context = model.apply({"params": params}, batch, method="embed")
  before, block, after = recursion.split(model.sharing, params["layers"])
  x, _ = recursion.run_layers(model.config, before, x, context)
  x = recursion.run_repeated(model.sharing, model.config, block, x, context, repeats)
  x, _ = recursion.run_layers(model.config, after, x, context)
  return model.apply({"params": params}, x, method="head")


def init_from(model: Recursive, params: Params, source: Params, how: str, seed: int) -> Params:
  """The layers of a dense model of the unrolled depth, tied."""
  return {**source, "layers": recursion.tie(model.sharing, source["layers"], how, seed)}


def cost(model: Recursive, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  """That of the unrolled model, but for the parameters, which are the unique ones."""
  sharing, layer = model.sharing, costs.layer_params(model.config)
  depth = 2 * sharing.middle + submodel["recursions"] * sharing.block_size
  unrolled = costs.dense_cost(dataclasses.replace(model.config, num_layers=depth), seq_len)
  return costs.with_params(unrolled, -(depth - sharing.unique) * layer)


def update_flops(model: Recursive, choice: tuple[int, ...], seq_len: int) -> float:
  return costs.update_flops(cost(model, submodels(model)[choice[0]], seq_len, {}).flops_per_token)


def extract(model: Recursive, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params]:
  """The unrolled model, with a copy of a shared layer wherever it runs."""
  path = _layer_path(model, submodel)
  config = dataclasses.replace(model.config, num_layers=len(path))
  return config, {**params, "layers": jax.tree.map(lambda leaf: leaf[path], params["layers"])}


def decoder(model: Recursive, params: Params, submodel: SubModel) -> Decoder:
  """A shared layer has a cache for each of its passes, and its weights once."""
  return Decoder(*decoding.dense(model.config, params, _layer_path(model, submodel).tolist()))


def _layer_path(model: Recursive, submodel: SubModel) -> np.ndarray:
  """The unique layers that a sub-model runs, in order."""
  sharing, repeats = model.sharing, submodel["recursions"]
  depth = 2 * sharing.middle + repeats * sharing.block_size
  return np.array(dataclasses.replace(sharing, num_layers=depth, num_recursions=repeats).layer_path)


def ladder(model: Recursive, params: Params, drafts: Sequence[SubModel] | None) -> ladders.Ladder | None:
  """Fewer passes may draft; with a last layer outside of the loop, a draft runs it for itself."""
  wanted = drafts_of(submodels(model), drafts)
  paths = [_layer_path(model, submodel).tolist() for submodel in sorted(wanted, key=lambda s: s["recursions"])]
  full = _layer_path(model, submodels(model)[-1]).tolist()
  return ladders.of_paths(model.config, params, full, paths) if paths else None

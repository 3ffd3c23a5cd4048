"""SortedNet: many nested sub-models in one network, trained together by sampling.

Valipour et al., "SortedNet: A Scalable and Generalized Framework for Training Modular DNNs" (arXiv 2309.00255), and
its depth-only fine-tuning form SoFT, "Sorted LLaMA" (arXiv 2309.08968, Section 3). The sampling schemes of relatives
are options of the same loss: sandwich rule and in-place distillation (universally slimmable networks, arXiv
1903.05134), and weighted sampling of one sub-model a step (MatFormer, arXiv 2310.07707).

A sub-model is the first `depth` layers, the first `q_per_kv` query heads of every key/value group, and the first `d_ff`
feed-forward channels; the embedding, the final norm and the head are shared by all. The objective is
min E_{b ~ P} L(x; theta(b)); a step draws `num_sampled` sub-models and averages their gradients.

Departures from the papers, with reasons (of SortedNet's only the abstract was read):
- the gradient is the mean over the sampled sub-models (slimmable networks sum), as long for many as for one;
- sampling is without replacement unless asked for, so that a step draws no sub-model of a small family twice;
- key/value heads and the residual width are whole in every sub-model, so that caches and norms need no care;
- what a step does not draw still moves by momentum and weight decay, unless `training.optimizer.inactive` freezes it;
- one scheme for the whole run, no stages.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive import executors, losses, sharding
from adaptive import subnet as subnets
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require
from adaptive.depth import ladder as ladders
from adaptive.depth import objectives
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index, drafts_of
from adaptive.methods.defaults import at_random, check_training, control, diagnose, init_from, learning_rates, ticker

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """SortedNet's settings.

  Attributes:
    depths, q_per_kv, d_ff: choices of each dimension, increasing, the model's own size last; empty means full only.
      The sub-models are their product.
    listed: instead of the product, the (depth, q_per_kv, d_ff) of every sub-model; the smallest first, the full last.
    scheme: how a step chooses. `uniform`: num_sampled draws. `weighted`: draws by `weights`. `sandwich`: the full, the
      smallest and num_sampled - 2 draws. `all`: every sub-model. `multi_exit`: every depth in one forward pass (SoFT),
      which needs no num_sampled, accum_data and executor.
    num_sampled: sub-models of a step (g_n in the paper).
    replacement: whether a step may draw a sub-model twice.
    weights: for `weighted` and `multi_exit`: one number per sub-model in the order of `submodels`, scaled to sum to 1.
    accum_data: whether the sub-models of a step each see the `shared` batch, or `split` it between them.
    distill: in-place distillation: share of the loss of all but the full sub-model that is the soft cross entropy to
      the full one's output of the same step; 1 in slimmable networks. Needs `sandwich` or `all`, and shared data.
    distill_temperature: softens both distributions.
    executor: how sub-models run in training; see `adaptive.executors`. `static` compiles each choice of a step.
  """

  depths: tuple[int, ...] = ()
  q_per_kv: tuple[int, ...] = ()
  d_ff: tuple[int, ...] = ()
  listed: tuple[tuple[int, ...], ...] = ()
  scheme: Literal["uniform", "weighted", "sandwich", "all", "multi_exit"] = "uniform"
  num_sampled: int = 2
  replacement: bool = False
  weights: tuple[float, ...] = ()
  accum_data: Literal["shared", "split"] = "split"
  distill: float = 0.0
  distill_temperature: float = 1.0
  executor: Literal["static", "switch", "mask"] = "switch"


# Programs that `static` may compile in one run, one for each set of sub-models that a step can draw.
_MAX_STATIC_CHOICES = 64


class SortedNet(Transformer):
  """The backbone, with the family that it holds. It has the backbone's parameters and no others."""

  method: Config = Config()


def build(model_config: ModelConfig, config: Config) -> SortedNet:
  for name, full in (
    ("depths", model_config.num_layers),
    ("q_per_kv", model_config.q_per_kv),
    ("d_ff", model_config.d_ff),
  ):
    sizes = getattr(config, name)
    require(
      not sizes or (list(sizes) == sorted(set(sizes)) and sizes[0] > 0 and sizes[-1] == full),
      f"method.{name}={sizes} must be positive, increasing and end with the model's own size {full}",
    )
  _check_listed(model_config, config)
  model = SortedNet(model_config, method=config)
  family = _family(model)
  for subnet in family:
    subnets.validate(model_config, subnet)
  _check_scheme(config, family)
  return model


def _check_listed(model: ModelConfig, config: Config) -> None:
  if not config.listed:
    return
  require(
    not (config.depths or config.q_per_kv or config.d_ff), "method.listed replaces method.depths, q_per_kv and d_ff"
  )
  full = (model.num_layers, model.q_per_kv, model.d_ff)
  for sizes in config.listed:
    require(len(sizes) == 3, f"method.listed needs (depth, q_per_kv, d_ff) triples, not {sizes}")
    fits = all(0 < size <= most for size, most in zip(sizes, full))
    require(fits, f"method.listed={sizes} must be positive and at most the model's own {full}")
  require(len(set(config.listed)) == len(config.listed), "method.listed names a sub-model twice")
  require(config.listed[-1] == full, f"method.listed must end with the full model {full}, not {config.listed[-1]}")
  least = tuple(map(min, zip(*config.listed)))
  require(config.listed[0] == least, f"method.listed must begin with {least}, which is part of all others")


def _check_scheme(config: Config, family: tuple[subnets.Subnet, ...]) -> None:
  sampled, scheme = config.num_sampled, config.scheme
  require(sampled >= (2 if scheme == "sandwich" else 1), f"method.num_sampled={sampled} is too small for {scheme!r}")
  require(
    not config.weights or len(config.weights) == len(family),
    f"method.weights has {len(config.weights)} entries for {len(family)} sub-models",
  )
  require(scheme != "weighted" or config.weights, "method.scheme='weighted' needs method.weights")
  require(not config.weights or scheme in ("weighted", "multi_exit"), f"method.weights means nothing to {scheme!r}")
  require(
    not config.weights or (min(config.weights) >= 0 and sum(config.weights) > 0),
    "method.weights must not be negative, and not all zero",
  )
  require(
    scheme != "weighted" or config.replacement or sampled == 1,
    f"method.weights are not followed by {sampled} draws without replacement: set method.replacement or num_sampled=1",
  )
  choices = _num_choices(config, len(family))
  require(choices > 0, f"method.num_sampled={sampled} is more than {scheme!r} can draw from {len(family)} sub-models")
  require(
    config.executor != "static" or choices <= _MAX_STATIC_CHOICES,
    f"method.executor='static' compiles each of {choices} choices, more than {_MAX_STATIC_CHOICES}: use 'switch'",
  )
  require(config.distill_temperature > 0, f"method.distill_temperature={config.distill_temperature} must be positive")
  require(0.0 <= config.distill <= 1.0, f"method.distill={config.distill} must lie in [0, 1]")
  require(
    not config.distill or (scheme in ("sandwich", "all") and config.accum_data == "shared"),
    "method.distill needs method.scheme 'sandwich' or 'all' and method.accum_data='shared'",
  )
  require(not config.distill or len(family) > 1, "method.distill needs a sub-model beside the full one")
  require(
    scheme != "multi_exit" or len({s.widths for s in family}) == 1,
    "method.scheme='multi_exit' trains depths only: leave method.q_per_kv and method.d_ff empty",
  )


def _num_choices(config: Config, size: int) -> int:
  """How many different sets of sub-models a step can draw from a family of that size; 0 when it cannot draw."""
  if config.scheme in ("all", "multi_exit"):
    return 1
  fixed = 2 if config.scheme == "sandwich" else 0
  size = sum(weight > 0 for weight in config.weights) if config.weights else size - fixed
  if size < 0:
    return 0
  drawn = config.num_sampled - fixed
  return math.comb(max(size + drawn - 1, 0) if config.replacement else size, drawn)


def submodels(model: SortedNet) -> tuple[SubModel, ...]:
  """The listed sub-models or the product, the full model last; names leave out a dimension without a choice."""
  method, config = model.method, model.config
  if len(method.listed) > 1:
    varied = [len(set(sizes)) > 1 for sizes in zip(*method.listed)]
    named = [zip(("depth", "q_per_kv", "d_ff"), sizes, varied) for sizes in method.listed]
    return tuple(SubModel.of(**{name: size for name, size, shown in sizes if shown}) for sizes in named)
  axes = {"depth": method.depths, "q_per_kv": method.q_per_kv, "d_ff": method.d_ff}
  axes = {name: sizes for name, sizes in axes.items() if sizes} or {"depth": (config.num_layers,)}
  return tuple(SubModel.of(**dict(zip(axes, sizes))) for sizes in itertools.product(*axes.values()))


def subnet_of(model: SortedNet, submodel: SubModel) -> subnets.Subnet:
  """The part of the backbone that a sub-model runs."""
  return subnets.prefix(model.config, **dict(submodel.dial))


def _family(model: SortedNet) -> tuple[subnets.Subnet, ...]:
  return tuple(subnet_of(model, s) for s in submodels(model))


def sample(model: SortedNet, seed: int, step: int) -> tuple[int, ...]:
  """Indices of the step's sub-models, keyed by (seed, step) with a counter-based generator.

  Draws are in increasing order, so that `static` compiles a set of sub-models once, not once per order.
  """
  method, size = model.method, len(submodels(model))
  if method.scheme in ("all", "multi_exit"):
    return tuple(reversed(range(size)))
  rng = np.random.Generator(np.random.Philox(key=[seed, step]))
  if method.scheme == "sandwich":
    middle = rng.choice(np.arange(1, size - 1), method.num_sampled - 2, replace=method.replacement)
    return (size - 1, 0, *sorted(middle.tolist()))
  weights = np.array(method.weights) / sum(method.weights) if method.scheme == "weighted" else None
  return tuple(sorted(rng.choice(size, method.num_sampled, replace=method.replacement, p=weights).tolist()))


def static_choice(model: SortedNet) -> bool:
  return model.method.executor == "static" or model.method.scheme == "multi_exit"


def batch_parts(model: SortedNet) -> int:
  split = model.method.accum_data == "split" and model.method.scheme != "multi_exit"
  return len(sample(model, 0, 0)) if split else 1


def forward(model: SortedNet, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits of one sub-model: cut out when the index is an int, else by the configured one-compile executor."""
  family = _family(model)
  check_index(index, len(family))
  if isinstance(index, int):
    return Output(executors.static(model.config, params, batch, family[index]), {})
  run = executors.mask if model.method.executor == "mask" else executors.switch
  return Output(run(model.config, params, batch, executors.choices(model.config, family), index), {})


def loss(model: SortedNet, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Mean over the step's sub-models of the next-token cross entropy."""
  if model.method.scheme == "multi_exit":
    return _multi_exit_loss(model, params, batch, choice)
  if model.method.distill:
    return _distilled_loss(model, params, batch, choice)

  split = batch_parts(model) > 1

  def entry_loss(params, rows, entry):
    index, part = entry
    rows = jax.tree.map(lambda x: x[part], rows) if split else rows
    pair = _task_loss(forward(model, params, rows, index).logits, rows)
    return losses.mean(pair), pair

  rows = sharding.split_rows(batch, len(choice)) if split else batch
  if static_choice(model):
    entries = list(zip(choice, range(len(choice))))
  else:
    entries = (choice, jnp.arange(len(choice)))
  total, pairs = losses.mean_over(entry_loss, params, rows, entries)
  return total, _metrics(pairs)


def _task_loss(logits: jax.Array, batch: Batch) -> losses.SumCount:
  return losses.cross_entropy(logits, batch["targets"], losses.counted(batch))


def _metrics(pairs: losses.SumCount) -> Metrics:
  """From (sum, count) of each sub-model of the step, [n]."""
  return {"loss": jax.tree.map(jnp.sum, pairs), "submodel_loss": pairs}


def _distilled_loss(model: SortedNet, params: Params, batch: Batch, choice) -> tuple[jax.Array, Metrics]:
  """In-place distillation: the full sub-model, first in the choice, learns from labels and teaches the others."""
  method = model.method
  teacher = forward(model, params, batch, len(submodels(model)) - 1).logits
  hard = _task_loss(teacher, batch)

  def student_loss(params, shared, index):
    rows, teacher = shared
    logits = forward(model, params, rows, index).logits
    task = _task_loss(logits, rows)
    soft = losses.soft_cross_entropy(logits, teacher, losses.counted(rows), method.distill_temperature)
    return (1 - method.distill) * losses.mean(task) + method.distill * losses.mean(soft), task

  shared = (batch, jax.lax.stop_gradient(teacher))
  rest, tasks = losses.mean_over(student_loss, params, shared, list(choice[1:]) if static_choice(model) else choice[1:])
  pairs = jax.tree.map(lambda first, others: jnp.concatenate([first[None], others]), hard, tasks)
  return (losses.mean(hard) + rest * (len(choice) - 1)) / len(choice), _metrics(pairs)


def _multi_exit_loss(model: SortedNet, params: Params, batch: Batch, choice) -> tuple[jax.Array, Metrics]:
  """SoFT: every depth's output, through the shared norm and head, in one forward pass."""
  depths = [len(_family(model)[index].layer_path) for index in choice]
  weights = np.array([model.method.weights[i] for i in choice]) if model.method.weights else np.ones(len(depths))

  head = lambda _, x: model.apply({"params": params}, x, method="head")
  pairs = objectives.exit_losses(head, None, executors.exits(model.config, params, batch, depths), batch)
  return objectives.weighted(pairs, weights), _metrics(pairs)


def cost(model: SortedNet, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  return costs.dense_cost(subnets.config_of(model.config, subnet_of(model, submodel)), seq_len)


def update_flops(model: SortedNet, choice: tuple[int, ...], seq_len: int) -> float:
  """Every sub-model of the choice sees the batch, or its own part of it; SoFT's exits share one forward pass.

  In-place distillation costs nothing more: the teacher's output is that of the full sub-model's own training pass.
  """
  if model.method.scheme == "multi_exit":
    full = costs.dense_cost(model.config, seq_len).flops_per_token
    return costs.update_flops(full + (len(choice) - 1) * costs.head_flops(model.config))
  family = submodels(model)
  forward = sum(cost(model, family[index], seq_len, {}).flops_per_token for index in choice)
  return costs.update_flops(forward) / batch_parts(model)


def extract(model: SortedNet, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params]:
  """The sub-model as an ordinary dense checkpoint."""
  subnet = subnet_of(model, submodel)
  return subnets.config_of(model.config, subnet), subnets.extract(model.config, params, subnet)


def decoder(model: SortedNet, params: Params, submodel: SubModel) -> Decoder:
  """The extracted sub-model's: what is left out is neither stored nor computed."""
  return Decoder(*decoding.dense(*extract(model, params, submodel)))


def ladder(model: SortedNet, params: Params, drafts: Sequence[SubModel] | None) -> ladders.Ladder | None:
  """Sub-models of full width may draft: their layers are the model's first."""
  full = subnets.prefix(model.config)
  wanted = drafts_of(submodels(model), drafts)
  parts = [subnet_of(model, submodel) for submodel in wanted]
  for submodel, part in zip(wanted, parts):
    require(
      drafts is None or part.widths == full.widths, f"{submodel.name} is narrower than the model: it cannot draft"
    )
  paths = sorted({part.layer_path for part in parts if part.widths == full.widths} - {full.layer_path}, key=len)
  return ladders.of_paths(model.config, params, full.layer_path, paths) if paths else None

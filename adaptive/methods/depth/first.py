"""FiRST: a router at each layer reads the prompt and fixes, once, whether the rest of the document runs the layer.

Jain et al., "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction" (arXiv 2410.12513,
Findings of EMNLP 2025). The prompt runs all layers; since a skipped layer is skipped by every later token, caches stay
plain. Routers are trained first, on a frozen model, then the model with them. The executor, and why no key is ever
missed, is `adaptive.depth.prompt_plan`.

Departures, with reasons:
- text has no marked prompt, so the first `prompt_tokens` tokens of each document (of its piece in a packed row) are it.
  Decisions are then causal, and evaluation of whole rows is what decoding does. A longer prompt is read by its first
  tokens only; its others follow their decision;
- the first and the last layer are never skipped: nothing else reads the embedding, and the head knows the last one;
- the paper's exact loss was not at hand, and no code was found: ours is the cross entropy plus
  `budget_loss` (r - target)^2, r being the mean share of the routed layers that tokens after the prompt run. The paper
  has a skip-rate term and a penalty that keeps routers from running everything; `target` is what both are for;
- a decision is hard forward and passes the probability's gradient backward (straight-through), so that what is trained
  is what runs; `soft` weighs by the probability, as soft gates do;
- routers begin with weight 0 and bias +2: every layer of every document runs (probability 0.88, above all default
  thresholds), so training begins at the given model, and with a gradient that is not saturated;
- the second stage trains all parameters where the paper trains LoRA adapters.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from adaptive import cost as costs
from adaptive import losses, routing
from adaptive.backbone import decoding
from adaptive.backbone.layers import param
from adaptive.backbone.transformer import Transformer
from adaptive.config import Experiment, ModelConfig, require, require_range, require_trained
from adaptive.depth import chance, prompt_plan
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index
from adaptive.methods.defaults import (
  batch_parts,
  control,
  diagnose,
  init_from,
  ladder,
  static_choice,
  ticker,
)

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip

START = 2.0  # a fresh router's bias
TRAINED_AT = 0.5  # the threshold of training


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of FiRST.

  Attributes:
    prompt_tokens: of each document, that run all layers and decide for the others.
    thresholds: each is a sub-model: tokens after the prompt run a layer where its router's probability is above,
      strictly; increasing. Training decides at 0.5.
    target: share of the routed layers (all but the first and the last) that tokens after the prompt should run.
    budget_loss: weight of its squared distance to the share that they do run.
    estimator: of the gradient of a decision: `straight_through`, or `soft`, which weighs a layer's update by the
      probability in training (and makes hard decisions afterwards).
    train: `all`, or the `routers` alone, all else frozen: the first stage, which needs a trained model to begin with
      (`training.init_from`); the second stage begins with the first one's run in the same way.
  """

  prompt_tokens: int = 16
  thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
  target: float = 0.75
  budget_loss: float = 1.0
  estimator: Literal["straight_through", "soft"] = "straight_through"
  train: Literal["routers", "all"] = "all"

  def __post_init__(self):
    require_range(self, "method.", "prompt_tokens", 1)
    require_range(self, "method.", "target", 0, 1)
    require_range(self, "method.", "budget_loss", 0)
    increasing = list(self.thresholds) == sorted(set(self.thresholds))
    require(
      increasing and all(0 <= threshold <= 1 for threshold in self.thresholds),
      f"method.thresholds={self.thresholds} must be increasing and lie in 0 .. 1",
    )


class Routers(nn.Module):
  """Declares a linear router for each of several layers: `weight` [n, d, 1], `bias` [n]."""

  config: ModelConfig
  number: int

  @nn.compact
  def __call__(self) -> None:
    param(self, "weight", nn.initializers.zeros, (self.number, self.config.d_model, 1), (None, None, None))
    param(self, "bias", nn.initializers.constant(START), (self.number,), (None,))


class FiRST(Transformer):
  """The backbone's parameters, and `routers` of all layers but the first and the last.

  Attributes:
    chance: of a baseline: for every sub-model the share of the documents that run each routed layer after their
      prompts, whichever they are.
  """

  method: Config = Config()
  chance: tuple[tuple[float, ...], ...] = ()

  def setup(self):
    super().setup()
    self.routers = Routers(self.config, self.routed)

  @property
  def routed(self) -> int:
    """Number of layers that have a router."""
    return self.config.num_layers - 2

  def __call__(self, batch: Batch) -> jax.Array:
    """Float32 logits [b, t, v] of the full model, which skips nothing."""
    if self.is_initializing():
      self.routers()
    return super().__call__(batch)


def build(model_config: ModelConfig, config: Config) -> FiRST:
  layers = model_config.num_layers
  require(layers >= 3, f"model.num_layers={layers}: the first and the last are never skipped, so 3 are the least")
  return FiRST(model_config, method=config)


def check_training(model: FiRST, experiment: Experiment) -> None:
  if model.method.train == "routers":
    require_trained(experiment.training, "method.train='routers'")


def submodels(model: FiRST) -> tuple[SubModel, ...]:
  """A threshold each; the full model, which skips nothing, last."""
  dials = [SubModel.of(threshold=threshold) for threshold in model.method.thresholds]
  return (*dials, SubModel.of(depth=model.config.num_layers))


def sample(model: FiRST, seed: int, step: int) -> tuple[int, ...]:
  """One loss trains all thresholds: the choice is always the full model."""
  return (len(submodels(model)) - 1,)


def score(params: Params, which: int | jax.Array, x: jax.Array) -> jax.Array:
  """Router's logit of each token's stream, [b, t, d] -> float32 [b, t]."""
  bias = params["routers"]["bias"][which].astype(jnp.float32)
  return routing.router_logits(params["routers"], which, x)[..., 0] + bias


def plans(model: FiRST, threshold: float | jax.Array) -> prompt_plan.Plans:
  return prompt_plan.Plans(model.method.prompt_tokens, threshold, score)


def backbone(params: Params) -> Params:
  """All but the routers."""
  return {name: part for name, part in params.items() if name != "routers"}


def loss(model: FiRST, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy under the routers' plans, and the budget loss; metrics have the share that was run."""
  method, real = model.method, batch["segment_ids"] > 0
  if method.train == "routers":
    params = {**jax.lax.stop_gradient(backbone(params)), "routers": params["routers"]}
  made = plans(model, TRAINED_AT)
  logits, gates = prompt_plan.one_shot(model, params, batch, made, method.estimator)
  pair = losses.cross_entropy(logits, batch["targets"], losses.counted(batch))
  decided = real & ~made.prompt(batch["positions"])
  run = jnp.sum(gates * decided[None]), model.routed * jnp.sum(decided, dtype=jnp.float32)
  # Rows of prompts only say nothing of the share.
  budget = jnp.where(run[1] > 0, jnp.square(losses.mean(run) - method.target), 0.0)
  return losses.mean(pair) + method.budget_loss * budget, {"loss": pair, "run": run}


def learning_rates(model: FiRST) -> dict[str, float]:
  """The first stage freezes all but the routers."""
  return dict.fromkeys(("embedding", "layers", "final_norm"), 0.0) if model.method.train == "routers" else {}


def forward(model: FiRST, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits under the plans that prompts make at a threshold; the full model's where the index is its number."""
  thresholds = (*model.method.thresholds, -1.0)  # no probability is below that
  check_index(index, len(thresholds))
  if isinstance(index, int) and index == len(thresholds) - 1:
    return Output(Transformer(model.config).apply({"params": backbone(params)}, batch), {})
  threshold = jnp.asarray(thresholds, jnp.float32)[index]
  made = plans(model, threshold)
  rates = jnp.asarray(model.chance)[index] if model.chance else None
  logits, gates = prompt_plan.one_shot(model, params, batch, made, rates=rates)
  return Output(logits, prompt_plan.realised(gates > 0, batch["segment_ids"] > 0, made.prompt(batch["positions"])))


def at_random(model: FiRST, realised: Sequence[Metrics]) -> tuple[FiRST, Sequence[int | None]] | None:
  """As many documents run each layer after their prompts, whichever they are."""
  rates = []
  for one in realised:
    prompts = chance.share(one["prompt"])
    ran = [chance.share(one[f"ran/{layer}"]) for layer in range(1, model.routed + 1)]
    rates.append(tuple((share - prompts) / (1 - prompts) if prompts < 1 else 1.0 for share in ran))
  return (model.clone(chance=tuple(rates)), [*range(len(rates) - 1), None]) if len(rates) > 1 else None


def router_flops(model: FiRST) -> float:
  """Forward FLOPs of all routers for one token."""
  return 2.0 * model.routed * routing.router_weights("linear", model.config.d_model, 1)


def cost(model: FiRST, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  """From the shares of the tokens that ran each layer; without them as if none were skipped.

  A layer that runs is counted with the mean attended length of all tokens. Those that skip come later in a document
  than those of the prompt and attend to more, so what they save is somewhat more than is counted.
  """
  config, layers = model.config, range(1, model.routed + 1)
  dense = costs.with_params(costs.dense_cost(config, seq_len), model.routed * (config.d_model + 1))
  if submodel == submodels(model)[-1]:  # asks no router
    return dense
  ran = [realised[f"ran/{layer}"] if realised else (1.0, 1.0) for layer in layers]
  run = 2 + sum(float(some) / float(number) for some, number in ran)
  flops = run * costs.layer_flops(config, (seq_len + 1) / 2) + router_flops(model) + costs.head_flops(config)
  written = round(dense.kv_bytes_per_token * run / config.num_layers)
  return dataclasses.replace(dense, flops_per_token=flops, kv_bytes_per_token=written)


def update_flops(model: FiRST, choice: tuple[int, ...], seq_len: int) -> float:
  """All layers, whatever is skipped: a decision's gradient is what its layer would have changed.

  With the backbone frozen no gradient of its matrices is taken, and none goes below the second layer.
  """
  config = model.config
  dense = costs.dense_cost(config, seq_len).flops_per_token + router_flops(model)
  if model.method.train == "all":
    return costs.update_flops(dense)
  layer, matrices = costs.layer_flops(config, (seq_len + 1) / 2), costs.layer_flops(config, 0)
  through = (config.num_layers - 1) * (2 * layer - matrices) + costs.head_flops(config)
  return dense + through + 2 * router_flops(model)


def extract(model: FiRST, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params] | None:
  """The full model as a dense one; None for thresholds, where each document has layers of its own."""
  return (model.config, backbone(params)) if submodel == submodels(model)[-1] else None


def decoder(model: FiRST, params: Params, submodel: SubModel) -> Decoder:
  """With a threshold, layers that no row of the batch runs are left out."""
  found = extract(model, params, submodel)
  if found is not None:
    return Decoder(*decoding.dense(*found))
  return Decoder(*prompt_plan.decoder(model, params, plans(model, submodel["threshold"]), ("routers",)))

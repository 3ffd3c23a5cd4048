"""Mixture-of-Depths: some layers take only a part of the tokens, which a router chooses; the others pass them by.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models" (arXiv
2404.02258). In training a routed layer takes the top-k tokens of the row, a fixed number, so that shapes are static and
what is not chosen costs nothing (Sections 3.2 to 3.4); at inference a threshold decides, which looks at nothing ahead
(Section 3.5). `model` has the equations, `decode` the caches with holes. There is no released code.

Departures from the paper, and what it leaves open, with reasons:
- evaluation is causal like inference, where the paper's losses are under top-k; `diagnose` tells both;
- packed documents do not see each other, and padding is chosen last and is no target of a router;
- router scores are float32: a tie decides a token's path;
- the cross entropy of the routers is a mean over tokens and a sum over layers; the paper gives no weight for it;
- the predictor is d -> d / 8 -> 1: of the sizes of `adaptive.routing` the one that costs little beside what routing
  saves (the paper calls it small); it learns ten times as fast as the rest, and is clipped by itself;
- other gates than the score itself, chunks, and a bound on the tokens that pass (`capacity_scales`) are additions.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from adaptive import losses
from adaptive.config import ModelConfig
from adaptive.depth import chance
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, pick
from adaptive.methods.defaults import batch_parts, check_training, control, init_from, ladder, static_choice, ticker
from adaptive.methods.depth.mixture_of_depths import decode
from adaptive.methods.depth.mixture_of_depths.accounting import cost, update_flops
from adaptive.methods.depth.mixture_of_depths.config import Config
from adaptive.methods.depth.mixture_of_depths.diagnosis import diagnose
from adaptive.methods.depth.mixture_of_depths.model import (
  MixtureOfDepths,
  Rule,
  causal_logits,
  realised,
  training_logits,
)

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


def build(model_config: ModelConfig, config: Config) -> MixtureOfDepths:
  config.layers(model_config)  # refuses what cannot be
  return MixtureOfDepths(model_config, method=config)


def submodels(model: MixtureOfDepths) -> tuple[SubModel, ...]:
  """Another threshold, and a bound on the tokens; the full model, which is the threshold as trained, last."""
  shifts, scales = model.method.score_shifts, model.method.capacity_scales
  return (
    *(SubModel.of(score_shift=shift) for shift in shifts),
    *(SubModel.of(capacity_scale=scale) for scale in scales),
    SubModel.of(score_shift=0.0),
  )


def rule_of(submodel: SubModel) -> Rule:
  """The dial as `model` takes it."""
  return Rule(**dict(submodel.dial))


def sample(model: MixtureOfDepths, seed: int, step: int) -> tuple[int, ...]:
  """Training is always of the full model."""
  return (len(submodels(model)) - 1,)


def loss(model: MixtureOfDepths, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy under top-k, and the cross entropy of what will decide at inference."""
  logits, found = training_logits(model, params, batch)
  pair = losses.cross_entropy(logits, batch["targets"], losses.counted(batch))
  decisions = losses.mean(found["router_loss"]).sum()
  metrics = {name: (total.sum(), count.sum()) for name, (total, count) in found.items()}
  return losses.mean(pair) + model.method.decision_loss * decisions, {"loss": pair, **metrics}


def forward(model: MixtureOfDepths, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits under the causal rule. All tokens are computed, what does not pass is masked."""
  rule = pick([rule_of(submodel) for submodel in submodels(model)], index)
  rates = jnp.asarray(model.chance)[index] if model.chance else None
  logits, keeps = causal_logits(model, params, batch, rule, rates)
  return Output(logits, realised(model, keeps, batch["segment_ids"] > 0))


def at_random(
  model: MixtureOfDepths, realised: Sequence[Metrics]
) -> tuple[MixtureOfDepths, Sequence[int | None]] | None:
  """As many tokens pass every routed layer, whichever they are, and weigh by their scores as ever."""
  if model.method.capacity == 1:
    return None
  rates = tuple(tuple(chance.share(one[f"capacity/{layer}"]) for layer in model.routed) for one in realised)
  return model.clone(chance=rates), range(len(rates))


def learning_rates(model: MixtureOfDepths) -> Mapping[str, float]:
  """The predictor learns ten times as fast as the rest, and is clipped by itself, so that it moves nothing else."""
  return {"predictors": 10.0} if model.method.inference == "predictor" else {}


def extract(model: MixtureOfDepths, params: Params, submodel: SubModel) -> None:
  """A token's path is decided as it runs, so no plain model is equal."""


def decoder(model: MixtureOfDepths, params: Params, submodel: SubModel) -> Decoder:
  """With a cache for each layer; a step leaves out the routed layers that none of its tokens passes."""
  return decode.decoder(model, params, rule_of(submodel))

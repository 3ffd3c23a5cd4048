"""Mixture-of-Recursions: a shared block of layers runs several times, for each token as often as a router says.

Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation" (arXiv
2507.10524, NeurIPS 2025). `expert_choice` and `token_choice` are Section 2.2.1, `blocks` has the key/value rules of
Section 2.2.2, `causal` what decides at inference (Section 5.2, Appendix A.2), `adaptive.recursion` the sharing.

Departures from the paper and its released code, with reasons:
- attention is shared as the paper says (the released conversion unties it);
- inference is causal: routers decide by threshold, in evaluation too, where the released code takes the top k of a row;
- a recursion that takes all tokens of the one before lets all pass at inference: there was nothing to learn;
- packed documents do not see each other, and padding is chosen last and is no target of a router;
- the router loss is a mean over the update's tokens (the released sum over micro-batches grows with their number);
- the capacity warm-up counts updates and goes in stages, each a program (the released one counts micro-batches);
- while balancing warms up, its loss and its bias follow what the router wants, not the depth that all tokens are given;
- router scores are float32; `wide_mlp` is as wide as the paper says;
- with `shared` keys and values only chosen tokens are computed, as queries (the released code computes all);
- matrices that write to the residual stream are initialised by the unrolled depth, as everywhere in this project.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from adaptive import losses, recursion
from adaptive.config import ModelConfig, require
from adaptive.depth import chance
from adaptive.depth.ladder import Ladder
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, Ticker, pick
from adaptive.methods.defaults import batch_parts, check_training
from adaptive.methods.depth.mixture_of_recursions import causal, decode, ticks, token_choice
from adaptive.methods.depth.mixture_of_recursions import drafts as drafting
from adaptive.methods.depth.mixture_of_recursions.accounting import cost, update_flops
from adaptive.methods.depth.mixture_of_recursions.causal import Rule
from adaptive.methods.depth.mixture_of_recursions.config import Config, check, stage_of
from adaptive.methods.depth.mixture_of_recursions.diagnosis import diagnose
from adaptive.methods.depth.mixture_of_recursions.model import MixtureOfRecursions, causal_logits, training_logits

__all__ = [
  "Config", "at_random", "batch_parts", "build", "check_training", "control", "cost", "decoder", "diagnose", "extract",
  "forward", "init_from", "ladder", "learning_rates", "loss", "sample", "static_choice", "submodels", "ticker",
  "update_flops",
]  # fmt: skip


def build(model_config: ModelConfig, config: Config) -> MixtureOfRecursions:
  check(model_config, config)
  return MixtureOfRecursions(model_config, method=config)


def submodels(model: MixtureOfRecursions) -> tuple[SubModel, ...]:
  """Fewer recursions; all of them with another threshold, and with a bound on the tokens; the full model last."""
  config = model.method
  every = dict(recursions=config.num_recursions)
  return (
    *(SubModel.of(recursions=number) for number in config.fewer),
    *(SubModel.of(**every, score_shift=shift) for shift in config.score_shifts),
    *(SubModel.of(**every, capacity_scale=scale) for scale in config.capacity_scales),
    SubModel.of(**every),
  )


def rule_of(submodel: SubModel) -> Rule:
  """The dial as `causal` takes it."""
  return Rule(**dict(submodel.dial))


def sample(model: MixtureOfRecursions, seed: int, step: int) -> tuple[int, ...]:
  """Training is always of the full model; during the capacity warm-up the choice is its stage."""
  config = model.method
  if not config.warmup_steps:
    return (len(submodels(model)) - 1,)
  stage = stage_of(config, step)
  return (config.warmup_stages if stage is None else stage,)


def static_choice(model: MixtureOfRecursions) -> bool:
  return model.method.warmup_steps > 0


def loss(model: MixtureOfRecursions, params: Params, batch: Batch, choice, key, step) -> tuple[jax.Array, Metrics]:
  """Next-token cross entropy, with the losses of the routers."""
  config = model.method
  stage = choice[0] if config.warmup_steps and choice[0] < config.warmup_stages else None
  logits, router_losses, metrics = training_logits(model, params, batch, stage, key, step)
  pair = losses.cross_entropy(logits, batch["targets"], losses.counted(batch))
  return losses.mean(pair) + router_losses, {"loss": pair, **metrics}


def forward(model: MixtureOfRecursions, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits under the causal rule. All tokens are computed, what is not kept is masked."""
  choose, rule = None, pick([rule_of(submodel) for submodel in submodels(model)], index)
  if model.chance:
    embedded, _ = model.apply({"params": params}, batch, method="embed")
    places = chance.places(embedded, batch["positions"])
    choose = causal.by_chance(jnp.asarray(model.chance)[index], places)
    rule = Rule(model.method.num_recursions)
  logits, keeps = causal_logits(model, params, batch, rule, choose)
  return Output(logits, causal.realised(model, keeps, batch["segment_ids"] > 0))


def at_random(
  model: MixtureOfRecursions, realised: Sequence[Metrics]
) -> tuple[MixtureOfRecursions, Sequence[int | None]] | None:
  """As many candidates pass every recursion, whichever they are; expert choice only."""
  if not model.method.expert_choice:
    return None
  kept = [[chance.share(one[f"capacity/{r + 1}"]) for r in range(model.method.num_recursions)] for one in realised]
  rates = tuple(tuple(b / a if a else 0.0 for a, b in itertools.pairwise((1.0, *shares))) for shares in kept)
  decides = [any(0 < rate < 1 for rate in row) for row in rates]
  indices = [index if decided else None for index, decided in enumerate(decides)]
  return (model.clone(chance=rates), indices) if any(decides) else None


def control(model: MixtureOfRecursions, params: Params, metrics: Metrics) -> Params:
  """Loss-free balancing moves the bias of the choice, after each update."""
  if model.method.balance != "loss_free":
    return params
  bias = token_choice.balanced(model, params["router"]["bias"], metrics)
  return {**params, "router": {**params["router"], "bias": bias}}


def learning_rates(model: MixtureOfRecursions) -> Mapping[str, float]:
  """The auxiliary router learns ten times as fast as the rest, clipped by itself (the released code)."""
  return {"aux_router": 10.0} if model.method.inference == "aux_router" else {}


def init_from(model: MixtureOfRecursions, params: Params, source: Params, how: str, seed: int) -> Params:
  """The layers of a dense model of the unrolled depth, tied; routers stay fresh."""
  tied = recursion.tie(model.sharing, source["layers"], how, seed)
  return {**params, **source, "layers": tied}


def extract(model: MixtureOfRecursions, params: Params, submodel: SubModel) -> None:
  """A token's path is decided as it runs, so no plain model is equal."""


def decoder(model: MixtureOfRecursions, params: Params, submodel: SubModel) -> Decoder:
  """With a cache for each recursion; a step leaves out the recursions that none of its tokens needs."""
  return decode.decoder(model, params, rule_of(submodel))


def ladder(model: MixtureOfRecursions, params: Params, drafts: Sequence[SubModel] | None) -> Ladder | None:
  """Fewer recursions may draft, under expert choice without a bound on the tokens."""
  config = model.method
  able = config.expert_choice and config.num_recursions > 1
  require(able or drafts is None, "under token choice no sub-model can draft: a token's depth is decided at once")
  if not able:
    return None
  numbers = set()
  for submodel in submodels(model)[:-1] if drafts is None else drafts:
    fewer = submodel["recursions"] < config.num_recursions
    require(fewer or drafts is None, f"{submodel.name} takes as many recursions as the model: it cannot draft")
    numbers |= {submodel["recursions"]} if fewer else set()
  return drafting.ladder(model, params, sorted(numbers)) if numbers else None


def ticker(model: MixtureOfRecursions, params: Params, submodel: SubModel) -> Ticker:
  """One pass of the shared block for many requests, each at its own recursion."""
  return ticks.ticker(model, params, rule_of(submodel))

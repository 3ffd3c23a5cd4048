"""The functions of the contract for models that tokens leave at exits; a method's module imports those that fit it.

The model has a property `exits`, of the type `adaptive.depth.exits.Exits`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import Mesh

from adaptive import cost as costs
from adaptive import sharding, subnet
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.config import ModelConfig, require
from adaptive.depth import climb, exit_costs, lazy, oracle
from adaptive.depth import exits as parts
from adaptive.depth import ladder as ladders
from adaptive.methods.contract import Batch, Decoder, Metrics, Output, Params, SubModel, check_index, drafts_of

__all__ = ["at_random", "cost", "decoder", "diagnose", "extract", "forward", "ladder", "sample", "submodels"]


def _rule(model: nn.Module, submodel: SubModel) -> parts.Rule:
  return parts.rules(model.exits)[submodel.dial]


def submodels(model: nn.Module) -> tuple[SubModel, ...]:
  """Every exit as a fixed depth; every threshold; the full model last."""
  return tuple(SubModel(dial) for dial in parts.rules(model.exits))


def sample(model: nn.Module, seed: int, step: int) -> tuple[int, ...]:
  """One loss trains all exits: the choice is always the full model."""
  return (len(submodels(model)) - 1,)


def forward(model: nn.Module, params: Params, batch: Batch, index: int | jax.Array) -> Output:
  """Logits of the exit where each token leaves; a fixed depth is cut out when the index is an int."""
  rules = list(parts.rules(model.exits).values())
  check_index(index, len(rules))
  found = extract(model, params, submodels(model)[index]) if isinstance(index, int) else None
  if found is not None:
    config, small = found
    return Output(Transformer(config, parent=None).apply({"params": small}, batch), {})  # also from within a module
  exits = parts.up_to(model.exits, rules[index]) if isinstance(index, int) else model.exits
  return Output(*climb.one_shot(exits, params, batch, parts.choose(rules, index)))


def at_random(model: nn.Module, realised: Sequence[Metrics]) -> tuple[nn.Module, Sequence[int | None]] | None:
  """Tokens leave at every exit with the probability with which others did; where a head reads means, there is none."""
  exits, rules = model.exits, list(parts.rules(model.exits).values())
  deciding = [index for index, rule in enumerate(rules) if not parts.fixed(rule)]
  if not deciding or exits.signal({}, 0).averages:
    return None
  plans = []
  for index in deciding:
    tokens = [float(realised[index][f"ran/{depth}"][0]) for depth in exits.depths]
    plans += [after / before if before else 1.0 for before, after in itertools.pairwise(tokens)]
  how = dataclasses.replace(exits.how, signal="random", thresholds=(), per_exit=tuple(plans), decay=0.0)
  chance = model.clone(method=dataclasses.replace(model.method, exit=how))
  names = list(parts.rules(chance.exits))
  twins = {index: names.index((("plan", number),)) for number, index in enumerate(deciding, 1)}
  return chance, [twins.get(index) for index in range(len(rules))]


def diagnose(model: nn.Module, params: Params, batches: Sequence[Batch], mesh: Mesh) -> Mapping[str, float]:
  """`oracle_layers`: how many layers a token ran if it left as soon as its prediction is the full model's."""
  if model.exits.signal({}, 0).averages:
    return {}
  run = lambda params, batch: oracle.layers(model.exits, params, batch)
  measure = jax.jit(run, out_shardings=sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    found = [jax.device_get(measure(params, batch)) for batch in batches]
  layers, tokens = map(sum, zip(*found))
  return {"oracle_layers": float(layers / max(tokens, 1.0))}


def cost(model: nn.Module, submodel: SubModel, seq_len: int, realised: Metrics) -> costs.Cost:
  return exit_costs.cost(model.exits, _rule(model, submodel), seq_len, realised)


def extract(model: nn.Module, params: Params, submodel: SubModel) -> tuple[ModelConfig, Params] | None:
  """A fixed depth as a dense model, with the exit's own head where it has one; None for what does not stand alone."""
  rule, exits = _rule(model, submodel), model.exits
  if not parts.stands_alone(exits, rule):
    return None
  own = exits.own(params, rule.depth)
  params = {name: params[name] for name in ("embedding", "layers", "final_norm")}
  part = dataclasses.replace(subnet.prefix(model.config), layer_path=exits.layers[: rule.depth])
  config, small = subnet.config_of(model.config, part), subnet.extract(model.config, params, part)
  if own is None:
    return config, small
  table = {"table": small["embedding"]["table"], "head": own["matrix"]}
  small |= {"embedding": table, "final_norm": {"scale": own["scale"]}}
  return dataclasses.replace(config, tied_embeddings=False), small


def decoder(model: nn.Module, params: Params, submodel: SubModel) -> Decoder:
  """A fixed depth is a dense model; with thresholds, layers that no row needs are left out."""
  exits, rule = model.exits, _rule(model, submodel)
  found = extract(model, params, submodel)
  if found is not None and parts.repeated(exits, rule.depth):  # the weights of a shared layer once
    return Decoder(*decoding.dense(found[0], {**found[1], "layers": params["layers"]}, exits.layers[: rule.depth]))
  if found is not None:
    return Decoder(*decoding.dense(*found))
  if exits.how.kv in parts.FULL_KEYS and parts.fixed(rule):  # all leave together: there are no keys to be had
    exits = exits._replace(how=dataclasses.replace(exits.how, kv="project"))
  elif exits.how.kv in parts.FULL_KEYS:
    again, wait = exits.how.kv == "recompute", exits.how.wait
    return Decoder(*lazy.decoder(exits, params, rule, wait, again), cycle=wait + 1)
  return Decoder(*climb.decoder(parts.up_to(exits, rule), params, rule))


def ladder(model: nn.Module, params: Params, drafts: Sequence[SubModel] | None) -> ladders.Ladder | None:
  """Any exit at a fixed depth may draft; none where a head reads a mean of streams."""
  exits, layers = model.exits, model.exits.layers
  if exits.signal(params, 0).averages or len(exits.depths) == 1:
    return None
  wanted = drafts_of(submodels(model), drafts)
  rules = [_rule(model, submodel) for submodel in wanted]
  for submodel, rule in zip(wanted, rules):
    require(
      drafts is None or parts.fixed(rule), f"{submodel.name} leaves where it is sure: only a fixed depth can draft"
    )
  depths = sorted({rule.depth for rule in rules if parts.fixed(rule)})
  if exits.loop is not None:
    return ladders.of_loop(exits, params, depths)
  which = [*map(exits.depths.index, depths), len(exits.depths) - 1]
  own = any(exits.own(params, depth) is not None for depth in depths)
  head = (lambda params, draft, x: exits.head(params, which[draft], x)) if own else None
  return ladders.of_paths(model.config, params, layers, [layers[:depth] for depth in depths], head)

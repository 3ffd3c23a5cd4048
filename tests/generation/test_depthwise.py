"""Depth-wise batching says what plain generation says, for every request, whoever shares the slots with it."""

import collections
import math
import re

import jax
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import ConfigError
from adaptive.generation.depthwise import DepthwiseGenerator
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import METHODS

MOR = METHODS["mixture_of_recursions"]
STOP, MOST = 5, 8
PROMPTS = [np.random.default_rng(n).integers(0, 32, n).tolist() for n in (3, 1, 7, 5, 2, 4, 6)]


def made(**settings):
  config = tiny.model_config(num_layers=6 if settings.get("sharing") == "cycle" else 5)
  model = MOR.build(config, MOR.Config(num_recursions=3, score_shifts=(0.3,), capacity_scales=(0.5,), **settings))
  return model, tiny.random_params(model)


@pytest.mark.parametrize(("settings", "which", "temperature"), [
  (dict(), -1, 1.0),
  (dict(), 0, 0.0),
  (dict(gating="additive"), 3, 0.0),
  (dict(kv_cache="shared"), 2, 1.0),
  (dict(sharing="cycle", gate="tanh", router="mlp", inference="aux_router"), -1, 0.0),
], ids=str)  # fmt: skip
def test_requests_get_what_they_get_alone(settings, which, temperature):
  model, params = made(**settings)
  submodel, sampling = MOR.submodels(model)[which], Sampling(temperature=temperature)
  plain = Generator(MOR.decoder(model, params, submodel), 32, sampling, stop_tokens=(STOP,))(PROMPTS, MOST, seed=3)
  deep = DepthwiseGenerator(MOR.ticker(model, params, submodel), 32, sampling, stop_tokens=(STOP,), slots=3)
  found = deep(PROMPTS, MOST, seed=3)
  assert found.tokens == plain.tokens
  assert max(map(len, found.tokens)) == MOST
  assert 0 < found.occupancy <= 1


def test_on_a_mesh_programs_are_compiled_once_and_say_the_same():
  (model, params), mesh = made(), tiny.mesh(data=2, fsdp=2, tensor=2)
  submodel, greedy = MOR.submodels(model)[-1], Sampling(temperature=0.0)
  expected = Generator(MOR.decoder(model, params, submodel), 32, greedy)(PROMPTS, MOST).tokens
  spread = jax.device_put(params, sharding.state_shardings(tiny.shapes(model), mesh))
  deep = DepthwiseGenerator(MOR.ticker(model, spread, submodel), 32, greedy, slots=3)
  assert [deep(PROMPTS, MOST).tokens for _ in range(2)] == [expected] * 2
  assert (deep._admit._cache_size(), deep._tick._cache_size()) == (2, 1), "prompts one by one or by four"


def test_layers_around_the_loop_are_stored_in_place():
  model, params = made(kv_cache="shared")
  deep = DepthwiseGenerator(MOR.ticker(model, params, MOR.submodels(model)[-1]), 32, slots=3)
  tick = deep._tick.lower(deep._ticker.params, deep._empty(40), np.uint32(0), MOST)
  made_by = collections.defaultdict(set)
  for dims, name in re.findall(r" = \w+\[([\d,]+)\]\S* ([\w-]+)\(", tick.compile().as_text()):
    made_by[math.prod(map(int, dims.split(",")))].add(name)
  cache = deep._empty(40).slots.before[0].key
  found = set.union(*(made_by[rows * cache[0].size] for rows in (1, 2, 3)))  # of some slots, or of all
  assert "parameter" in found, "the text is read"
  assert found <= {"parameter", "get-tuple-element", "bitcast", "fusion", "scatter", "dynamic-update-slice"}


def test_a_shallow_token_does_not_wait_for_a_deep_one():
  model, params = made()
  params["router"]["weight"] = jax.numpy.zeros_like(params["router"]["weight"])  # no score exceeds the threshold
  tick = lambda which: DepthwiseGenerator(
    MOR.ticker(model, params, MOR.submodels(model)[which]), 32, Sampling(temperature=0.0), slots=2
  )(PROMPTS[:2], MOST)
  assert MOR.submodels(model)[-1].name == "recursions=3"
  assert tick(-1).ticks <= MOST + 2  # one pass a token, and ticks that the host is behind


def test_what_cannot_be_is_refused():
  model, params = made(kv_cache="hybrid")
  with pytest.raises(ConfigError, match="needs method.kv_cache 'recursion_wise' or 'shared'"):
    MOR.ticker(model, params, MOR.submodels(model)[-1])
  model = MOR.build(tiny.model_config(num_layers=5), MOR.Config(routing="token_choice"))
  with pytest.raises(ConfigError, match="needs method.routing='expert_choice'"):
    MOR.ticker(model, tiny.random_params(model), MOR.submodels(model)[-1])
  model, params = made()
  with pytest.raises(ConfigError, match="slots=0 must be at least 1"):
    DepthwiseGenerator(MOR.ticker(model, params, MOR.submodels(model)[-1]), 32, slots=0)

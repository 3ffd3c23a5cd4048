"""The language-model configs: sizes as published, and the same run for a method as for its ruler."""

import runpy

import pytest

from adaptive.methods import parse_config


def read(name: str, size: str):
  method, experiment = parse_config(runpy.run_path(f"configs/{name}.py")["get_config"](size))
  return method, experiment, method.build(experiment.model, experiment.method)


# Of the published checkpoints with these shapes: SmolLM2's 135M, 360M and 1.7B.
@pytest.mark.parametrize(("size", "parameters", "submodels"), [
  ("135m", 134_515_008, 12), ("360m", 361_821_120, 9), ("1.7b", 1_711_376_384, 9),
])  # fmt: skip
def test_sizes_and_recipes(size, parameters, submodels):
  dense, experiment, model = read("dense_lm", size)
  cost = dense.cost(model, dense.submodels(model)[0], experiment.data.seq_len, {})
  assert cost.params_total == parameters
  tokens = experiment.training.steps * experiment.data.batch_size * experiment.data.seq_len
  assert tokens == pytest.approx(20 * parameters, rel=0.02)

  sorted_net, other, nested = read("sorted_net_lm", size)
  assert len(sorted_net.submodels(nested)) == submodels
  assert sorted_net.cost(nested, sorted_net.submodels(nested)[-1], 2048, {}).params_total == parameters
  for part in ("model", "data", "training", "evaluation", "mesh"):
    assert getattr(other, part) == getattr(experiment, part)


# Unique parameters without the embedding, in millions, and the unrolled depth: the paper's Table 6.
@pytest.mark.parametrize(("which", "millions", "depth"), [
  ("135m,3", 42, 32), ("360m,2", 167, 32), ("360m,3", 118, 32), ("360m,4", 98, 34), ("730m,3", 252, 26),
  ("1.7b,3", 670, 26),
])  # fmt: skip
def test_sizes_of_mixture_of_recursions_are_the_paper_s(which, millions, depth):
  method, experiment, model = read("mixture_of_recursions_lm", which)
  cost = method.cost(model, method.submodels(model)[-1], 2048, {})
  assert cost.params_non_embedding / 1e6 == pytest.approx(millions, rel=0.012)
  assert experiment.model.num_layers == depth
  assert experiment.data.batch_size * experiment.data.seq_len == 2**21


def test_the_paper_s_saving_in_flops():
  """By its rule (Appendix D), with the head: 0.774 and 0.702 of a vanilla model of 32 layers."""
  dense, _, model = read("dense_lm", "360m")
  full = dense.cost(model, dense.submodels(model)[-1], 2048, {}).flops_per_token
  for recursions, ratio in ((2, 0.774), (3, 0.702)):
    method, _, mor = read("mixture_of_recursions_lm", f"360m,{recursions}")
    found = method.cost(mor, method.submodels(mor)[-1], 2048, {}).flops_per_token
    assert found / full == pytest.approx(ratio, abs=0.005)

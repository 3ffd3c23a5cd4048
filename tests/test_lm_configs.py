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

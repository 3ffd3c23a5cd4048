"""The baseline of chance: as many decisions of each kind, on others than those that the method would have made."""

import jax
import numpy as np
import pytest
import tiny

from adaptive.methods import METHODS

CONFIG = tiny.model_config()
SETTINGS = {
  "early_exit": dict(exits=(1, 3), exit=dict(thresholds=(0.22, 0.4))),
  "first": dict(prompt_tokens=4, thresholds=(0.4, 0.6)),
  "mixture_of_depths": dict(capacity=0.5, score_shifts=(1.0,)),
  "mixture_of_recursions": dict(num_recursions=2, score_shifts=(1.0,)),
}


def built(name):
  method = METHODS[name]
  settings = dict(SETTINGS[name])
  if "exit" in settings:
    settings["exit"] = method.Config().exit.__class__(**settings["exit"])
  return method, method.build(CONFIG, method.Config(**settings))


@pytest.mark.parametrize("name", SETTINGS)
def test_chance_decides_as_often_and_differently(name):
  method, model = built(name)
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG, rows=48, length=24)
  run = lambda model: jax.jit(lambda params, index: method.forward(model, params, batch, index))
  number = len(method.submodels(model))
  found = [run(model)(params, np.int32(index)) for index in range(number)]
  twin, indices = method.at_random(model, [jax.device_get(output.aux) for output in found])
  by_chance, decided = run(twin), 0
  assert len(indices) == number
  for output, index in zip(found, indices):
    if index is None:
      continue
    again = by_chance(params, np.int32(index))
    for key, (total, count) in output.aux.items():
      if key.startswith(("ran/", "capacity/")):
        assert abs(float(again.aux[key][0]) - float(total)) < 0.1 * float(count), key
        decided += 0 < float(total) < float(count)
    differ = not np.allclose(again.logits, output.logits)
    assert differ == any(0 < float(s) < float(c) for k, (s, c) in output.aux.items() if "/" in k)
  assert decided > 1, "the case decides nothing"


@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("early_exit", dict(exits=(1,), exit=dict(thresholds=()))),
    ("mixture_of_depths", dict(capacity=1.0)),
    ("mixture_of_recursions", dict(num_recursions=2, routing="token_choice")),
    ("first", dict(thresholds=())),
    ("dense", {}),
  ],
)
def test_where_nothing_is_decided_there_is_no_chance(name, settings, monkeypatch):
  monkeypatch.setitem(SETTINGS, name, settings)
  method, model = built(name)
  batch, params = tiny.packed_batch(CONFIG), tiny.random_params(model)
  realised = [method.forward(model, params, batch, np.int32(i)).aux for i in range(len(method.submodels(model)))]
  assert method.at_random(model, realised) is None

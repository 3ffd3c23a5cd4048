"""The baseline of chance: as many decisions of each kind, on others than those that the method would have made."""

import jax
import numpy as np
import pytest
import tiny

from adaptive.methods import METHODS

CONFIG = tiny.model_config(vocab_size=512)
SETTINGS = {
  "early_exit": dict(exits=(1, 3), exit=dict(thresholds=(0.02, 0.04))),
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


def measured(name, rows, length):
  """A method and its twin of chance: parameters, a batch, what each sub-model gave, and how to run the twin."""
  method, model = built(name)
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG, rows, length)
  run = lambda model: jax.jit(lambda params, index, batch: method.forward(model, params, batch, index))
  forward = run(model)
  found = [forward(params, np.int32(index), batch) for index in range(len(method.submodels(model)))]
  twin, indices = method.at_random(model, [jax.device_get(output.aux) for output in found])
  assert len(indices) == len(found)
  return params, batch, found, run(twin), indices


@pytest.mark.parametrize("name", SETTINGS)
def test_chance_decides_as_often_and_differently(name):
  """As often as independent draws would: a row and a document are no copies of others."""
  params, batch, found, by_chance, indices = measured(name, rows=600, length=24)
  decided, close = 0, 0.05 if name == "first" else 0.02  # FiRST draws for a thousand documents, not for each token
  for output, index in zip(found, indices):
    if index is None:
      continue
    again = by_chance(params, np.int32(index), batch)
    for key, (total, count) in output.aux.items():
      if key.startswith(("ran/", "capacity/")):
        assert abs(float(again.aux[key][0]) - float(total)) < close * float(count), key
        decided += 0 < float(total) < float(count)
    differ = not np.allclose(again.logits, output.logits)
    assert differ == any(0 < float(s) < float(c) for k, (s, c) in output.aux.items() if "/" in k)
  assert decided > 1, "the case decides nothing"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_draws_as_it_does_alone_and_a_later_token_changes_nothing_before(name):
  """So decoding can draw the same."""
  params, batch, _, by_chance, indices = measured(name, rows=6, length=16)
  index = np.int32(next(index for index in indices if index is not None))
  together = by_chance(params, index, batch).logits
  alone = by_chance(params, index, jax.tree.map(lambda leaf: leaf[3:4], batch)).logits
  np.testing.assert_allclose(alone[0], together[3], rtol=1e-4, atol=1e-4)
  changed = {**batch, "inputs": batch["inputs"].at[:, 10:].add(1) % CONFIG.vocab_size}
  np.testing.assert_array_equal(by_chance(params, index, changed).logits[:, :10], together[:, :10])


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

import dataclasses
import inspect
import json

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from adaptive import config_dict, methods
from adaptive import cost as costs
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.methods import METHODS
from adaptive.methods.contract import Method, SubModel
from adaptive.methods.width import sorted_net

# Settings that leave each method something to choose.
SETTINGS = {
  "dr_llm": dict(hidden=2, windows=2),
  "early_exit": dict(exits=(1, 3)),
  "first": dict(prompt_tokens=3),
  "jei_dnn": dict(exits=(1, 3)),
  "sorted_net": dict(depths=(2, 4), q_per_kv=(1, 3), d_ff=(8, 24)),
  "mixture_of_depths": dict(capacity=0.5, score_shifts=(0.5,), capacity_scales=(0.5,)),
  "mixture_of_recursions": dict(num_recursions=2, score_shifts=(0.5,), capacity_scales=(0.5,)),
  "ponder": dict(num_recursions=2),
  "recurrent_depth": dict(prelude=2, core=1, num_recursions=2),
  "recursive": dict(num_recursions=2, train_fewer=True),
  "unified_skip": dict(speedups=(1.3, 2.0)),
  "sec": dict(exits=(1, 3)),
}
# Models whose full dial is, by their paper, no plain transformer; their own tests say what it is.
NOT_PLAIN = ("mixture_of_depths", "mixture_of_recursions", "recurrent_depth")
FUNCTIONS = [name for name, value in vars(Method).items() if inspect.isfunction(value) and not name.startswith("_")]
MODEL = tiny.model_config()
# Methods whose given model is frozen, and which learn labels of it: not what the next token is.
LEARN_LABELS = ("dr_llm",)
# FLOPs of what training asks for and no sub-model does: the unit that says where to halt.
MORE_IN_TRAINING = {"ponder": 2 * MODEL.d_model}
every_method = pytest.mark.parametrize("name", METHODS)
every_plain_method = pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_PLAIN])


def training_batch(name):
  batch = tiny.packed_batch(MODEL, rows=4)
  return batch | tiny.labels(MODEL, batch) if name in LEARN_LABELS else batch


def built(name):
  method = METHODS[name]
  return method, method.build(MODEL, method.Config(**SETTINGS.get(name, {})))


@every_method
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_method_has_every_function_with_the_contract_s_parameters(name, function):
  wanted = [p for p in inspect.signature(getattr(Method, function)).parameters if p != "self"]
  assert list(inspect.signature(getattr(METHODS[name], function)).parameters) == wanted


def test_the_contract_asks_for_what_this_file_checks():
  assert {"build", "submodels", "sample", "loss", "forward", "cost", "extract"} <= set(FUNCTIONS)


@every_method
def test_a_method_s_config_is_frozen_and_hashable(name):
  config = METHODS[name].Config(**SETTINGS.get(name, {}))
  assert dataclasses.is_dataclass(config)
  assert type(config).__dataclass_params__.frozen
  hash(config)


@every_plain_method
def test_the_full_dial_is_the_dense_model(name):
  method, model = built(name)
  params, batch = tiny.random_params(model), tiny.packed_batch(MODEL)
  config, extracted = method.extract(model, params, method.submodels(model)[-1])
  assert config == MODEL  # what is shared is repeated
  plain = jax.jit(Transformer(MODEL).apply)({"params": extracted}, batch)
  last = len(method.submodels(model)) - 1
  for index in (last, np.int32(last)):
    found = jax.jit(lambda p, i=index: method.forward(model, p, batch, i).logits)(params)
    np.testing.assert_array_equal(found, plain)
  np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, batch), plain)


@every_method
def test_called_on_a_batch_a_model_computes_its_full_sub_model(name):
  method, model = built(name)
  params, batch = tiny.random_params(model), tiny.packed_batch(MODEL)
  full = method.forward(model, params, batch, len(method.submodels(model)) - 1).logits
  np.testing.assert_allclose(model.apply({"params": params}, batch), full, rtol=1e-5, atol=1e-5)


@every_method
def test_an_index_out_of_range_is_refused_as_an_int_and_clamped_as_a_traced_number(name):
  method, model = built(name)
  params, batch, number = tiny.random_params(model), tiny.packed_batch(MODEL), len(method.submodels(model))
  for wrong in (-1, number):
    with pytest.raises(IndexError, match=f"there is no sub-model {wrong}: they are numbered 0 to {number - 1}"):
      method.forward(model, params, batch, wrong)
  traced = jax.jit(lambda index: method.forward(model, params, batch, index).logits)
  np.testing.assert_array_equal(traced(np.int32(number + 5)), traced(np.int32(number - 1)))


@every_method
def test_names_are_unique_and_costs_grow_to_the_full_model(name):
  method, model = built(name)
  submodels = method.submodels(model)
  assert len({s.name for s in submodels}) == len(submodels)
  # Where nothing is left out, who is asked what may be costs more than the full model: heads, routers.
  each = [method.cost(model, s, 16, {}) for s in submodels if not s.name.startswith(("threshold", "budget"))]
  assert max(each, key=lambda c: c.flops_per_token) == each[-1]
  assert each[-1].params_total == sum(leaf.size for leaf in jax.tree.leaves(tiny.random_params(model)))


@every_method
def test_samples_are_indices_of_sub_models_and_the_loss_takes_them(name):
  method, model = built(name)
  choice = method.sample(model, 0, 0)
  assert set(choice) <= set(range(len(method.submodels(model))))
  batch = training_batch(name)
  argument = choice if method.static_choice(model) else np.asarray(choice, np.int32)
  loss, metrics = method.loss(model, tiny.random_params(model), batch, argument, jax.random.key(0), 0)
  total, count = metrics["loss"]
  assert np.isfinite(float(loss))
  labels = batch["visits"].size if name in LEARN_LABELS else float((batch["segment_ids"] > 0).sum())
  assert float(count) == labels
  assert all(np.shape(s) == np.shape(c) in ((), (len(choice),)) for s, c in metrics.values())
  assert np.isfinite(float(total))


@every_method
def test_rows_and_whole_batches_of_padding_are_no_nan(name):
  method, model = built(name)
  params, batch, choice = tiny.random_params(model), training_batch(name), method.sample(model, 0, 0)
  emptied = lambda rows: {
    key: leaf.at[rows].set(0) if key not in ("label_counts", "visits") else leaf for key, leaf in batch.items()
  }
  argument = choice if method.static_choice(model) else np.asarray(choice, np.int32)
  loss = lambda params, batch: method.loss(model, params, batch, argument, jax.random.key(0), 5)[0]
  gradient = jax.jit(jax.value_and_grad(loss))
  for rows in (slice(0, 1), slice(None)):
    found = gradient(params, emptied(rows))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEARN_LABELS])
def test_the_loss_is_of_the_predictions_that_count(name):
  """What stands in the text where nothing is scored changes no loss; where all is scored, it is the loss of text."""
  method, model = built(name)
  batch, choice = tiny.packed_batch(MODEL, rows=4), method.sample(model, 0, 0)
  real = batch["segment_ids"] > 0
  argument = choice if method.static_choice(model) else np.asarray(choice, np.int32)
  params, key = tiny.random_params(model), jax.random.key(0)
  run = jax.jit(lambda batch: method.loss(model, params, batch, argument, key, 0))
  tiny.assert_trees_equal(run({**batch, "scored": real.astype(np.int32)}), run(batch))
  scored = real & (batch["positions"] >= 2)
  answers = {**batch, "scored": scored.astype(np.int32)}
  loss, metrics = run(answers)
  assert float(metrics["loss"][1]) == float(scored.sum()) < float(real.sum())
  other = {**answers, "targets": np.where(scored, batch["targets"], (batch["targets"] + 1) % MODEL.vocab_size)}
  assert float(run(other)[0]) == float(loss) != float(run(batch)[0])


@every_method
def test_an_update_costs_more_than_its_smallest_sub_model_and_no_more_than_all_of_it_in_full(name):
  method, model = built(name)
  choice, forward = method.sample(model, 0, 0), [method.cost(model, s, 16, {}) for s in method.submodels(model)]
  found = method.update_flops(model, choice, 16)
  each = [cost.flops_per_token for cost in forward]
  # Training reads every exit, where a sub-model may read one, and asks what says where to halt.
  heads = len(forward) * costs.head_flops(MODEL) + MORE_IN_TRAINING.get(name, 0.0)
  least = costs.head_flops(MODEL) if name in LEARN_LABELS else 3 * min(each) / method.batch_parts(model)
  assert least <= found <= 3 * (len(choice) * max(each) + heads)
  assert method.update_flops(model, choice, 32) > found


@every_method
def test_a_default_config_makes_the_round_trip(name):
  config = methods.default_config(name)
  assert isinstance(config, ml_collections.ConfigDict)
  method, experiment = methods.parse_config(config)
  assert method is METHODS[name]
  assert experiment.method == method.Config()
  again = methods.parse_config(json.loads(config_dict.to_json(experiment, name)))
  assert again == (method, experiment)


@every_method
def test_an_unknown_field_of_a_method_is_refused_where_it_is_written(name):
  config = methods.default_config(name)
  with pytest.raises(AttributeError):
    config.method.dephts = (1,)
  with pytest.raises(ConfigError, match="unknown config field method.dephts"):
    methods.parse_config({"method": {"name": name, "dephts": (1,)}})


def test_the_nearest_field_is_named():
  with pytest.raises(ConfigError, match="did you mean method.depths?"):
    methods.parse_config({"method": {"name": "sorted_net", "dephts": (1,)}})


def test_an_unknown_method_is_refused_with_the_known_ones():
  with pytest.raises(
    ConfigError, match=r"unknown method 'sortednet'; the methods are dense, dr_llm, early_exit, first"
  ):
    methods.default_config("sortednet")
  with pytest.raises(ConfigError, match=r"method.name is missing"):
    methods.parse_config({"method": {}})


def test_a_sub_model_is_a_named_hashable_dial():
  submodel = SubModel.of(depth=3, threshold=0.5)
  assert (submodel.name, submodel["depth"]) == ("depth=3,threshold=0.5", 3)
  assert len({submodel, SubModel.of(depth=3, threshold=0.5)}) == 1
  assert sorted_net.submodels(built("sorted_net")[1])[-1] == SubModel.of(depth=4, q_per_kv=3, d_ff=24)

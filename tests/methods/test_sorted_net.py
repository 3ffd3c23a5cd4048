import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from adaptive import executors
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.methods.width import sorted_net
from adaptive.methods.width.sorted_net import Config

MODEL = tiny.model_config()
GRID = Config(depths=(1, 2, 4), q_per_kv=(1, 3), d_ff=(8, 24))


def build(**changes):
  return sorted_net.build(MODEL, dataclasses.replace(GRID, **changes))


def counts(model, steps=2000):
  return collections.Counter(i for step in range(steps) for i in sorted_net.sample(model, 3, step))


def chi_square(found, expected):
  return sum((found[i] - e) ** 2 / e for i, e in enumerate(expected) if e)


def test_the_family_is_the_product_with_the_full_model_last():
  names = [s.name for s in sorted_net.submodels(build())]
  assert len(names) == len(set(names)) == 12
  assert names[0] == "depth=1,q_per_kv=1,d_ff=8"
  assert names[-1] == "depth=4,q_per_kv=3,d_ff=24"


def test_a_dimension_without_a_choice_is_left_out_of_names():
  depths = sorted_net.build(MODEL, Config(depths=(2, 4)))
  assert [s.name for s in sorted_net.submodels(depths)] == ["depth=2", "depth=4"]
  full = sorted_net.build(MODEL, Config(num_sampled=1))
  assert [s.name for s in sorted_net.submodels(full)] == ["depth=4"]
  assert sorted_net.subnet_of(depths, sorted_net.submodels(depths)[0]).widths == (3, 24)


@pytest.mark.parametrize("scheme", ["uniform", "weighted", "sandwich", "all", "multi_exit"])
def test_sampling_is_a_pure_function_of_seed_and_step(scheme):
  fields = dict(scheme=scheme, num_sampled=3)
  if scheme == "weighted":
    fields |= dict(weights=tuple(range(1, 13)), replacement=True)
  family = dict(q_per_kv=(), d_ff=(), depths=(1, 2, 3, 4)) if scheme == "multi_exit" else {}
  draw = lambda seed, step: sorted_net.sample(build(**fields, **family), seed, step)
  forwards = [draw(5, step) for step in range(50)]
  assert [draw(5, step) for step in reversed(range(50))] == forwards[::-1]
  assert all(type(i) is int for choice in forwards for i in choice)
  varied = scheme not in ("all", "multi_exit")
  assert (len(set(forwards)) > 1) == varied
  assert ([draw(6, step) for step in range(50)] != forwards) == varied


@pytest.mark.parametrize("replacement", [False, True])
def test_uniform_sampling_is_uniform(replacement):
  found = counts(build(num_sampled=2, replacement=replacement))
  assert chi_square(found, [4000 / 12] * 12) < 31.3, "11 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("num_sampled", [1, 3])
def test_weighted_sampling_follows_the_weights(num_sampled):
  weights = (0.0, 1.0, 2.0, 3.0, *[0.5] * 8)
  model = build(scheme="weighted", num_sampled=num_sampled, replacement=num_sampled > 1, weights=weights)
  found = counts(model)
  assert found[0] == 0
  expected = [2000 * num_sampled * w / 10 for w in weights]
  assert chi_square(found, expected) < 29.6, "10 degrees of freedom, p = 0.001"


def test_the_sandwich_has_the_full_model_first_and_the_smallest_second():
  model = build(scheme="sandwich", num_sampled=4)
  for step in range(200):
    first, second, *middle = sorted_net.sample(model, 0, step)
    assert (first, second) == (11, 0)
    assert len(set(middle)) == 2
    assert set(middle) <= set(range(1, 11))
  middles = counts(model)
  assert chi_square([middles[i] for i in range(1, 11)], [400] * 10) < 27.9, "9 degrees of freedom, p = 0.001"


def test_without_replacement_nothing_repeats_and_with_it_something_does():
  repeats = lambda model: sum(len(set(c)) < len(c) for c in (sorted_net.sample(model, 0, s) for s in range(100)))
  assert repeats(build(num_sampled=6)) == 0
  assert repeats(build(num_sampled=6, replacement=True)) > 50


@pytest.mark.parametrize("replacement", [False, True])
def test_the_same_draw_comes_in_one_order_only(replacement):
  fields = dict(num_sampled=4, replacement=replacement)
  for model, free in ((build(**fields), 0), (build(scheme="sandwich", **fields), 2)):
    drawn = [sorted_net.sample(model, 0, step)[free:] for step in range(200)]
    assert drawn == [tuple(sorted(choice)) for choice in drawn]
    assert len(set(drawn)) > 20


def test_all_and_multi_exit_take_every_sub_model():
  assert sorted(sorted_net.sample(build(scheme="all"), 0, 0)) == list(range(12))
  depths = sorted_net.build(MODEL, Config(depths=(1, 2, 4), scheme="multi_exit"))
  assert sorted(sorted_net.sample(depths, 0, 0)) == [0, 1, 2]


@pytest.mark.parametrize(("changes", "message"), [
  (dict(depths=(2, 1, 4)), "method.depths=(2, 1, 4) must be positive, increasing and end with the model's own size 4"),
  (dict(depths=(0, 4)), "method.depths=(0, 4) must be positive"),
  (dict(depths=(2, 3)), "end with the model's own size 4"),
  (dict(q_per_kv=(1, 2)), "end with the model's own size 3"),
  (dict(q_per_kv=(1, 1, 3)), "increasing"),
  (dict(d_ff=(24, 48)), "end with the model's own size 24"),
  (dict(d_ff=(7, 24)), "multiple of model.ff_groups=2"),
  (dict(num_sampled=0), "method.num_sampled=0 is too small for 'uniform'"),
  (dict(num_sampled=1, scheme="sandwich"), "method.num_sampled=1 is too small for 'sandwich'"),
  (dict(num_sampled=13), "method.num_sampled=13 is more than 'uniform' can draw from 12 sub-models"),
  (dict(num_sampled=13, scheme="sandwich"), "is more than 'sandwich' can draw from 12"),
  (dict(num_sampled=3, scheme="sandwich", replacement=True, depths=(2, 4), q_per_kv=(), d_ff=()), "can draw from 2"),
  (dict(scheme="sandwich", depths=(), q_per_kv=(), d_ff=()), "can draw from 1 sub-models"),
  (dict(scheme="weighted", weights=(1.0,) * 12), "set method.replacement or num_sampled=1"),
  (dict(executor="static", num_sampled=2), "compiles each of 66 choices, more than 64: use 'switch'"),
  (dict(executor="static", num_sampled=4, scheme="sandwich", replacement=True, d_ff=(8, 16, 24)), "of 136 choices"),
  (dict(weights=(1.0, 2.0)), "method.weights has 2 entries for 12"),
  (dict(weights=(1.0,) * 12), "method.weights means nothing to 'uniform'"),
  (dict(scheme="weighted"), "needs method.weights"),
  (dict(scheme="weighted", weights=(0.0,) * 12), "not all zero"),
  (dict(scheme="weighted", weights=(-1.0, *[1.0] * 11)), "must not be negative"),
  (dict(distill=1.5, scheme="all", accum_data="shared"), "method.distill=1.5 must lie in [0, 1]"),
  (dict(distill=0.5), "method.distill needs"),
  (dict(distill=0.5, scheme="all"), "method.distill needs"),
  (dict(scheme="multi_exit"), "trains depths only"),
])  # fmt: skip
def test_an_impossible_setting_is_refused_in_one_line(changes, message):
  with pytest.raises(ConfigError) as error:
    build(**changes)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_step_splits_its_batch_into_as_many_parts_as_it_draws():
  assert sorted_net.batch_parts(build(num_sampled=3)) == 3
  assert sorted_net.batch_parts(build(num_sampled=3, accum_data="shared")) == 1
  assert sorted_net.batch_parts(build(scheme="all")) == 12
  assert sorted_net.batch_parts(sorted_net.build(MODEL, Config(depths=(1, 4), scheme="multi_exit"))) == 1


def test_only_static_execution_wants_the_choice_at_trace_time():
  wants = [sorted_net.static_choice(build(executor=e, num_sampled=1)) for e in ("static", "switch", "mask")]
  assert wants == [True, False, False]
  assert sorted_net.static_choice(sorted_net.build(MODEL, Config(depths=(1, 4), scheme="multi_exit")))


@pytest.mark.parametrize(("fields", "number"), [
  (dict(num_sampled=1), 12),
  (dict(num_sampled=11), 12),
  (dict(num_sampled=12), 1),
  (dict(scheme="all"), 1),
  (dict(scheme="sandwich", num_sampled=3), 10),
  (dict(scheme="sandwich", num_sampled=2), 1),
  (dict(scheme="weighted", num_sampled=2, replacement=True, weights=(0, 1, 2, 0, *[0] * 7, 3)), 6),
  (dict(num_sampled=3, replacement=True, depths=(1, 4), d_ff=()), 20),
], ids=str)  # fmt: skip
def test_static_execution_is_allowed_for_as_many_choices_as_are_drawn(fields, number):
  model = build(executor="static", **fields)
  drawn = {sorted_net.sample(model, 0, step) for step in range(1000)}
  assert len(drawn) == sorted_net._num_choices(model.method, len(sorted_net.submodels(model))) == number


FULL = (4, 3, 24)
LISTED = ((1, 3, 8), (1, 3, 24), (2, 3, 8), FULL)


def listed(*sizes, **fields):
  return sorted_net.build(MODEL, Config(listed=sizes, num_sampled=1, **fields))


def test_a_listed_family_is_the_list_in_its_order_with_what_varies_in_its_names():
  model = listed(*LISTED)
  names = ["depth=1,d_ff=8", "depth=1,d_ff=24", "depth=2,d_ff=8", "depth=4,d_ff=24"]
  assert [s.name for s in sorted_net.submodels(model)] == names
  found = [sorted_net.subnet_of(model, s) for s in sorted_net.submodels(model)]
  assert [(len(s.layer_path), *s.widths) for s in found] == list(LISTED)
  assert [s.name for s in sorted_net.submodels(listed(FULL))] == ["depth=4"]


@pytest.mark.parametrize(("sizes", "message"), [
  ((LISTED[0], LISTED[0], FULL), "names a sub-model twice"),
  (((1, 8), FULL), "needs (depth, q_per_kv, d_ff) triples, not (1, 8)"),
  (((1, 3, 8, 1), FULL), "triples, not (1, 3, 8, 1)"),
  (((1, 3, 8), (2, 3, 24)), "must end with the full model (4, 3, 24), not (2, 3, 24)"),
  (((1, 3, 8), FULL, (2, 3, 24)), "must end with the full model"),
  (((0, 3, 8), FULL), "method.listed=(0, 3, 8) must be positive and at most the model's own (4, 3, 24)"),
  (((-1, 3, 8), FULL), "method.listed=(-1, 3, 8) must be positive"),
  (((1, 3, 0), FULL), "method.listed=(1, 3, 0) must be positive"),
  (((1, 4, 8), FULL), "method.listed=(1, 4, 8) must be positive and at most"),
  (((5, 3, 8), FULL), "method.listed=(5, 3, 8) must be positive and at most"),
  (((2, 3, 8), (1, 3, 8), FULL), "method.listed must begin with (1, 3, 8), which is part of all others"),
  (((2, 3, 8), (1, 3, 24), FULL), "method.listed must begin with (1, 3, 8), which is part of all others"),
  (((1, 3, 7), FULL), "multiple of model.ff_groups=2"),
])  # fmt: skip
def test_an_impossible_list_is_refused_in_one_line(sizes, message):
  with pytest.raises(ConfigError) as error:
    listed(*sizes)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_list_replaces_the_product_and_must_vary_in_depth_alone_for_multi_exit():
  with pytest.raises(ConfigError, match="method.listed replaces method.depths"):
    listed(*LISTED, depths=(1, 4))
  with pytest.raises(ConfigError, match="trains depths only"):
    listed(*LISTED, scheme="multi_exit")
  model = listed((1, 3, 24), (3, 3, 24), FULL, scheme="multi_exit")
  assert [s.name for s in sorted_net.submodels(model)] == ["depth=1", "depth=3", "depth=4"]
  assert sorted_net.sample(model, 0, 0) == (2, 1, 0)


@pytest.mark.parametrize("index", [0, 5, 11])
def test_an_extracted_sub_model_is_a_dense_model_with_the_same_logits(index):
  model, params, batch = build(), tiny.random_params(MODEL), tiny.packed_batch(MODEL)
  config, small = sorted_net.extract(model, params, sorted_net.submodels(model)[index])
  alone = jax.jit(Transformer(config).apply)({"params": small}, batch)
  inside = jax.jit(lambda p: sorted_net.forward(model, p, batch, index).logits)(params)
  np.testing.assert_array_equal(alone, inside)
  size = sum(leaf.size for leaf in jax.tree.leaves(small))
  assert sorted_net.cost(model, sorted_net.submodels(model)[index], 12, {}).params_total == size


@pytest.mark.parametrize("executor", ["switch", "mask"])
def test_a_traced_index_runs_the_configured_executor_causally(executor, monkeypatch):
  model, params, batch = build(executor=executor), tiny.random_params(MODEL), tiny.one_document(MODEL)
  used = []
  run = getattr(executors, executor)
  monkeypatch.setattr(executors, executor, lambda *args: used.append(executor) or run(*args))
  forward = jax.jit(lambda batch, index: sorted_net.forward(model, params, batch, index).logits)
  changed = {**batch, "inputs": batch["inputs"].at[:, 5].add(1) % MODEL.vocab_size}
  outputs = set()
  for index in range(12):
    before, after = np.asarray(forward(batch, index)), np.asarray(forward(changed, index))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()
    outputs.add(before.tobytes())
  assert used == [executor], "traced once, for all"
  assert len(outputs) == 12

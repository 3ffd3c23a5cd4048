"""Lazy resume: the exits of a model with all its keys, for no more layers than that model runs."""

import functools

import jax
import numpy as np
import pytest
import tiny

from adaptive.depth import exit_costs
from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS

CONFIG, LENGTH, START = tiny.model_config(), 24, 3
METHOD = METHODS["early_exit"]


@functools.cache
def case(wait, threshold=0.22, rows=3, exits=(1, 2, 3), kv="exact"):
  model = METHOD.build(CONFIG, METHOD.Config(exits=exits, exit=Exiting(kv=kv, wait=wait, thresholds=(threshold,))))
  params, batch = tiny.random_params(model), tiny.one_document(CONFIG, rows=rows, length=LENGTH)
  index = len(exits)
  want = METHOD.forward(model, params, batch, index)
  decoder = METHOD.decoder(model, params, METHOD.submodels(model)[index])
  return model, params, batch, want, decoder._replace(step=jax.jit(decoder.step))


def decoded(decoder, batch, start=START):
  """Logits [b, t - start + 1, v], and the metrics of every call."""
  rows, length = batch["inputs"].shape
  cache, found, metrics = decoder.empty_cache(rows, length), [], []
  for begin, end in [(0, start), *zip(range(start, length), range(start + 1, length + 1))]:
    counts = np.full(rows, end - begin, np.int32)
    logits, cache, realised = decoder.step(decoder.params, batch["inputs"][:, begin:end], counts, cache)
    found.append(np.asarray(logits))
    metrics.append({name: float(total) for name, (total, _) in realised.items()})
  return np.stack(found, axis=1), metrics


@pytest.mark.parametrize(("wait", "kv"), [(1, "exact"), (2, "exact"), (5, "exact"), (32, "exact"), (3, "recompute")])
def test_every_token_has_the_logits_of_its_exit_in_the_full_model(wait, kv):
  _, _, batch, want, decoder = case(wait, kv=kv)
  found, metrics = decoded(decoder, batch)
  np.testing.assert_allclose(found, want.logits[:, START - 1 :], rtol=1e-5, atol=1e-5)
  assert sum(m["layers"] for m in metrics) == float(want.aux["layers"][0]), "the same exits"


def test_layer_tokens_are_the_suffix_maxima_of_the_exits():
  """Row by row, since rows resume together with their own newest token only."""
  _, _, batch, _, decoder = case(32, rows=1)
  _, metrics = decoded(decoder, batch)
  depths = [m["layers"] for m in metrics[1:]]  # of the tokens after the prompt, which went all the way
  deepest = np.maximum.accumulate(depths[::-1])[::-1]
  worked = sum(m["layer_tokens"] for m in metrics[1:])
  assert worked <= sum(deepest)  # what still waits at the end was needed by nobody
  resumed = 0
  waiting = []
  for depth in depths:  # by hand: what each step brings up
    resumed += depth + sum(max(depth - d, 0) for d in waiting)
    waiting = [max(d, depth) for d in waiting] + [depth]
  assert worked == resumed
  assert len(set(depths)) > 2
  assert worked < CONFIG.num_layers * len(depths)


@pytest.mark.parametrize(("wait", "threshold"), [(1, 0.05), (3, 0.22), (32, 0.2), (3, 2.0)])
def test_never_more_layer_tokens_than_the_full_model(wait, threshold):
  _, _, batch, _, decoder = case(wait, threshold)
  _, metrics = decoded(decoder, batch)
  total = 0.0
  for i, found in enumerate(metrics):
    total += found["layer_tokens"]
    assert total <= CONFIG.num_layers * 3 * (START + i)
  if threshold == 2.0:
    assert total == CONFIG.num_layers * 3 * LENGTH


@pytest.mark.parametrize("kv", ["exact", "recompute"])
@pytest.mark.parametrize("wait", [1, 2, 8])
def test_the_forward_pass_counts_what_decoding_runs_however_few_may_wait(wait, kv):
  config, length = tiny.model_config(num_layers=3), 14
  model = METHOD.build(config, METHOD.Config(exits=(1, 2), exit=Exiting(kv=kv, wait=wait, thresholds=(0.18,))))
  params, batch = tiny.random_params(model), tiny.one_document(config, rows=3, length=length)
  aux = METHOD.forward(model, params, batch, 2).aux
  decoder = METHOD.decoder(model, params, METHOD.submodels(model)[2])
  _, metrics = decoded(decoder._replace(step=jax.jit(decoder.step)), batch, start=1)
  assert sum(m["layer_tokens"] for m in metrics) == float(aux["layer_tokens"][0])
  assert len({m["layers"] for m in metrics}) > 2


def ran_of(depths, exits):
  """Which tokens ran the layers before each exit, of their depths [b, t]."""
  return [np.asarray(depths) > start for start, _ in exits.segments]


@pytest.mark.parametrize(("kv", "wait", "layers"), [("exact", 8, 292), ("exact", 40, 40), ("recompute", 2, 352)])
def test_nobody_is_forgotten_where_all_tokens_leave_after_the_first_layer(kv, wait, layers):
  """By hand: of 40 tokens every ninth runs all 8 layers with 8 others; every third, from the bottom, with 2 others."""
  config = tiny.model_config(num_layers=8)
  exits = METHOD.build(config, METHOD.Config(exits=(1, 4), exit=Exiting(kv=kv, wait=wait))).exits
  ran = ran_of(np.ones((1, 40), int), exits)
  assert float(exit_costs.layers_run(exits, ran, np.ones((1, 40), np.int32))) == layers


@pytest.mark.parametrize("wait", [1, 3, 32])
@pytest.mark.parametrize("kv", ["exact", "recompute"])
def test_documents_of_a_row_are_counted_apart(kv, wait):
  """Against a list of those that wait, document by document."""
  exits = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3), exit=Exiting(kv=kv, wait=wait))).exits
  segments = np.asarray(tiny.packed_batch(CONFIG, rows=3, length=LENGTH)["segment_ids"])
  depths, total = np.random.default_rng(0).choice([1, 3, 4], p=[0.6, 0.3, 0.1], size=segments.shape), 0
  for row, document in np.ndindex(3, 2):
    waiting = []
    for depth in depths[row][segments[row] == document + 1]:
      depth = 4 if len(waiting) == wait else depth
      total += depth + sum(max(depth - (0 if kv == "recompute" else d), 0) for d in waiting)
      waiting = [] if depth == 4 else [*(max(d, depth) for d in waiting), depth]
  assert float(exit_costs.layers_run(exits, ran_of(depths, exits), segments)) == total
  if (kv, wait) == ("exact", 32):
    each = [depths[row][segments[row] == document] for row in range(3) for document in (1, 2)]
    assert total == sum(np.maximum.accumulate(depth[::-1]).sum() for depth in each), "the bound while nobody is crowded"


def test_what_a_piece_brings_up_before_it_is_counted():
  """Six tokens that leave after one layer of two, then a piece of two: in the end all eight have run all."""
  how = Exiting(kv="exact", wait=8, thresholds=(-1.0,))
  model = METHOD.build(tiny.model_config(num_layers=2), METHOD.Config(exits=(1,), exit=how))
  decoder = METHOD.decoder(model, tiny.random_params(model), METHOD.submodels(model)[1])
  cache, step, tokens, worked = decoder.empty_cache(1, 8), jax.jit(decoder.step), np.arange(8)[None], []
  for begin, end in [*zip(range(6), range(1, 7)), (6, 8)]:
    _, cache, found = step(decoder.params, tokens[:, begin:end], np.array([end - begin]), cache)
    worked.append(float(found["layer_tokens"][0]))
  assert worked == [1] * 6 + [6 + 2 * 2]


def test_an_idle_row_waits_and_goes_on_where_it_was():
  _, _, batch, want, decoder = case(4)
  cache, done = decoder.empty_cache(3, LENGTH), np.zeros(3, int)
  tokens = np.asarray(batch["inputs"])
  for counts in [(3, 1, 2), *[(1, 0, 1), (1, 1, 0), (0, 1, 1)] * 5]:
    piece = np.zeros((3, max(counts)), np.int32)
    for row, count in enumerate(counts):
      piece[row, :count] = tokens[row, done[row] : done[row] + count]
    logits, cache, _ = decoder.step(decoder.params, piece, np.array(counts, np.int32), cache)
    done += counts
    for row, count in enumerate(counts):
      if count:
        np.testing.assert_allclose(logits[row], want.logits[row, done[row] - 1], rtol=1e-5, atol=1e-5)

"""Lazy resume: the exits of a model with all its keys, for no more layers than that model runs."""

import functools

import jax
import numpy as np
import pytest
import tiny

from adaptive import executors
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


def test_the_forward_pass_counts_what_decoding_does_in_the_end():
  _, _, batch, want, decoder = case(32, rows=1)
  counted = float(want.aux["layer_tokens"][0])
  assert float(want.aux["layers"][0]) <= counted <= CONFIG.num_layers * LENGTH
  depths = [m["layers"] for m in decoded(decoder, batch, start=1)[1]]
  assert counted == sum(np.maximum.accumulate(depths[::-1]))


def test_to_recompute_takes_all_along_that_left_since_one_went_all_the_way():
  _, _, batch, want, decoder = case(32, rows=1, kv="recompute")
  lazy = case(32, rows=1)[-1]
  _, metrics = decoded(decoder, batch, start=1)
  waiting, total = 0, 0.0
  for found in metrics:
    depth = found["layers"]
    assert found["layer_tokens"] == depth * (waiting + 1)
    waiting = 0 if depth == CONFIG.num_layers else waiting + 1
    total += found["layer_tokens"]
  assert total == float(want.aux["layer_tokens"][0])
  assert total > sum(found["layer_tokens"] for found in decoded(lazy, batch, start=1)[1])


def test_recomputed_layers_of_documents_are_counted_apart():
  model, params, *_ = case(32, kv="recompute")
  batch = tiny.packed_batch(CONFIG, rows=3, length=LENGTH)
  _, depths = exits_of(model, params, batch)
  segments, total = np.asarray(batch["segment_ids"]), 0
  for row, document in np.ndindex(3, 2):
    waiting = 0
    for depth in depths[row][segments[row] == document + 1]:
      total += depth * (waiting + 1)
      waiting = 0 if depth == CONFIG.num_layers else waiting + 1
  aux = METHOD.forward(model, params, batch, len(model.method.exits)).aux
  assert float(aux["layer_tokens"][0]) == total


def test_documents_of_a_row_are_counted_apart():
  model, params, *_ = case(32)
  batch = tiny.packed_batch(CONFIG, rows=3, length=LENGTH)
  aux = METHOD.forward(model, params, batch, len(model.method.exits)).aux
  ran = [np.asarray(aux[f"ran/{depth}"][0]) for depth in model.exits.depths]
  segments, total = np.asarray(batch["segment_ids"]), 0.0
  exits = model.exits
  _, kept = exits_of(model, params, batch)
  for row in range(3):
    for document in (1, 2):
      depth = kept[row][segments[row] == document]
      total += np.maximum.accumulate(depth[::-1]).sum()
  assert float(aux["layer_tokens"][0]) == total
  assert sum(r * (b - a) for r, (a, b) in zip(ran, exits.segments)) == kept[segments > 0].sum()


def exits_of(model, params, batch):
  """Logits, and the depth at which each token left, from the probabilities at every exit."""
  hidden = executors.exits(CONFIG, params, batch, model.exits.depths)
  threshold, depths = model.method.exit.thresholds[0], np.array(model.exits.depths)
  logits = np.stack([model.exits.head(params, i, x) for i, x in enumerate(hidden)])
  sure = np.asarray(jax.nn.softmax(logits, axis=-1)).max(-1) > threshold
  sure[-1] = True
  return logits, depths[np.argmax(sure, axis=0)]


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

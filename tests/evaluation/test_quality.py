"""Quality of sub-models against a slow loop over tokens in NumPy, float64."""

import math

import jax
import numpy as np
import pytest
import tiny_run

from adaptive.data import validation_batches
from adaptive.evaluation import quality
from adaptive.evaluation.quality import Quality

ROWS = 5  # less than a batch: three rows of padding


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  # A seed's untrained parameters, but larger, so that sub-models disagree.
  return tiny_run.assemble(tiny_run.corpus(tmp_path_factory.mktemp("data") / "corpus"), **{"model.init_std": 0.5})


@pytest.fixture(scope="module")
def params(run):
  return jax.device_get(tiny_run.state.create(run.model, run.optimizer, run.mesh, 3).params)


def batches_of(run, rows=ROWS, batch_size=8):
  return list(validation_batches(run.dataset.validation, rows, batch_size, run.mesh))


def measure(run, params, rows=ROWS, batch_size=8, **options):
  indices = range(len(run.method.submodels(run.model)))
  return quality.measure(run.method, run.model, params, batches_of(run, rows, batch_size), run.mesh, indices, **options)


def log_softmax(x):
  x = x - x.max()
  return x - math.log(np.exp(x).sum())


def reference(run, params, rows, counted="segment_ids"):
  """Per sub-model and row: (loss, correct, agreeing, tokens), [n, r, 4], from the statically cut-out sub-models.

  Of the tokens where the field `counted` is not 0.
  """
  indices = range(len(run.method.submodels(run.model)))
  found = np.zeros((len(indices), len(rows), 4))
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  forward = jax.jit(lambda params, batch, i: run.method.forward(run.model, params, batch, i).logits, static_argnums=2)
  outputs = [np.asarray(forward(params, batch, i), np.float64) for i in indices]
  for r, row in enumerate(rows):
    logits = [output[r] for output in outputs]
    for t, target in enumerate(row["targets"]):
      if row[counted][t] == 0:
        continue
      for i in indices:
        top = int(np.argmax(logits[i][t]))
        found[i, r] += (
          -log_softmax(logits[i][t])[target], top == target, top == int(np.argmax(logits[-1][t])), 1,
        )  # fmt: skip
  return found


def test_equals_a_loop_over_tokens(run, params):
  measured = measure(run, params)
  rows = [
    {name: np.asarray(values)[i] for name, values in batch.items()}
    for batch in batches_of(run)
    for i in range(8)
    if np.asarray(batch["segment_ids"])[i].any()
  ]
  assert len(rows) == ROWS, "padding counts as rows"
  expected = reference(run, params, rows)
  np.testing.assert_allclose(measured.losses, expected[..., 0], rtol=1e-5)
  np.testing.assert_array_equal(measured.correct, expected[..., 1])
  np.testing.assert_array_equal(measured.agreeing, expected[..., 2])
  np.testing.assert_array_equal(measured.tokens, expected[0, :, 3])
  tokens = measured.tokens.sum()
  for i in range(len(expected)):
    assert measured.loss(i) == pytest.approx(expected[i, :, 0].sum() / tokens, rel=1e-5)
    assert measured.accuracy(i) == expected[i, :, 1].sum() / tokens
    assert measured.agreement(i) == expected[i, :, 2].sum() / tokens
  assert measured.agreement(-1) == 1
  assert 0 < measured.agreement(0) < 1
  targets = np.concatenate([row["targets"][row["segment_ids"] > 0] for row in rows])
  assert measured.commonest == np.unique(targets, return_counts=True)[1].max() / len(targets)


def test_only_what_is_scored_is_measured(run, params):
  """The second half of each row scored: sums over it, of which the commonest token is the commonest."""

  def half(batch):
    late = np.arange(32, dtype=np.int32)[None] >= 16
    scored = np.where(late, np.asarray(batch["segment_ids"]) > 0, 0)
    return {**batch, "scored": jax.device_put(scored.astype(np.int32), batch["inputs"].sharding)}

  batches = [half(batch) for batch in batches_of(run)]
  indices = range(len(run.method.submodels(run.model)))
  measured = quality.measure(run.method, run.model, params, batches, run.mesh, indices)
  rows = [{name: np.asarray(values)[i] for name, values in batches[0].items()} for i in range(ROWS)]
  expected = reference(run, params, rows, "scored")
  np.testing.assert_allclose(measured.losses, expected[..., 0], rtol=1e-5)
  np.testing.assert_array_equal(measured.correct, expected[..., 1])
  np.testing.assert_array_equal(measured.agreeing, expected[..., 2])
  np.testing.assert_array_equal(measured.tokens, expected[0, :, 3])
  targets = np.concatenate([row["targets"][row["scored"] > 0] for row in rows])
  assert measured.commonest == np.unique(targets, return_counts=True)[1].max() / len(targets)


def test_paired_error_by_hand():
  """Rows of 1, 2 and 3 tokens whose losses differ by 1, 0 and 2: ratio 3 / 6 = 0.5, residuals 0.5, -1, 0.5."""
  losses = np.array([[2.0, 3.0, 7.0], [1.0, 3.0, 5.0]])
  measured = Quality(losses, losses * 0, losses * 0, np.array([1.0, 2.0, 3.0]), 0.1)
  assert measured.paired_error(0, 1) == pytest.approx(math.sqrt(3 / 2 * (0.25 + 1 + 0.25)) / 6)
  assert measured.paired_error(1, 1) == 0
  single = Quality(losses[:, :1], losses[:, :1], losses[:, :1], np.array([1.0]), 0.1)
  assert math.isnan(single.paired_error(0, 1))


def test_paired_error_is_the_spread_of_the_difference():
  """Many samples of rows drawn from one population: their losses' differences spread as the formula says."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 30, (2000, 40)).astype(float)
  losses = np.stack([tokens * rng.normal(mean, spread, tokens.shape) for mean, spread in ((2, 0.3), (1.5, 0.4))])
  samples = [Quality(losses[:, i], losses[:, i], losses[:, i], tokens[i], 0.1) for i in range(len(tokens))]
  errors = [sample.paired_error(0, 1) for sample in samples]
  assert np.mean(errors) == pytest.approx(np.std([sample.loss(0) - sample.loss(1) for sample in samples]), rel=0.05)


def test_batches_and_their_padding_do_not_matter(run, params):
  one, other = measure(run, params, 5, 8), measure(run, params, 5, 16)
  np.testing.assert_allclose(one.losses, other.losses, rtol=1e-6)
  np.testing.assert_array_equal(one.correct, other.correct)
  np.testing.assert_array_equal(one.tokens, other.tokens)
  assert one.commonest == other.commonest
  everything = measure(run, params, 10_000, 8)
  assert everything.tokens.sum() == run.dataset.validation.num_predictions
  assert everything.tokens.shape == (len(run.dataset.validation),)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2)])
def test_the_mesh_does_not_matter(run, params, mesh):
  fields = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh))
  there = tiny_run.assemble(run.experiment.data.path, **{"model.init_std": 0.5}, **fields)
  placed = jax.device_put(params, tiny_run.state.shardings(there.model, there.optimizer, there.mesh).params)
  one, other = measure(run, params), measure(there, placed)
  np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
  np.testing.assert_array_equal(other.tokens, one.tokens)
  np.testing.assert_array_equal(other.correct, one.correct)
  np.testing.assert_array_equal(other.agreeing, one.agreeing)


def test_one_program_for_all_sub_models_and_later_calls(run, params):
  scorer, done = quality.make_scorer(run.method, run.model, run.mesh), []
  first = measure(run, params, 20, scorer=scorer, report=done.append)
  again = measure(run, params, 20, scorer=scorer)
  assert scorer._cache_size() == 1
  assert done == [1, 2, 3, 4]
  np.testing.assert_array_equal(first.losses, again.losses)

"""A sweep of an untrained tiny family: every field of the result, checked against the parts that it is made of."""

import dataclasses
import math

import numpy as np
import pytest
import tiny_run

from adaptive.data import validation_batches
from adaptive.evaluation import quality
from adaptive.evaluation.sweep import sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return tiny_run.assemble(tiny_run.corpus(tmp_path_factory.mktemp("data") / "corpus"), **{"model.init_std": 0.5})


@pytest.fixture(scope="module")
def params(run):
  return tiny_run.state.create(run.model, run.optimizer, run.mesh, 3).params


def swept(run, params, **settings):
  evaluation = dataclasses.replace(run.experiment.evaluation, **settings)
  experiment = dataclasses.replace(run.experiment, evaluation=evaluation)
  return sweep(run.method, run.model, params, experiment, run.dataset, run.mesh, "tiny", {"method": "sorted_net"})


@pytest.fixture(scope="module")
def family(run, params):
  return swept(run, params)


def test_one_result_per_sub_model(run, family):
  submodels = run.method.submodels(run.model)
  assert [r.name for r in family.results] == [s.name for s in submodels]
  assert [r.dial for r in family.results] == [dict(s.dial) for s in submodels]
  assert family.label == "tiny"
  assert family.full == "depth=2,d_ff=32"


def test_quality_fields(run, params, family):
  batches = list(validation_batches(run.dataset.validation, 5, 8, run.mesh))
  measured = quality.measure(run.method, run.model, params, batches, run.mesh, range(4))
  for i, result in enumerate(family.results):
    assert result.loss == pytest.approx(measured.loss(i), rel=1e-6)
    assert result.accuracy == measured.accuracy(i)
    assert result.agreement == measured.agreement(i)
    assert result.loss_stderr == pytest.approx(measured.paired_error(i, 3), rel=1e-4)
    per_prediction = run.dataset.validation.num_bytes / run.dataset.validation.num_predictions
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / per_prediction)
  full = family.results[-1]
  assert (full.agreement, full.loss_stderr) == (1, 0)
  assert all(r.loss_stderr > 0 and r.agreement < 1 for r in family.results[:-1])
  assert family.quality_reference == measured.commonest


def test_costs_are_those_of_the_extracted_models(run, params, family):
  for result, submodel in zip(family.results, run.method.submodels(run.model)):
    _, small = run.method.extract(run.model, params, submodel)
    sizes = [leaf.size for leaf in tiny_run.jax.tree.leaves(small)]
    assert result.params_total == sum(sizes)
    assert result.params_non_embedding == sum(sizes) - 264 * 16
    assert 2 * result.params_non_embedding < result.flops_per_token < 6 * result.params_active
  assert np.all(np.diff(family.column("flops_per_token")) > 0)


def test_latency_fields_and_notes(run, params, family):
  for result in family.results:
    assert 0 < result.prefill_ms <= result.prefill_ms_p90
    assert 0 < result.step_ms <= result.step_ms_p90
  assert "prompts of 8 tokens" in family.notes["latency"]
  assert family.notes["method"] == "sorted_net"
  assert run.dataset.fingerprint in family.notes["data"]
  assert family.notes["held out"].startswith("5 rows, ")
  without = swept(run, params, latency=False)
  assert all(r.prefill_ms is None and r.step_ms_p90 is None for r in without.results)
  assert "latency" not in without.notes
  assert [r.loss for r in without.results] == [r.loss for r in family.results]

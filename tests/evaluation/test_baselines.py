"""Baselines: the hull of fixed plans by hand, smaller dense models, and the cheapest that keeps enough."""

import made_up
import numpy as np
import pytest

from adaptive.evaluation import baselines, report
from adaptive.evaluation.results import Family

PLANS = [("a", 10.0, 4.0), ("b", 20.0, 3.9), ("c", 30.0, 3.0), ("full", 50.0, 2.8)]
DECIDING = made_up.result("sure", {"threshold": 0.5}, 3.05, 25.0, accuracy=0.499, random_loss=3.7)
FAMILY = Family(
  "exits",
  (
    DECIDING,
    *(made_up.result(name, {}, loss, flops, accuracy=0.5 - 0.1 * (loss > 2.8)) for name, flops, loss in PLANS),
  ),
  "full",
)


def test_fixed_plans_mix_along_their_lower_hull():
  """b lies above the line from a to c, so half of each of these is better than b and a part of c."""
  found = baselines.fixed(FAMILY)
  assert found[0] == pytest.approx(4.0 + (25 - 10) / (30 - 10) * (3.0 - 4.0))
  assert np.isnan(found[1:]).all()  # fixed plans are no rivals of themselves


def dense_at(flops, *runs):
  """Loss at some FLOPs of dense runs, each a pair of FLOPs and loss."""
  families = [Family(f"d{i}", (made_up.result("full", {}, loss, cost),), "full") for i, (cost, loss) in enumerate(runs)]
  return baselines.dense(families, flops)


@pytest.mark.parametrize("flops", [20.0, 25.0])
def test_of_runs_of_equal_cost_the_better_one_counts_even_if_none_is_larger(flops):
  assert dense_at(flops, (10, 4.0), (20, 2.0), (20, 3.0)) == 2.0


def test_a_larger_run_that_is_worse_makes_nothing_worse():
  assert dense_at(19.0, (10, 3.0), (20, 3.5)) == 3.0
  assert dense_at(15.0, (10, 3.0), (12, 3.5), (20, 2.0)) == pytest.approx(2.5)


def test_what_less_buys_more_buys_too():
  assert dense_at(21.0, (10, 3.0), (20, 2.5)) == 2.5
  dear = made_up.replaced(FAMILY, 0, flops_per_token=60.0)
  assert baselines.fixed(dear)[0] == 2.8


def test_nothing_is_said_of_costs_below_the_plans():
  cheap = made_up.replaced(FAMILY, 0, flops_per_token=5.0)
  assert np.isnan(baselines.fixed(cheap)[0])


def test_of_plans_of_equal_cost_the_better_one_counts():
  twice = Family("twice", (*FAMILY.results, made_up.result("worse", {"depth": 9}, 3.5, 30.0)), "full")
  np.testing.assert_allclose(baselines.fixed(twice)[0], baselines.fixed(FAMILY)[0])


def test_dense_runs_are_a_baseline_for_all():
  dense = [Family(f"d{i}", (made_up.result("full", {}, loss, flops),), "full") for i, (flops, loss) in
           enumerate([(10.0, 3.8), (30.0, 2.9)])]  # fmt: skip
  assert baselines.dense([FAMILY, *dense], 20.0) == pytest.approx(3.35)
  assert np.isnan(baselines.dense([FAMILY], 20.0))


def test_the_cheapest_that_keeps_enough():
  assert baselines.cheapest(FAMILY, 0.99).name == "sure"
  assert baselines.cheapest(FAMILY, 0.999).name == "full"
  assert baselines.cheapest(FAMILY, 0.5).name == "a"


def test_the_tables_have_the_baselines_of_what_decides_only():
  text = report.table(FAMILY)
  (line,) = [line for line in text.splitlines() if "sure" in line and "3.0500" in line]
  assert line.split()[-2:] == ["3.2500", "3.7000"]
  assert "random" not in report.table(made_up.grid())
  kept = report.kept([FAMILY, made_up.DENSE])
  assert len(kept) == 4  # one run of several sub-models
  assert kept[-1].split()[:4] == ["exits", "sure", "99.80%", "0.50"]

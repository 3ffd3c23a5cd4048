"""The tree: it branches, a plan is one node, walks go where the formula says, and the best plan is found."""

import itertools
import math

import numpy as np
import pytest
from recorded import watched, without_structure

from adaptive.search import visits as plans
from adaptive.search.mcts import DR_LLM, Node, Rule, Tree, mcts, score
from adaptive.search.memory import Memory, run
from adaptive.search.planted import plant
from adaptive.search.strategies import exhaustive
from adaptive.search.visits import Limits


def rng(*seed):
  return np.random.default_rng(seed)


def grown(layers, budget, reward, seed=0, rule=DR_LLM, until=math.inf):
  """A tree and what it learned from."""
  memory, trees = Memory(layers, budget), []

  def search():
    yield from memory.begin()
    trees.append(Tree(memory, rng(seed), Limits(), rule))
    yield from trees[0].grow(until)
    return memory.best()

  run(search(), lambda wanted: [reward(visits) for visits in wanted])
  return trees[0], memory


def shape(node, depth=3):
  below = [shape(child, depth - 1) for child in node.children] if depth else []
  return node.visits, node.walks, node.total, below


def optimum(layers, reward):
  return min((-reward(visits), plans.length(visits)) for visits in plans.every(layers))


def finds_the_optimum(budget, seed, critical):
  task = plant(6, critical, seed % 2, rng(seed, critical))
  best, found = run(exhaustive(6, 648, rng()), task.rewards), run(mcts(6, budget, rng(seed)), task.rewards)
  assert (-best.reward, plans.length(best.visits)) == optimum(6, task.reward)
  assert found.evaluations == budget
  return (found.reward, plans.length(found.visits)) == (best.reward, plans.length(best.visits))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("critical", [2, 3, 4])
def test_finds_the_planted_optimum_among_648_plans(seed, critical):
  assert finds_the_optimum(500, seed, critical)


def test_mostly_finds_it_with_far_fewer_evaluations():
  assert sum(finds_the_optimum(200, seed, critical) for seed in range(8) for critical in (2, 3, 4)) >= 16


@pytest.mark.parametrize("rule", [DR_LLM, Rule(widening=0.5), Rule(chance=0.0)])
def test_a_budget_for_all_plans_sees_all_plans_and_ends(rule):
  found, asked = watched(mcts(5, 10_000, rng(1), rule=rule), without_structure)
  assert sorted(itertools.chain(*asked)) == sorted(plans.every(5))
  assert (-found.reward, plans.length(found.visits)) == optimum(5, without_structure)


def test_the_root_branches_and_so_do_others():
  tree, _ = grown(28, 200, without_structure)
  assert len(tree.root.children) > 20
  assert sum(len(node.children) > 1 for node in tree.nodes.values()) > 10
  narrow, _ = grown(28, 200, without_structure, rule=Rule(widening=1.0))
  assert 1 < len(narrow.root.children) < len(tree.root.children)


@pytest.mark.parametrize("widening", [1.0, 4.0])
def test_no_node_has_more_children_than_its_walks_warrant(widening):
  tree, _ = grown(28, 200, without_structure, rule=Rule(widening=widening))
  for node in tree.nodes.values():
    assert len(node.children) <= math.ceil(widening * math.sqrt(node.walks))


def test_the_same_seed_grows_the_same_tree():
  assert shape(grown(12, 100, without_structure, 5)[0].root) == shape(grown(12, 100, without_structure, 5)[0].root)
  assert shape(grown(12, 100, without_structure, 5)[0].root) != shape(grown(12, 100, without_structure, 6)[0].root)


def test_a_plan_is_one_node_and_costs_one_evaluation():
  tree, memory = grown(5, 150, without_structure)
  assert set(tree.nodes) == set(memory.rewards)
  parents = [child.visits for node in tree.nodes.values() for child in node.children]
  assert len(parents) > len(set(parents)) + 20  # many were reached along several ways
  for node in tree.nodes.values():
    assert all(tree.nodes[child.visits] is child for child in node.children)
    assert {child.visits for child in node.children} | set(node.untried) == set(plans.edits(node.visits))


def test_rewards_go_back_along_the_walk():
  tree, memory = grown(10, 120, without_structure)
  assert tree.root.walks == len(memory.rewards) == 120
  assert tree.root.total == pytest.approx(sum(memory.rewards.values()))
  # Every walk but those that ended here went on to a child.
  for node in tree.nodes.values():
    assert 1 <= node.walks <= 1 + sum(child.walks for child in node.children)
  assert any(node.walks > 1 for node in tree.nodes.values() if node is not tree.root)


def test_the_score_by_hand():
  parent, child = Node((1, 1, 1, 1), [], walks=9), Node((1, 2, 0, 0), [], walks=4, total=3.0)
  assert score(DR_LLM, parent, child) == pytest.approx(0.75 + 1.8 * math.sqrt(math.log(9) / 4) - 3.0 * 3 / 4)
  assert score(Rule(0.5, 1.0), parent, child) == pytest.approx(0.75 + 0.5 * math.sqrt(math.log(9) / 4) - 0.75)


def test_walks_go_where_rewards_are_and_where_plans_are_short():
  wanted = lambda visits: float(visits[4] == 2)
  tree, _ = grown(8, 150, wanted, rule=Rule(length_penalty=0.0, chance=0.0, widening=100.0))
  walks = {child.visits: child.walks for child in tree.root.children}
  assert max(walks, key=walks.get) == (1, 1, 1, 1, 2, 1, 1, 1)
  tree, _ = grown(8, 150, lambda visits: 0.0, rule=Rule(length_penalty=30.0, chance=0.0, widening=100.0))
  walks = {child.visits: child.walks for child in tree.root.children}
  assert plans.length(max(walks, key=walks.get)) == 6


def test_chance_alone_spreads_the_walks():
  wanted = lambda visits: float(visits[4] == 2)

  def most(chance):
    tree, _ = grown(12, 300, wanted, rule=Rule(chance=chance, length_penalty=0.0, widening=2.0))
    return max(child.walks for child in tree.root.children)

  assert most(1.0) + 5 < most(0.0)


@pytest.mark.parametrize("seed", range(5))
def test_until_ends_at_the_first_plan_that_reaches_the_goal(seed):
  task = plant(12, 6, 1, rng(seed))
  found, asked = watched(mcts(12, 500, rng(seed), until=True), task.reward)
  seen = list(itertools.chain(*asked))
  assert [task.reward(visits) for visits in seen] == [0.0] * (len(seen) - 1) + [1.0]
  assert found.visits == seen[-1]
  assert run(mcts(12, 500, rng(seed)), task.rewards).evaluations == 500


def test_until_asks_for_nothing_where_the_model_is_right():
  assert run(mcts(12, 500, rng(0), until=True, goal=0.5), lambda wanted: [0.5] * len(wanted)).evaluations == 1

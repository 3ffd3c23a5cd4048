"""Monte-Carlo tree search over plans, after Dr.LLM (Heakl et al., arXiv 2510.12773, Algorithm 1).

Departures, all towards a tree that branches. Algorithm 1, read literally, goes down to a leaf before it adds a child,
which makes a chain; here a node with untried actions gets another child before anybody goes through it. Since a root
has about 3 L actions, it does so only as far as its walks warrant (`_room`: progressive widening, Coulom 2007).
Nodes are plans, so that a plan reached along two ways is one node (Childs et al., 2008) and is evaluated once. Every
walk ends at a plan that is new: nodes below which nothing is left are closed, and no walk goes there.
"""

import dataclasses
import math

import numpy as np

from adaptive.search import visits as plans
from adaptive.search.memory import Asking, Memory, Search
from adaptive.search.visits import PUBLISHED, Limits, Visits


@dataclasses.dataclass(frozen=True)
class Rule:
  """How the next node of a walk is chosen, and how many there are to choose from.

  Attributes:
    exploration: c. length_penalty: lambda, for each model's worth of layers. chance: probability of a random child.
    widening: children that a node may have after one walk; after n walks, the root of n times as many. Not from the
      paper: of 1, 2, 4, 8 and no limit, the smallest that solves as many planted questions as no limit does, where one
      repeat solves them (`benchmarks/layer_search.py`).
  """

  exploration: float = 1.8
  length_penalty: float = 3.0
  chance: float = 0.1
  widening: float = 8.0


DR_LLM = Rule()


@dataclasses.dataclass
class Node:
  """A plan.

  Attributes:
    untried: plans one action away that are no children yet, the next one last.
    walks: that ended here or went through. total: of their rewards.
    closed: everything that can be reached from here was evaluated.
  """

  visits: Visits
  untried: list[Visits]
  children: list["Node"] = dataclasses.field(default_factory=list)
  walks: int = 0
  total: float = 0.0
  closed: bool = False


def score(rule: Rule, parent: Node, child: Node) -> float:
  """How much a walk wants to go from a node to its child: Q / v + c sqrt(ln V / v) - lambda |path| / L.

  V are the parent's walks; in the released code, those of the whole search.
  """
  explored = math.sqrt(math.log(parent.walks) / child.walks)
  share = plans.length(child.visits) / len(child.visits)
  return child.total / child.walks + rule.exploration * explored - rule.length_penalty * share


class Tree:
  """The plans that a search has come to; its root is the model as it is.

  Args:
    memory: of the search, to which the root is known.
  """

  def __init__(self, memory: Memory, rng: np.random.Generator, limits: Limits = PUBLISHED, rule: Rule = DR_LLM):
    self._memory, self._rng, self._limits, self._rule = memory, rng, limits, rule
    self.nodes: dict[Visits, Node] = {}
    self.root = self._node(memory.default)
    self._learn([self.root])

  def grow(self, until: float = math.inf) -> Asking:
    """Adds a node a walk, until the budget is spent, no plan is new, or a reward reaches `until`."""
    best = self._memory.rewards[self.root.visits]
    while best < until and self._memory.left and (walk := self._walk()):
      yield from self._memory.ask([walk[-1].visits])
      best = max(best, self._learn(walk))

  def _walk(self) -> list[Node]:
    """From the root to a new node; empty where there is none. Nodes with nothing new below are closed on the way."""
    walk = [self.root]
    while walk:
      node = walk[-1]
      within = [child for child in node.children if not child.closed]
      if node.untried and (not within or len(node.children) < self._room(node)):
        visits = node.untried.pop()
        known = self.nodes.get(visits)
        node.children.append(known or self._node(visits))
        if known is None:
          return [*walk, node.children[-1]]
      elif within:
        walk.append(self._select(node, within))
      else:
        node.closed = True
        walk.pop()
    return walk

  def _room(self, node: Node) -> int:
    """Children that a node may have before a walk goes through it."""
    return math.ceil(self._rule.widening * math.sqrt(node.walks))

  def _select(self, node: Node, children: list[Node]) -> Node:
    if self._rng.random() < self._rule.chance:
      return children[self._rng.integers(len(children))]
    return max(children, key=lambda child: score(self._rule, node, child))

  def _node(self, visits: Visits) -> Node:
    near = plans.edits(visits, self._limits)
    node = Node(visits, [near[i] for i in self._rng.permutation(len(near))])
    self.nodes[visits] = node
    return node

  def _learn(self, walk: list[Node]) -> float:
    """Tells all nodes of a walk the reward at its end, which it returns."""
    reward = self._memory.rewards[walk[-1].visits]
    for node in walk:
      node.walks, node.total = node.walks + 1, node.total + reward
    return reward


def mcts(
  num_layers: int,
  budget: int,
  rng: np.random.Generator,
  limits: Limits = PUBLISHED,
  goal: float = 1.0,
  until: bool = False,
  rule: Rule = DR_LLM,
) -> Search:
  """The tree search.

  Args:
    until: whether to end at the first plan whose reward is `goal` or more, rather than with the budget.
  """
  memory = Memory(num_layers, budget)
  yield from memory.begin()
  yield from Tree(memory, rng, limits, rule).grow(goal if until else math.inf)
  return memory.best(goal)

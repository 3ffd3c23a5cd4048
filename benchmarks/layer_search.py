"""How many layers does each strategy of searching for layer paths save, and how many wrong answers does it right?

  python benchmarks/layer_search.py

Planted questions (`adaptive.search.planted`) of a model of 28 layers, 40 of each kind; no model is run, it takes about
half a minute. Of questions that the model answers as it is: mean layers saved. Of those that it does not: how many of
the 40 are solved and, in brackets, how many layers more than 28 the plans of the solved ones run, on average.
`exhaustive` needs a smaller model.
"""

import time

import numpy as np
from absl import app, flags

from adaptive.search.memory import Found, run
from adaptive.search.planted import plant
from adaptive.search.strategies import STRATEGIES

_SEEDS = flags.DEFINE_integer("seeds", 40, "Questions of each kind.")
_LAYERS = flags.DEFINE_integer("layers", 28, "Of the model.")
_BUDGETS = flags.DEFINE_list("budgets", ["50", "200"], "Evaluations for each question.")
_TASKS = {  # layers that must run, layers that must run twice
  "right, 18 critical: saved": (18, 0),
  "right, 24 critical: saved": (24, 0),
  "wrong, 18 critical, one repeat: solved": (18, 1),
  "wrong, 18 critical, two repeats: solved": (18, 2),
}


def _found(strategy: str, budget: int, critical: int, repeated: int) -> list[Found]:
  """Of all questions of a kind, which are the same for all strategies."""
  found = []
  for seed in range(_SEEDS.value):
    task = plant(_LAYERS.value, critical, repeated, np.random.default_rng((seed, 0)))
    search = STRATEGIES[strategy](_LAYERS.value, budget, np.random.default_rng((seed, 1)))
    found.append(run(search, task.rewards))
  return found


def _shown(found: list[Found], repeated: int) -> str:
  saved = [_LAYERS.value - sum(one.visits) for one in found if one.reward == 1.0]
  if not saved:
    return "0"
  return f"{len(saved)} ({-np.mean(saved):+.2f})" if repeated else f"{np.mean(saved):.2f}"


def main(argv: list[str]) -> None:
  del argv
  strategies, start = [name for name in STRATEGIES if name != "exhaustive"], time.perf_counter()
  print(f"{'':40}{'budget':>7}" + "".join(f"{name:>18}" for name in strategies))
  for task, (critical, repeated) in _TASKS.items():
    for budget in map(int, _BUDGETS.value):
      shown = [_shown(_found(name, budget, critical, repeated), repeated) for name in strategies]
      print(f"{task:40}{budget:7}" + "".join(f"{cell:>18}" for cell in shown))
  print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  app.run(main)

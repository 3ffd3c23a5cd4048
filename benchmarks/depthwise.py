"""Tokens per second of a trained Mixture-of-Recursions: depth-wise batching beside batches that go step by step.

  python train.py --config=configs/mixture_of_recursions_demo.py --workdir=runs/mor
  python benchmarks/depthwise.py --workdir=runs/mor

Requests are pieces of held-out text; all continue them greedily by the same number of tokens, through the same number
of slots. Everything is counted: prompts, caches, embedding, head, sampling. Systems take turns, and ratios are to the
first of them in the same turn:

  every recursion   the same model, of which every token passes every recursion, in batches of so many requests
  as needed         the same batches; a recursion is left out when no row of the batch needs it
  depth-wise        every slot at its own recursion
"""

import argparse
import collections
import dataclasses
import statistics

import numpy as np

from adaptive.generation.depthwise import DepthwiseGenerator
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.training.run import load_params, load_run

_ALWAYS = 1e6  # added to its scores, lets every token pass a recursion


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="run of a Mixture-of-Recursions")
  parser.add_argument("--slots", default="8,16,32,64", help="requests under way at a time, several numbers")
  parser.add_argument("--waves", type=int, default=6, help="requests for each slot")
  parser.add_argument("--prompt", type=int, default=32, help="tokens")
  parser.add_argument("--new", type=int, default=64, help="tokens")
  parser.add_argument("--rounds", type=int, default=3, help="turns of each system that count")
  a = parser.parse_args()
  for number, slots in enumerate(map(int, a.slots.split(","))):
    compare(a, slots, header=number == 0)


def compare(a: argparse.Namespace, slots: int, header: bool) -> None:
  """Prints a line of the table for one number of slots."""
  run = load_run(a.workdir)
  _, params = load_params(run, a.workdir)
  model, vocab, greedy = run.model, run.experiment.model.vocab_size, Sampling(temperature=0.0)
  prompts = [[int(t) for t in run.dataset.validation[i]["inputs"][: a.prompt]] for i in range(a.waves * slots)]

  def in_batches(generator: Generator) -> tuple[float, list[list[int]], dict]:
    """Tokens per second, tokens, and what was measured: the share of the tokens that each recursion kept."""
    seconds, tokens, metrics = 0.0, [], collections.defaultdict(lambda: np.zeros(2))
    for start in range(0, len(prompts), slots):
      found = generator(prompts[start : start + slots], a.new, numbers=range(start, start + slots))
      seconds, tokens = seconds + found.prefill_seconds + found.seconds, tokens + found.tokens
      for name, pair in found.metrics.items():
        metrics[name] += np.array(pair, np.float64)
    return sum(map(len, tokens)) / seconds, tokens, metrics

  always = run.method.build(model.config, dataclasses.replace(model.method, score_shifts=(_ALWAYS,)))
  (everything,) = (s for s in run.method.submodels(always) if dict(s.dial).get("score_shift"))
  full = run.method.submodels(model)[-1]
  every = Generator(run.method.decoder(always, params, everything), vocab, greedy)
  needed = Generator(run.method.decoder(model, params, full), vocab, greedy)
  deep = DepthwiseGenerator(run.method.ticker(model, params, full), vocab, greedy, slots=slots)
  for generator in (every, needed, deep):
    generator(prompts[:slots], a.new)  # compiles
  if header:
    print("tokens/s, and how many times that of `every recursion`, medians of", a.rounds, "rounds")
    print(f"{'slots':>5} {'every recursion':>16} {'as needed':>15} {'depth-wise':>15}  busy  passes  same tokens")
  rates = []
  for _ in range(a.rounds):
    found = in_batches(every)[0], *in_batches(needed), deep(prompts, a.new)
    rates.append((found[0], found[1], found[4].tokens_per_second))
  passes = sum(total / count for total, count in found[3].values())
  times = [statistics.median(rate[i] / rate[0] for rate in rates) for i in range(3)]
  speeds = [statistics.median(column) for column in zip(*rates)]
  same = sum(x == y for x, y in zip(found[2], found[4].tokens))
  cells = " ".join(f"{speed:8,.0f} {ratio:5.2f}x" for speed, ratio in zip(speeds[1:], times[1:]))
  print(
    f"{slots:5} {speeds[0]:16,.0f} {cells}  {found[4].occupancy:4.0%}  {passes:6.2f}  {same} of {len(prompts)}",
    flush=True,
  )


if __name__ == "__main__":
  main()

"""Tokens per second of a trained Mixture-of-Recursions: depth-wise and plain batching, and a dense model beside them.

  python train.py --config=configs/mixture_of_recursions_demo.py --workdir=runs/mor
  python benchmarks/depthwise.py --workdir=runs/mor

Requests are pieces of held-out text; all continue them greedily by the same number of tokens, through the same number
of slots. Everything is counted: prompts, caches, embedding, head, sampling. The dense model has the unrolled depth and
fresh parameters, which are as fast as trained ones. Systems take turns.
"""

import argparse
import math
import statistics

import flax.linen as nn
import jax

from adaptive.backbone.transformer import Transformer, init_params
from adaptive.generation.depthwise import DepthwiseGenerator
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import METHODS
from adaptive.training.run import load_params, load_run


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--slots", type=int, default=32)
  parser.add_argument("--requests", type=int, default=96)
  parser.add_argument("--prompt", type=int, default=32, help="tokens")
  parser.add_argument("--new", type=int, default=64, help="tokens")
  parser.add_argument("--rounds", type=int, default=3)
  a = parser.parse_args()
  run = load_run(a.workdir)
  _, params = load_params(run, a.workdir)
  method, model, submodel = run.method, run.model, run.method.submodels(run.model)[-1]
  rows = [run.dataset.validation[i] for i in range(a.requests)]
  prompts = [[int(t) for t in row["inputs"][: a.prompt]] for row in rows]
  vocab, greedy = run.experiment.model.vocab_size, Sampling(temperature=0.0)

  dense_params = nn.unbox(init_params(Transformer(run.experiment.model), jax.random.key(0)))
  dense = METHODS["dense"].decoder(Transformer(run.experiment.model), dense_params, None)
  plain, baseline = (Generator(d, vocab, greedy) for d in (method.decoder(model, params, submodel), dense))

  def in_batches(generator: Generator) -> tuple[float, list, dict]:
    """Tokens per second, tokens and what was measured, in batches of as many requests as there are slots."""
    seconds, tokens, metrics = 0.0, [], {}
    for start in range(0, len(prompts), a.slots):
      found = generator(
        prompts[start : start + a.slots], a.new, numbers=range(start, min(start + a.slots, len(prompts)))
      )
      seconds += found.prefill_seconds + found.seconds
      tokens += found.tokens
      metrics = found.metrics
    return sum(map(len, tokens)) / seconds, tokens, metrics

  warm = in_batches(plain)[2]
  kept = {name: float(total / count) for name, (total, count) in warm.items()}
  finishing = min(a.slots, math.ceil(a.slots / sum(kept.values())))
  deep = DepthwiseGenerator(method.ticker(model, params, submodel), vocab, greedy, slots=a.slots, finishing=finishing)
  rates = {"dense": [], "plain": [], "depth-wise": []}
  for turn in range(a.rounds + 1):
    found = in_batches(baseline)[0], *in_batches(plain), deep(prompts, a.new)
    if turn == 0:
      same = sum(x == y for x, y in zip(found[2], found[4].tokens))
      print(f"same tokens in {same} of {len(prompts)} requests; " + ", ".join(f"{k} {v:.2f}" for k, v in kept.items()))
      print(f"slots in use {found[4].occupancy:.0%} of {found[4].ticks} ticks; {finishing} may begin a token in each")
      continue
    for name, rate in zip(rates, (found[0], found[1], found[4].tokens_per_second)):
      rates[name].append(rate)
  for name, values in rates.items():
    ratio = statistics.median(v / d for v, d in zip(values, rates["dense"]))
    print(f"{name:12s}{statistics.median(values):10.0f} tokens/s{ratio:8.2f} of dense")


if __name__ == "__main__":
  main()

"""Tokens per second of self-speculative decoding beside plain decoding of the same model, at equal output.

  python train.py --config=configs/dynamic_depth.py:early_exit --workdir=runs/early_exit
  python benchmarks/self_speculation.py --workdir=runs/early_exit

Prompts are pieces of held-out text; all are continued greedily by the same number of tokens; caches, embedding, head
and sampling are counted. `fixed` is LayerSkip's: one exit, one length, for all that are asked for; `chosen` is DEL's,
anew in every round, by the seconds that rounds took and with --by_layers by layers too, as in the paper. Systems take
turns prompt by prompt, in random order, and ratios are to plain decoding of the same prompt in the same turn: of the
whole, and after the prompt, which takes no less time with a draft. Beside the time: tokens of a round, share of drafted
tokens that were accepted, layers run one after the other for a token (`calls`), layers run for it in all (`work`), and
how many prompts were continued by the very same tokens in every turn. First, what limits all of it: how much longer a
pass takes that checks several tokens. Last, what is chosen beside the best fixed setting, found on other prompts.
"""

import argparse
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adaptive.cli import use_compilation_cache
from adaptive.config import ConfigError
from adaptive.depth.ladder import At, Ladder
from adaptive.generation.drafts import Chooser, Fixed
from adaptive.generation.loop import Generator, Result
from adaptive.generation.sampling import Sampling
from adaptive.generation.speculative import SpeculativeGenerator
from adaptive.methods.contract import SubModel
from adaptive.training.run import load_params, load_run


def can_draft(method, model, params, submodel: SubModel) -> bool:
  """Whether a sub-model can draft for the full one."""
  try:
    return method.ladder(model, params, [submodel]) is not None
  except ConfigError:
    return False


def added(results: list[Result]) -> dict[str, tuple]:
  """What was measured, of all prompts."""
  metrics = {}
  for name, (total, count) in (pair for result in results for pair in result.metrics.items()):
    before = metrics.get(name, (0.0, 0.0))
    metrics[name] = before[0] + total, before[1] + count
  return metrics


class Seconds(NamedTuple):
  """Of one group of prompts: with the prompts' own pass, and after it."""

  whole: float
  after: float


def speed_up(plain: list[list[Seconds]], system: list[list[Seconds]], part: str) -> float:
  """Of all prompts: of each, the median over turns of its share of the plain seconds a moment before."""
  share = lambda p, t: getattr(t, part) / getattr(p, part)
  shares = [statistics.median(itertools.starmap(share, zip(*turns))) for turns in zip(plain, system)]
  return 1 / statistics.mean(shares)


def passes(ladder: Ladder, slots: int, numbers: Sequence[int] = (1, 3, 5, 7)) -> list[float]:
  """Time of all layers on so many tokens of one row, as a multiple of that on one: what a check costs."""
  at = lambda number: At(jnp.array([slots // 2]), jnp.array([number]))

  def run(number, params, cache):
    x = ladder.embed(params, jnp.zeros((1, number), int))
    return ladder.climb(params, x, at(number), cache, 0, ladder.stages)

  steps = {number: jax.jit(functools.partial(run, number), donate_argnums=1) for number in numbers}
  caches, times = {number: ladder.empty_cache(1, slots) for number in numbers}, {number: [] for number in numbers}
  for _ in range(40):
    for number, step in steps.items():
      start = time.perf_counter()
      _, caches[number] = jax.block_until_ready(step(ladder.params, caches[number]))
      times[number].append(time.perf_counter() - start)
  median = {number: statistics.median(seconds[4:]) for number, seconds in times.items()}
  return [median[number] / median[numbers[0]] for number in numbers]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="run with sub-models that can draft")
  parser.add_argument("--drafts", default="", help="names of sub-models, separated by blanks; all that can by default")
  parser.add_argument("--tokens", default="3,5,8,12", help="drafted tokens of a round, several numbers")
  parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
  parser.add_argument("--new", type=int, default=128, help="tokens of a continuation")
  parser.add_argument("--turns", type=int, default=3, help="of each system, that count")
  parser.add_argument("--by_layers", action="store_true", help="DEL as in the paper too, which compiles many programs")
  a = parser.parse_args()
  use_compilation_cache(a.workdir)

  run = load_run(a.workdir)
  _, params = load_params(run, a.workdir)
  method, model, vocab, greedy = run.method, run.model, run.experiment.model.vocab_size, Sampling(temperature=0.0)
  prompts = [[int(t) for t in run.dataset.validation[i]["inputs"][: a.prompt]] for i in range(a.prompts)]
  every = method.ladder(model, params, None)
  if every is None:
    sys.exit(f"no sub-model of {a.workdir} can draft for the full one")
  ratios = ", ".join(f"{ratio:.2f}" for ratio in passes(every, a.prompt + a.new))
  print(f"a pass over 1, 3, 5 and 7 tokens, in passes over one: {ratios}", flush=True)
  able = {s.name: s for s in method.submodels(model)[:-1] if can_draft(method, model, params, s)}
  names = a.drafts.split() or list(able)
  systems = {"plain": Generator(method.decoder(model, params, method.submodels(model)[-1]), vocab, greedy)}
  rounds = {}
  for name in names:
    ladder = method.ladder(model, params, [able[name]])
    for tokens in map(int, a.tokens.split(",")):
      label = f"fixed {name} x {tokens}"
      systems[label] = SpeculativeGenerator(ladder, vocab, Fixed(0, tokens), greedy)
      rounds[label] = ladder.calls(0, tokens), ladder.layer_tokens(0, tokens)
  if not any(every.tails):
    for label in ["chosen by seconds", "chosen by layers"][: 1 + a.by_layers]:
      choice = Chooser(every.layers[:-1], every.layers[-1], measured=label.endswith("seconds"))
      systems[label] = SpeculativeGenerator(every, vocab, choice, greedy)

  groups = [prompts[start : start + a.batch] for start in range(0, len(prompts), a.batch)]
  times: dict[str, list[list[Seconds]]] = {name: [[] for _ in groups] for name in systems}
  found: dict[str, list[Result]] = {name: [None] * len(groups) for name in systems}
  others: dict[str, set[int]] = {name: set() for name in systems}  # prompts continued otherwise in any turn
  order = random.Random(0)  # what ran before may matter: caches, and what it left the device to do
  for turn in range(a.turns + 1):
    for i, group in enumerate(groups):
      for name in order.sample(list(systems), len(systems)):
        print(f"turn {turn} of {a.turns}, prompt {i}: {name:40}", end="\r", file=sys.stderr)
        result = found[name][i] = systems[name](group, a.new)
        if turn:  # the first compiles
          times[name][i].append(Seconds(result.prefill_seconds + result.seconds, result.seconds))
      for name in systems:
        pairs = zip(found[name][i].tokens, found["plain"][i].tokens)
        others[name] |= {i * a.batch + row for row, (mine, plain) in enumerate(pairs) if mine != plain}
  made = len(prompts) * a.new
  print(f"{len(prompts)} prompts, {a.batch} at a time, {a.new} tokens each; medians of {a.turns} turns")
  columns = f"{'tokens/s':>9} {'speed-up':>9} {'after the prompt':>17} {'a round':>8} {'accepted':>9}"
  print(f"{'':24} {columns} {'calls':>7} {'work':>7}  same tokens")
  for name in systems:
    metrics = added(found[name])
    mean = lambda key, metrics=metrics: metrics[key][0] / max(metrics[key][1], 1.0)
    seconds = sum(statistics.median(each.whole for each in turns) for turns in times[name])
    whole, after = (speed_up(times["plain"], times[name], part) for part in Seconds._fields)
    cells = f"{made / seconds:9.0f} {whole:8.2f}x {after:16.2f}x"
    if metrics:
      per_round = mean("tokens_per_round")
      layers = "".join(f" {number / per_round:7.1f}" for number in rounds[name]) if name in rounds else f"{'':16}"
      cells += f" {per_round:8.2f} {mean('accepted'):9.1%}{layers}"
    else:
      cells += f" {1:8} {'':9} {every.layers[-1]:7} {every.layers[-1]:7}"
    print(f"{name:24} {cells}  {len(prompts) - len(others[name])} of {len(prompts)}", flush=True)
  compare_with_swept(times, list(rounds))


def compare_with_swept(times: dict[str, list[list[Seconds]]], fixed: Sequence[str]) -> None:
  """What is chosen beside the fixed setting that was best on the first half of the prompts, on the second half.

  On the prompts of the sweep itself the best of many has luck on its side.
  """
  half = len(times["plain"]) // 2
  if half == 0 or not fixed:
    return
  speed = lambda name, part: speed_up(times["plain"][part], times[name][part], "whole")
  best = max(fixed, key=lambda name: speed(name, slice(half)))
  rest = slice(half, None)
  for name in times:
    if name.startswith("chosen"):
      share = speed(name, rest) / speed(best, rest)
      print(f"{best} was the best on the first half of the prompts; on the others {name} has {share:.2f} of its speed")


if __name__ == "__main__":
  main()

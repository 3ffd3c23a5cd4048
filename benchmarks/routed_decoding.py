"""What Dr.LLM's routers cost at the prompt, and what layers that they leave out save after it, beside the dense model.

  python benchmarks/routed_decoding.py --width=576 --d_ff=1536 --layers=30

Weights are random and routers are told what to say, so that a known number of layers is skipped. Both models take
turns. `prompt` is the time of the step that reads the prompt, with all layers executed, so that routers are all that is
added; `a token` that of a later step, with k layers left out, and `of k/L` the saved share of time over the skipped
share of layers.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.transformer import init_params
from adaptive.config import ModelConfig
from adaptive.methods import dense
from adaptive.methods.depth import dr_llm


def told(params, visits):
  """Routers that say so, whatever they read."""
  routers = params["routers"]
  bias = 9.0 * jax.nn.one_hot(jnp.asarray(visits), 3)
  return {**params, "routers": {**routers, "weight": jnp.zeros_like(routers["weight"]), "bias": bias}}


def seconds(run, repeats: int) -> float:
  began = time.perf_counter()
  for _ in range(repeats):
    jax.block_until_ready(run())
  return (time.perf_counter() - began) / repeats


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--width", type=int, default=576)
  parser.add_argument("--d_ff", type=int, default=1536)
  parser.add_argument("--layers", type=int, default=30)
  parser.add_argument("--heads", type=int, default=9)
  parser.add_argument("--kv_heads", type=int, default=3)
  parser.add_argument("--vocab", type=int, default=49152)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--skipped", default="5,10,15")
  parser.add_argument("--turns", type=int, default=15)
  parser.add_argument("--dtype", default="float32")
  a = parser.parse_args()
  config = ModelConfig(
    vocab_size=a.vocab, num_layers=a.layers, d_model=a.width, d_ff=a.d_ff, num_heads=a.heads, num_kv_heads=a.kv_heads,
    dtype=a.dtype,
  )  # fmt: skip
  model = dr_llm.build(config, dr_llm.Config(budgets=(-0.5,)))
  params = jax.tree.map(lambda x: x.value, init_params(model, jax.random.key(0)), is_leaf=lambda x: hasattr(x, "value"))
  tokens = np.random.default_rng(0).integers(0, a.vocab, (1, a.prompt)).astype(np.int32)
  counts, one = np.array([a.prompt], np.int32), np.ones(1, np.int32)
  plain = dense.decoder(dense.build(config, dense.Config()), dr_llm.backbone(params), None)
  plain_step = jax.jit(plain.step)
  start = plain.empty_cache(1, a.prompt + 16)
  routed_of = lambda visits: dr_llm.decoder(model, told(params, visits), dr_llm.submodels(model)[0])
  execute = routed_of((1,) * a.layers)
  routed_step = jax.jit(execute.step)
  empty = execute.empty_cache(1, a.prompt + 16)
  run_plain = lambda: plain_step(plain.params, tokens, counts, start)[0]
  run_routed = lambda: routed_step(execute.params, tokens, counts, empty)[0]
  print(f"{a.layers} layers of width {a.width}, {jax.devices()[0].device_kind}, {a.turns} turns, {a.prompt} tokens")
  share = in_turns(run_routed, run_plain, a.turns, 1)
  print(f"prompt, every layer executed: {share:.3f} of the dense model's time")
  cache = plain_step(plain.params, tokens, counts, start)[1]
  run_plain = lambda: plain_step(plain.params, tokens[:, :1], one, cache)[0]
  for number in (0, *map(int, a.skipped.split(","))):
    skipped = set(np.linspace(1, a.layers - 2, number).astype(int)) if number else set()
    decoder = routed_of([0 if layer in skipped else 1 for layer in range(a.layers)])
    after = routed_step(decoder.params, tokens, counts, empty)[1]
    run = lambda decoder=decoder, after=after: routed_step(decoder.params, tokens[:, :1], one, after)[0]
    share = in_turns(run, run_plain, a.turns, 10)
    saved = f"; saved {(1 - share) / (len(skipped) / a.layers):.2f} of k/L" if skipped else ""
    print(f"a token, {len(skipped):2} layers skipped: {share:.3f} of the dense model's time{saved}")


def in_turns(run, other, turns: int, repeats: int) -> float:
  """Median over turns of the time of one over that of the other, a moment before or after."""
  seconds(run, 2), seconds(other, 2)
  shares = []
  for turn in range(turns):
    pair = (run, other) if turn % 2 else (other, run)
    times = [seconds(each, repeats) for each in pair]
    shares.append(times[0] / times[1] if turn % 2 else times[1] / times[0])
  return statistics.median(shares)


if __name__ == "__main__":
  main()

"""Forward and backward pass of Mixture-of-Recursions against the dense model of its unrolled depth, in one run.

  python benchmarks/recursion_step.py

1 + 2 x 3 + 1 layers of width 256, 8 rows of 256 tokens, float32. Models take turns; a ratio is the median over rounds
of the ratio to the dense model of the same round. Beside it the ratio of counted FLOPs.
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import numpy as np

from adaptive.backbone.transformer import init_params
from adaptive.config import ModelConfig
from adaptive.methods import METHODS

MODEL = ModelConfig(vocab_size=1024, num_layers=8, d_model=256, d_ff=688, num_heads=4, num_kv_heads=4)
ROWS, LENGTH = 8, 256
MOR = "mixture_of_recursions"
VARIANTS = {
  "dense": ("dense", {}),
  "expert choice": (MOR, {}),
  "expert choice, all capacities 1": (MOR, dict(capacities=(1.0, 1.0, 1.0))),
  "expert choice, shared keys": (MOR, dict(kv_cache="shared")),
  "expert choice, hybrid keys": (MOR, dict(kv_cache="hybrid")),
  "token choice, bounded": (MOR, dict(routing="token_choice", capacities=(1.0, 2 / 3, 1 / 3))),
}


def made(name: str, settings: dict):
  """Compiled (params, batch) -> (loss, gradient), its parameters, and the counted FLOPs of an update per token."""
  method = METHODS[name]
  model = method.build(MODEL, method.Config(**settings))
  params, choice = nn.unbox(init_params(model, jax.random.key(0))), method.sample(model, 0, 0)
  loss = lambda params, batch: method.loss(model, params, batch, choice, jax.random.key(0), 0)[0]
  return jax.jit(jax.value_and_grad(loss)), params, method.update_flops(model, choice, LENGTH)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=15)
  rounds = parser.parse_args().rounds
  tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, ROWS, LENGTH), np.int32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
  batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": np.ones_like(positions), "positions": positions}
  variants = {label: made(*variant) for label, variant in VARIANTS.items()}
  seconds = {label: [] for label in variants}
  for turn in range(rounds + 2):
    for label, (step, params, _) in variants.items():
      began = time.perf_counter()
      jax.block_until_ready(step(params, batch))
      if turn > 1:
        seconds[label].append(time.perf_counter() - began)
  dense = variants["dense"][2]
  print(f"{'':34s}{'ms':>8s}{'ratio':>8s}{'FLOPs':>8s}")
  for label, (_, _, flops) in variants.items():
    ratio = statistics.median(a / b for a, b in zip(seconds[label], seconds["dense"]))
    print(f"{label:34s}{1000 * statistics.median(seconds[label]):8.0f}{ratio:8.3f}{flops / dense:8.3f}")


if __name__ == "__main__":
  main()

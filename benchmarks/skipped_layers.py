"""Time of one compiled program that skips layers as it is told, against running all of them.

  python benchmarks/skipped_layers.py

16 layers of width 512, batch 1, float32: a prompt of 128 tokens, then tokens one by one, on recorded decisions
(`adaptive.depth.replay`) that the compiler does not know. Under each key/value rule: all layers, every other layer, the
first half (an exit), and none. Shares are of all layers' time in the same run. What skipped layers leave behind is
counted in: under `project` their keys and values are projected.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import ModelConfig
from adaptive.depth import replay
from adaptive.evaluation import latency
from adaptive.methods.contract import Decoder

MODEL = ModelConfig(vocab_size=256, num_layers=16, d_model=512, d_ff=1376, num_heads=8, num_kv_heads=4)
PROMPT = 128
PLANS = {
  "all layers": np.ones(16, bool),
  "every other layer": np.arange(16) % 2 == 0,
  "the first half": np.arange(16) < 8,
  "none": np.zeros(16, bool),
}


def decoder(params, plan: np.ndarray, rule: str) -> Decoder:
  """Replays a plan for the tokens that are timed; one more slot says otherwise, so that no layer is known to idle."""
  slots = PROMPT + latency.RUN + 1
  visits = np.repeat(plan[:, None, None].astype(np.int32), slots, axis=2)
  visits[:, :, -1] = 1 - visits[:, :, -1]
  return Decoder(*replay.decoder(MODEL, params, jnp.asarray(visits), rule))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=20, help="turns of every plan, that count")
  repeats = parser.parse_args().repeats
  params = nn.unbox(init_params(Transformer(MODEL), jax.random.key(0)))
  rows = np.random.default_rng(0).integers(0, MODEL.vocab_size, (8, PROMPT + latency.RUN), np.int32)
  print(f"{'':30}{'prompt, ms':>12}{'share':>8}{'token, ms':>12}{'share':>8}")
  for rule in ("project", "copy", "hole"):
    times = latency.measure([decoder(params, plan, rule) for plan in PLANS.values()], rows, PROMPT, repeats)
    for name, time in zip(PLANS, times):
      prefill, step = time.prefill_ms / times[0].prefill_ms, time.step_ms / times[0].step_ms
      print(f"{rule + ': ' + name:30}{time.prefill_ms:12.2f}{prefill:8.2f}{time.step_ms:12.2f}{step:8.2f}", flush=True)


if __name__ == "__main__":
  main()

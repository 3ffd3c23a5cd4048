"""What Dr.LLM's routers cost at the prompt, and what layers that they leave out save after it, beside the dense model.

  python benchmarks/routed_decoding.py --width=576 --d_ff=1536 --layers=30

Weights are random and routers are told what to say, so that a known number of layers is skipped. All models take turns.
`prompt` is the time of the step that reads the prompt with all layers executed, so that routers are all that is added
to the dense model. `a token` is that of later steps, with k of the L layers left out, as a share of the dense model's
and of the same model's that leaves out none; `of k/L` is the latter's saved share of time over the skipped share of
layers.
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adaptive import cost as costs
from adaptive.backbone.transformer import init_params
from adaptive.config import ModelConfig
from adaptive.methods import dense
from adaptive.methods.depth import dr_llm


def told(params, visits):
  """Routers that say so, whatever they read."""
  routers = params["routers"]
  bias = 9.0 * jax.nn.one_hot(jnp.asarray(visits), 3)
  return {**params, "routers": {**routers, "weight": jnp.zeros_like(routers["weight"]), "bias": bias}}


class Timed:
  """Steps of one decoder: a prompt's, and tokens after it, on a cache that is updated in place."""

  def __init__(self, decoder, step, prompt, slots: int):
    self._decoder, self._step, self._prompt = decoder, step, prompt
    self._counts, self._slots = np.array([prompt.shape[1]], np.int32), slots
    self.prompt()

  def prompt(self) -> float:
    empty = jax.block_until_ready(self._decoder.empty_cache(1, self._slots))
    began = time.perf_counter()
    _, self._cache, _ = jax.block_until_ready(self._step(self._decoder.params, self._prompt, self._counts, empty))
    return time.perf_counter() - began

  def token(self, repeats: int = 5) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
      one = self._prompt[:, :1], np.ones(1, np.int32)
      logits, self._cache, _ = self._step(self._decoder.params, *one, self._cache)
      jax.block_until_ready(logits)
    return (time.perf_counter() - began) / repeats


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--width", type=int, default=576)
  parser.add_argument("--d_ff", type=int, default=1536)
  parser.add_argument("--layers", type=int, default=30)
  parser.add_argument("--heads", type=int, default=9)
  parser.add_argument("--kv_heads", type=int, default=3)
  parser.add_argument("--vocab", type=int, default=1024)
  parser.add_argument("--prompt", type=int, default=128)
  parser.add_argument("--slots", type=int, default=512, help="room of the caches; at least prompt + 5 turns + 5")
  parser.add_argument("--skipped", default="5,10,15,20")
  parser.add_argument("--turns", type=int, default=15)
  parser.add_argument("--dtype", default="float32")
  a = parser.parse_args()
  config = ModelConfig(
    vocab_size=a.vocab, num_layers=a.layers, d_model=a.width, d_ff=a.d_ff, num_heads=a.heads, num_kv_heads=a.kv_heads,
    dtype=a.dtype,
  )  # fmt: skip
  model = dr_llm.build(config, dr_llm.Config(budgets=(-0.5,)))
  params = nn.unbox(init_params(model, jax.random.key(0)))
  prompt = np.random.default_rng(0).integers(0, a.vocab, (1, a.prompt)).astype(np.int32)
  plain = dense.decoder(dense.build(config, dense.Config()), dr_llm.backbone(params), None)
  timed = {"dense": Timed(plain, jax.jit(plain.step, donate_argnums=3), prompt, a.slots)}
  numbers, step = [0, *map(int, a.skipped.split(","))], None
  for number in numbers:
    skipped = set(np.linspace(1, a.layers - 2, number).astype(int)) if number else set()
    visits = [0 if layer in skipped else 1 for layer in range(a.layers)]
    decoder = dr_llm.decoder(model, told(params, visits), dr_llm.submodels(model)[0])
    step = step or jax.jit(decoder.step, donate_argnums=3)
    timed[number] = Timed(decoder, step, prompt, a.slots)
  for one in timed.values():
    one.token(), one.prompt()
  prompts, tokens = ({name: [] for name in timed} for _ in range(2))
  for _ in range(a.turns):
    for name in ("dense", 0):
      prompts[name].append(timed[name].prompt())
    for name, one in timed.items():
      tokens[name].append(one.token())
  share = lambda found, name, other: statistics.median(x / y for x, y in zip(found[name], found[other]))
  print(f"{a.layers} layers of width {a.width}, {jax.devices()[0].device_kind}, {a.turns} turns, {a.prompt} tokens")
  flops = dr_llm.router_flops(model, a.prompt) / costs.dense_cost(config, a.prompt).flops_per_token
  print(f"prompt, every layer executed: {share(prompts, 0, 'dense'):.3f} of the dense model's time")
  print(f"routers, by count: {flops:.2%} of the prompt's FLOPs")
  for number in numbers:
    own = share(tokens, number, 0)
    saved = f"; saved {(1 - own) * a.layers / number:.2f} of k/L" if number else ""
    dense_share = share(tokens, number, "dense")
    print(
      f"a token, {number:2} layers skipped: {dense_share:.3f} of the dense model's time, {own:.3f} of its own{saved}"
    )


if __name__ == "__main__":
  main()

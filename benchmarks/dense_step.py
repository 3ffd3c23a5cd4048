"""The framework's dense training step against a plain hand-written Flax transformer of the same shape.

  python benchmarks/dense_step.py

Both take the same batches, AdamW with clipping, float32, and update a donated state. They take turns, so the ratio
holds on a noisy machine. The plain model is what one would write in an afternoon: a Python loop over layers, einsum
attention with a mask, no scan, no sharding, no logical axes.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive import sharding
from adaptive.config import Experiment, MeshConfig, ModelConfig, OptimizerConfig
from adaptive.methods import dense
from adaptive.training import state as states
from adaptive.training.optim import make_optimizer
from adaptive.training.step import compile_step


class PlainBlock(nn.Module):
  heads: int
  kv_heads: int
  d_ff: int

  @nn.compact
  def __call__(self, x, mask, sin, cos):
    d = x.shape[-1]
    h = d // self.heads
    y = nn.RMSNorm(epsilon=1e-5)(x)
    q = nn.DenseGeneral((self.kv_heads, self.heads // self.kv_heads, h), use_bias=False)(y)
    k = nn.DenseGeneral((self.kv_heads, h), use_bias=False)(y)
    v = nn.DenseGeneral((self.kv_heads, h), use_bias=False)(y)
    q, k = rotate(q, sin[..., None, None, :], cos[..., None, None, :]), rotate(k, sin[..., None, :], cos[..., None, :])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / h**0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    y = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    x = x + nn.DenseGeneral(d, axis=(-3, -2, -1), use_bias=False)(y)
    y = nn.RMSNorm(epsilon=1e-5)(x)
    y = nn.silu(nn.Dense(self.d_ff, use_bias=False)(y)) * nn.Dense(self.d_ff, use_bias=False)(y)
    return x + nn.Dense(d, use_bias=False)(y)


class Plain(nn.Module):
  c: ModelConfig

  @nn.compact
  def __call__(self, batch):
    c, h = self.c, self.c.head_size
    embed = nn.Embed(c.vocab_size, c.d_model)
    x, seg = embed(batch["inputs"]), batch["segment_ids"]
    t = seg.shape[1]
    mask = (seg[:, :, None] == seg[:, None, :]) & jnp.tril(jnp.ones((t, t), bool))
    angles = batch["positions"][..., None] * c.rope_theta ** (-jnp.arange(0, h, 2) / h)
    for _ in range(c.num_layers):
      x = PlainBlock(c.num_heads, c.num_kv_heads, c.d_ff)(x, mask, jnp.sin(angles), jnp.cos(angles))
    return embed.attend(nn.RMSNorm(epsilon=1e-5)(x))


def rotate(x, sin, cos):
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def plain_step(config: ModelConfig, optimizer):
  model = Plain(config)

  def step(state, batch):
    params, opt_state = state

    def loss_fn(params):
      logits, mask = model.apply(params, batch), batch["segment_ids"] > 0
      nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
      return jnp.sum(nll * mask) / jnp.sum(mask)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return model, jax.jit(step, donate_argnums=0)


def framework_step(config: ModelConfig, mesh):
  experiment = Experiment(method=dense.Config(), model=config)
  model, optimizer = dense.build(config, experiment.method), make_optimizer(OptimizerConfig(), 1000)
  return states.create(model, optimizer, mesh, 0), compile_step(dense, model, optimizer, mesh, 0, 1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--layers", type=int, default=6)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--seq_len", type=int, default=256)
  parser.add_argument("--remat", default="none")
  parser.add_argument("--scan_unroll", type=int, default=0)
  args = parser.parse_args()
  config = ModelConfig(
    num_layers=args.layers, d_model=args.width, d_ff=3 * args.width, remat=args.remat, scan_unroll=args.scan_unroll
  )
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 256, (args.batch, args.seq_len + 1), dtype=np.int32)
  batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": np.ones_like(tokens[:, 1:]),
    "positions": np.broadcast_to(np.arange(args.seq_len, dtype=np.int32), tokens[:, 1:].shape),
  }
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  batch = sharding.global_batch(batch, mesh)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
  model, plain = plain_step(config, optimizer)
  params = model.init(jax.random.key(0), batch)
  plain_state = (params, optimizer.init(params))
  with jax.set_mesh(mesh):
    state, framework = framework_step(config, mesh)
    choice, times = np.zeros((1,), np.int32), {"framework": [], "plain": []}
    for i in range(args.repeats + 2):
      start = time.perf_counter()
      state, metrics = framework(state, batch, choice)
      jax.block_until_ready(metrics)
      middle = time.perf_counter()
      plain_state, loss = plain(plain_state, batch)
      loss.block_until_ready()
      if i >= 2:
        times["framework"].append(middle - start)
        times["plain"].append(time.perf_counter() - middle)
  ratios = np.array(times["framework"]) / np.array(times["plain"])
  for name, values in times.items():
    print(f"{name:10} median {1000 * np.median(values):8.1f} ms  minimum {1000 * min(values):8.1f} ms")
  print(
    f"framework / plain: {np.median(times['framework']) / np.median(times['plain']):.3f} of the medians, "
    f"{np.median(ratios):.3f} median of {len(ratios)} pairs, "
    f"{min(times['framework']) / min(times['plain']):.3f} of the minima"
  )


if __name__ == "__main__":
  main()

"""SortedNet does what it is for: after nested training every prefix of the network works."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from adaptive.backbone.transformer import Transformer, init_params
from adaptive.config import OptimizerConfig
from adaptive.losses import cross_entropy, mean
from adaptive.methods import dense
from adaptive.methods.width import sorted_net
from adaptive.training.optim import make_optimizer
from adaptive.training.state import fresh
from adaptive.training.step import make_step

MODEL = tiny.model_config(
  vocab_size=16, num_layers=3, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True
)
FAMILY = sorted_net.Config(depths=(1, 2, 3), d_ff=(8, 48), scheme="sandwich", num_sampled=3, accum_data="shared")
STEPS = 400


def copies(seed, steps, rows):
  """Rows of nine random tokens said twice, [steps, rows, 16]: only the second half can be predicted."""
  tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (steps, rows, 9), np.int32)
  tokens = np.concatenate([tokens, tokens], axis=-1)[..., :17]
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens[..., 1:].shape)
  segments = np.ones_like(positions)
  return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "segment_ids": segments, "positions": positions}


def trained(method, config):
  """Parameters after one compiled run over all steps."""
  model = method.build(MODEL, config)
  settings = OptimizerConfig(learning_rate=1e-2, warmup_steps=20, weight_decay=0.0)
  optimizer = make_optimizer(settings, STEPS)
  step = make_step(method, model, optimizer, 0, 1)

  @jax.jit
  def run(batches, choices):
    params = nn.unbox(init_params(Transformer(MODEL), jax.random.key(0)))
    state = fresh(params, optimizer)
    return jax.lax.scan(lambda state, inputs: (step(state, *inputs)[0], None), state, (batches, choices))[0].params

  choices = np.array([method.sample(model, 0, s) for s in range(STEPS)], np.int32)
  return run(copies(0, STEPS, 16), choices)


@pytest.fixture(scope="module")
def quality():
  """Held-out nats per predictable token of every sub-model (keyed by depth and d_ff), nested and plain."""
  model = sorted_net.build(MODEL, FAMILY)
  batch = jax.tree.map(lambda x: x[0], copies(1, 1, 256))

  @jax.jit
  def loss(params, index):
    logits = sorted_net.forward(model, params, batch, index).logits
    return mean(cross_entropy(logits, batch["targets"], batch["positions"] >= 8))

  nested, plain = trained(sorted_net, FAMILY), trained(dense, dense.Config())
  keys = [(s["depth"], s["d_ff"]) for s in sorted_net.submodels(model)]
  return tuple({key: float(loss(params, np.int32(i))) for i, key in enumerate(keys)} for params in (nested, plain))


@pytest.mark.slow
def test_loss_does_not_grow_along_any_axis(quality):
  nested, _ = quality
  for small, large in itertools.permutations(nested, 2):
    if all(a <= b for a, b in zip(small, large)):
      assert nested[large] <= nested[small] + 0.1, (small, large)


@pytest.mark.slow
def test_the_smallest_beats_the_prefix_of_a_plainly_trained_model(quality):
  nested, plain = quality
  assert nested[1, 8] < plain[1, 8] - 0.5


@pytest.mark.slow
def test_the_full_model_keeps_up_with_plain_training(quality):
  nested, plain = quality
  assert plain[3, 48] < 1.0 < np.log(MODEL.vocab_size)
  assert nested[3, 48] < plain[3, 48] + 0.2

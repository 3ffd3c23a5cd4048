"""Pondering learns how long: on a planted model whose predictions get right after a known number of passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS

METHOD = METHODS["ponder"]
LEVELS, ANSWER = 4, 0


def planted(kind):
  """A model in which a token of level k is predicted well from about its k-th pass on, and knows nothing of halting.

  One coordinate of the stream says how far a token is; each pass adds the same to it, and the head reads its sign.
  """
  config = tiny.model_config(
    num_layers=LEVELS + 2, num_heads=2, num_kv_heads=1, d_ff=2, ff_groups=1, vocab_size=8, tied_embeddings=False
  )
  how = Exiting(signal="learned", thresholds=(0.3, 0.99))
  model = METHOD.build(
    config, METHOD.Config(halting=kind, num_recursions=LEVELS + 2, exit=how, kl_weight=0.1, ponder_cost=0.2)
  )
  params = jax.tree.map(jnp.zeros_like, tiny.random_params(model))
  constant, progress = 0, 1
  table = np.zeros((8, config.d_model), np.float32)
  table[:, constant] = 8.0
  table[1 : LEVELS + 1, progress] = 0.5 - np.arange(1, LEVELS + 1)
  ones = lambda part: {"scale": jnp.ones_like(part["scale"])}
  layers = {name: ones(part) if name.endswith("norm") else part for name, part in params["layers"].items()}
  mlp = layers["mlp"]
  layers["mlp"] = {
    "gate": mlp["gate"].at[0, constant, 0, 0].set(1.0),
    "up": mlp["up"].at[0, constant, 0, 0].set(1.0),
    "down": mlp["down"].at[0, 0, 0, progress].set(1 / 15.7),
  }
  head = params["embedding"]["head"].at[progress, ANSWER].set(6.0)
  embedding, norm = {"table": jnp.asarray(table), "head": head}, ones(params["final_norm"])
  halting = {**params["halting"], "bias": jnp.full(1, -2.0)}
  return model, {"embedding": embedding, "layers": layers, "final_norm": norm, "halting": halting}


@pytest.mark.parametrize("kind", ["pondernet", "act"])
def test_tokens_that_need_more_passes_learn_to_make_more(kind):
  """The halting unit alone is trained, by the loss of a model whose predictions get right at a known pass."""
  model, params = planted(kind)
  tokens = jnp.tile(jnp.arange(1, LEVELS + 1, dtype=jnp.int32)[None], (1, 2))
  batch = {"inputs": tokens, "targets": jnp.full_like(tokens, ANSWER), "segment_ids": jnp.ones_like(tokens)}
  batch["positions"] = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  choice, key = METHOD.sample(model, 0, 0), jax.random.key(0)
  loss = lambda halting: METHOD.loss(model, {**params, "halting": halting}, batch, choice, key, jnp.int32(0))[0]
  optimizer = optax.adam(0.03)

  @jax.jit
  def learn(halting):
    def step(carry, _):
      halting, state = carry
      value, grads = jax.value_and_grad(loss)(halting)
      updates, state = optimizer.update(grads, state)
      return (optax.apply_updates(halting, updates), state), value

    return jax.lax.scan(step, (halting, optimizer.init(halting)), length=600)

  (halting, _), values = learn(params["halting"])
  names, passes = [submodel.name for submodel in METHOD.submodels(model)], []
  index = names.index({"pondernet": "threshold=0.3", "act": "threshold=0.99"}[kind])
  layers = lambda params, batch: METHOD.forward(model, params, batch, index).aux["layers"]
  run = jax.jit(lambda halting, batch: layers({**params, "halting": halting}, batch))
  for level in range(1, LEVELS + 1):
    total, count = run(halting, {**batch, "inputs": jnp.full_like(tokens, level)})
    passes.append(float(total / count))
  assert passes == sorted(set(passes)), "each level makes more passes than the one before"
  assert values[-1] < 0.7 * values[0]

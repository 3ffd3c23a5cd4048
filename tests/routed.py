"""Tiny Dr.LLM models whose routers decide in a known way, and rows of questions for them."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from adaptive.methods.depth import dr_llm

MODEL = tiny.model_config()
LAYERS = MODEL.num_layers
LENGTH = 14


def built(config=MODEL, **settings):
  settings = {"hidden": 8, "windows": 3, "budgets": (-0.6, -0.5, -0.4), **settings}
  return dr_llm.build(config, dr_llm.Config(**settings))


def varied_params(model, seed=0):
  """Routers that decide differently for different prompts."""
  params = tiny.random_params(model, seed)
  routers = params["routers"]
  return {**params, "routers": {**routers, "weight": 12 * routers["weight"], "bias": 0.2 * routers["bias"]}}


def fixed_params(model, visits, seed=0):
  """Routers that decide one and the same, whatever they read."""
  params = tiny.random_params(model, seed)
  routers = params["routers"]
  bias = 9.0 * jax.nn.one_hot(jnp.asarray(visits), 3)
  return {**params, "routers": {**routers, "weight": jnp.zeros_like(routers["weight"]), "bias": bias}}


def questions(prompts, length=LENGTH, seed=0, config=MODEL):
  """Rows whose prompts have so many tokens, with answers of different lengths behind them, then padding."""
  rng, rows = np.random.default_rng(seed), len(prompts)
  sizes = np.minimum(np.array(prompts) + 2 + np.arange(rows) % 3, length)
  place = np.arange(length)[None]
  real, scored = place < sizes[:, None], place >= np.array(prompts)[:, None] - 1
  tokens = rng.integers(0, config.vocab_size, (2, rows, length)).astype(np.int32)
  batch = {
    "inputs": np.where(real, tokens[0], 0),
    "targets": np.where(real, tokens[1], 0),
    "segment_ids": real.astype(np.int32),
    "positions": np.where(real, place, 0).astype(np.int32),
    "scored": (real & scored).astype(np.int32),
  }
  return jax.tree.map(jnp.asarray, batch)


def forward(model, params, batch, index):
  return jax.jit(lambda p, b: dr_llm.forward(model, p, b, index))(params, batch)


def assert_close(found, wanted, batch, **tolerance):
  """Logits [b, t, v] of real tokens; those of padding mean nothing."""
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], **tolerance)


def sizes(batch):
  return np.asarray(batch["segment_ids"]).sum(1)


def labelled(prompts, seed=0):
  batch = questions(prompts, seed=seed)
  return {**batch, **{k: v for k, v in tiny.labels(MODEL, batch, seed).items() if k != "scored"}}

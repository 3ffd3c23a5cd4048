"""JEI-DNN with gates that tell tokens apart, for the tests of what it does and of how it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from scipy import special

from adaptive.depth.exits import Exiting
from adaptive.methods import METHODS

CONFIG, METHOD = tiny.model_config(), METHODS["jei_dnn"]
EXITS, THRESHOLD = (1, 2, 3), 0.4
BATCH = tiny.packed_batch(CONFIG)
REAL = np.asarray(BATCH["segment_ids"]) > 0
# Gates that tell tokens apart: at each early exit some open and some do not.
OPENING = {
  "weight": np.tile(np.array([[8.0, -0.3, 4.0, -0.5]], np.float32), (3, 1)),
  "bias": np.array([-1.5, -2.0, -2.6], np.float32),
}


@functools.cache
def built(heads="own", kv="project", backbone="trained", limits=(THRESHOLD,), **settings):
  how = Exiting(signal="learned", thresholds=limits, kv=kv)
  model = METHOD.build(CONFIG, METHOD.Config(exits=EXITS, heads=heads, backbone=backbone, exit=how, **settings))
  return model, {**tiny.random_params(model), "gates": jax.tree.map(jnp.asarray, OPENING)}


def numbers_by_hand(logits):
  probs = special.softmax(np.asarray(logits, np.float64), axis=-1)
  squared = probs**2 / np.sum(probs**2, axis=-1, keepdims=True)
  ordered = np.sort(probs, axis=-1)
  entropy = lambda p: special.entr(p).sum(-1)
  return np.stack([ordered[..., -1], entropy(probs), ordered[..., -1] - ordered[..., -2], entropy(squared)], axis=-1)


def probabilities_by_hand(gates):
  """P, one exit and one token after the other."""
  found = np.zeros_like(gates)
  for token in np.ndindex(gates.shape[1:]):
    for which in range(len(gates)):
      found[(which, *token)] = max(0.0, min(gates[(which, *token)], 1 - sum(gates[(j, *token)] for j in range(which))))
  return found

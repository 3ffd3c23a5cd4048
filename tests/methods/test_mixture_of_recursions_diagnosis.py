"""What diagnosis says of a model, against its forward passes and counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from adaptive.methods.depth import mixture_of_recursions as mor
from adaptive.methods.depth.mixture_of_recursions import model as models

MESH = tiny.mesh()


def build(**settings):
  config = tiny.model_config(num_layers=5, num_heads=2, num_kv_heads=1, d_ff=16, vocab_size=16)
  return mor.build(config, mor.Config(**settings))


def batches_of(model):
  return [tiny.packed_batch(model.config, rows=8, length=12, seed=seed) for seed in (0, 1)]


def mean_loss(logits, batches):
  """Nats per real token, in NumPy."""
  total = number = 0
  for logit, batch in zip(logits, batches):
    logit, real = np.asarray(logit, np.float64), np.asarray(batch["segment_ids"]) > 0
    loss = (
      np.log(np.exp(logit).sum(-1)) - np.take_along_axis(logit, np.asarray(batch["targets"])[..., None], -1)[..., 0]
    )
    total, number = total + loss[real].sum(), number + real.sum()
  return total / number


def test_losses_are_those_of_the_causal_pass_and_of_training():
  model = build(capacities=(1.0, 0.7, 0.4))
  params, batches = tiny.random_params(model, seed=1), batches_of(model)
  found = mor.diagnose(model, params, batches, MESH)
  train = jax.jit(lambda p, b: models.training_logits(model, p, b, None, jax.random.key(0), jnp.int32(0))[0])
  causal = jax.jit(lambda p, b: mor.forward(model, p, b, len(mor.submodels(model)) - 1).logits)
  np.testing.assert_allclose(found["top_k_loss"], mean_loss([train(params, b) for b in batches], batches), rtol=1e-5)
  np.testing.assert_allclose(found["causal_loss"], mean_loss([causal(params, b) for b in batches], batches), rtol=1e-5)
  assert abs(found["top_k_loss"] - found["causal_loss"]) > 1e-3


def test_shares_are_those_counted_by_hand():
  """Scores that are all 0 keep nobody behind the first recursion; top-k then takes the first real tokens of a row."""
  model = build(capacities=(1.0, 0.5, 0.25))
  params, batches = tiny.random_params(model, seed=1), batches_of(model)
  params["router"]["weight"] = jnp.zeros_like(params["router"]["weight"])
  found = mor.diagnose(model, params, batches, MESH)
  lengths = np.concatenate([(np.asarray(batch["segment_ids"]) > 0).sum(axis=1) for batch in batches])
  second, third = np.minimum(lengths, 6).sum(), np.minimum(lengths, 3).sum()
  assert {name: found[name] for name in found if "/" in name} == {
    "capacity/1": 1.0, "capacity/2": 0.0, "capacity/3": 0.0,
    "disagreement/1": 0.0,
    "disagreement/2": np.float32(second / lengths.sum()),
    "disagreement/3": np.float32(third / second),
  }  # fmt: skip
  assert found["dead_positions"] == np.float32((lengths.max() - 3) / lengths.max())


def test_token_choice_says_what_it_keeps():
  model = build(routing="token_choice", gate="softmax", alpha=1.0)
  params, batches = tiny.random_params(model, seed=1), batches_of(model)
  found = mor.diagnose(model, params, batches, MESH)
  assert list(found) == ["capacity/1", "capacity/2", "capacity/3"]
  assert found["capacity/1"] == 1.0 > found["capacity/2"] > found["capacity/3"]

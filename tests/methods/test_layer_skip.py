"""LayerSkip: its loss by hand, its curricula, and dropout at the paper's rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import losses
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.depth import objectives
from adaptive.methods import METHODS
from adaptive.methods.depth import layer_skip

CONFIG, METHOD = tiny.model_config(num_layers=6), METHODS["layer_skip"]


def built(**settings):
  model = METHOD.build(CONFIG, METHOD.Config(**{"dropout": 0.0, **settings}))
  return model, tiny.random_params(model), tiny.packed_batch(CONFIG)


def loss_of(model, params, batch, step=0, key=0):
  choice, drawn = METHOD.sample(model, 0, 0), jax.random.key(key)
  return jax.jit(lambda p: METHOD.loss(model, p, batch, choice, drawn, jnp.int32(step)))(params)


def each_exit(model, params, batch):
  found = []
  for depth in range(1, 7):
    config, small = METHOD.extract(model, params, METHOD.submodels(model)[depth - 1 if depth < 6 else -1])
    assert config.num_layers == depth
    logits = jax.jit(Transformer(config).apply)({"params": small}, batch)
    pair = losses.cross_entropy(logits, batch["targets"], batch["segment_ids"] > 0)
    found.append(float(losses.mean(pair)))
  return np.array(found)


@pytest.mark.parametrize(
  ("settings", "step", "layers"),
  [
    (dict(curriculum="none"), 0, range(6)),
    (dict(curriculum="rotational", rotation=3), 0, (0, 3, 5)),
    (dict(curriculum="rotational", rotation=3), 7, (1, 4, 5)),
    (dict(curriculum="rotational", rotation=3), 2, (2, 5)),
    (dict(curriculum="rotational", rotation=8), 6, (5,)),
    (dict(curriculum="gradual", curriculum_steps=24), 0, (5,)),
    (dict(curriculum="gradual", curriculum_steps=24), 4, (3, 4, 5)),
    (dict(curriculum="gradual", curriculum_steps=24), 23, range(6)),
  ],
)
def test_the_loss_is_the_weighted_mean_over_the_enabled_layers(settings, step, layers):
  model, params, batch = built(exit_scale=0.5, **settings)
  on = np.isin(np.arange(6), layers)
  np.testing.assert_array_equal(layer_skip.enabled(model, jnp.int32(step)), on)
  weights = objectives.layer_skip_weights(6, 0.5) * on
  found, metrics = loss_of(model, params, batch, step)
  each = each_exit(model, params, batch)
  assert float(found) == pytest.approx(np.average(each, weights=weights), rel=1e-5)
  assert float(losses.mean(metrics["loss"])) == pytest.approx(each[-1], rel=1e-5)


def test_without_dropout_and_with_the_last_layer_alone_it_is_plain_training():
  model, params, batch = built(exit_scale=0.0)
  dense, plain = METHODS["dense"], Transformer(CONFIG)
  found = jax.value_and_grad(lambda p: loss_of(model, p, batch, 1)[0])(params)
  want = jax.value_and_grad(lambda p: dense.loss(plain, p, batch, (0,), jax.random.key(0), jnp.int32(0))[0])(params)
  tiny.assert_trees_close(found, want)


@pytest.mark.parametrize("by", ["row", "batch"])
def test_layers_drop_out_at_their_rates(by):
  model, *_ = built(dropout=0.4, dropout_by=by)
  draws = 400
  keys = jax.random.split(jax.random.key(0), draws)
  drawn = jax.vmap(lambda key: layer_skip.dropped(model, 4, key, jnp.int32(0)))(keys)
  assert drawn.shape == (draws, 6, 4) if by == "row" else (draws, 6)
  rates = objectives.layer_dropout_rates(6, 0.4)
  found = np.asarray(drawn).reshape(draws, 6, -1)
  number = draws * found.shape[2]
  assert found[:, 0].sum() == 0
  assert np.all(np.abs(found.mean((0, 2)) - rates) <= 4 * np.sqrt(rates * (1 - rates) / number) + 1e-12)


@pytest.mark.parametrize("by", ["row", "batch"])
def test_a_dropped_layer_is_left_out(by):
  """Of a row, whatever happens to the other rows."""
  model, params, batch = built(dropout=1.0, dropout_by=by, curriculum="none", exit_scale=0.0)
  out = np.asarray(layer_skip.dropped(model, 2, jax.random.key(3), jnp.int32(0)))
  out = out if by == "row" else np.repeat(out[:, None], 2, axis=1)
  assert out[-1].all()
  assert out.sum() < out.size
  rows = []
  for row in range(2):
    kept = np.flatnonzero(~out[:, row])
    config = tiny.model_config(num_layers=len(kept))
    small = {**params, "layers": jax.tree.map(lambda leaf, kept=kept: leaf[kept], params["layers"])}
    one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
    logits = Transformer(config).apply({"params": small}, one)
    rows.append(losses.cross_entropy(logits, one["targets"], one["segment_ids"] > 0))
  want = sum(float(r[0]) for r in rows) / sum(float(r[1]) for r in rows)
  assert float(loss_of(model, params, batch, key=3)[0]) == pytest.approx(want, rel=1e-5)


def test_the_rates_ramp_up():
  model, *_ = built(dropout=1.0, dropout_ramp_steps=11)
  assert not layer_skip.dropped(model, 4, jax.random.key(0), jnp.int32(0)).any()
  assert layer_skip.dropped(model, 4, jax.random.key(0), jnp.int32(10))[-1].all()
  assert layer_skip.dropped(built()[0], 4, jax.random.key(0), jnp.int32(0)) is None


def test_a_gradual_curriculum_needs_to_know_how_long():
  with pytest.raises(ConfigError, match="curriculum_steps"):
    METHOD.Config(curriculum="gradual")

"""The oracle of early exit: by hand, and that replaying it with the full model's keys gives the full model's output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import executors
from adaptive.backbone.transformer import Transformer
from adaptive.depth import climb, oracle
from adaptive.depth.exits import Exiting, Rule
from adaptive.depth.signals import Signal
from adaptive.methods import METHODS

CONFIG, METHOD, DEPTHS = tiny.model_config(), METHODS["early_exit"], (1, 2, 3, 4)


def built(heads="own"):
  """A model that leaves with the full model's keys, parameters, and rows."""
  model = METHOD.build(CONFIG, METHOD.Config(exits=DEPTHS[:-1], heads=heads, exit=Exiting(kv="exact")))
  return model, tiny.random_params(model), tiny.packed_batch(CONFIG, rows=4)


@functools.partial(jax.jit, static_argnums=0)
def oracle_exits(model, params, batch):
  """The first exit of each token that predicts what the last one does, [b, t]."""
  hidden = climb.streams(model.exits, params, batch)
  return oracle.exit_of(jnp.stack([model.exits.head(params, i, x).argmax(-1) for i, x in enumerate(hidden)]))


@functools.partial(jax.jit, static_argnums=0)
def replayed(model, params, batch, table):
  """Likeliest tokens [b, t] if each token leaves at the exit that a table [b, t] says, and the layers run up to it."""
  told = lambda params, which: Signal(lambda seen: jnp.float32(table == which), reads_logits=False)
  exits = model.exits._replace(learned=told, how=dataclasses.replace(model.exits.how, signal="learned"))
  logits, found = climb.one_shot(exits, params, batch, Rule(CONFIG.num_layers, (0.5,) * 3))
  return logits.argmax(-1), found["layers"][0]


def full_model_s(params, batch):
  """Likeliest tokens of the plain model, [b, t]."""
  backbone = {name: params[name] for name in ("embedding", "layers", "final_norm")}
  return np.asarray(Transformer(CONFIG).apply({"params": backbone}, batch).argmax(-1))


def test_the_first_exit_that_agrees_with_the_last():
  tops = np.array([[3, 1, 2, 0], [1, 1, 3, 0], [1, 1, 2, 4]])
  np.testing.assert_array_equal(oracle.exit_of(tops), [1, 0, 0, 2])


def test_its_layers_are_those_of_the_first_agreeing_head():
  model = METHOD.build(CONFIG, METHOD.Config(exits=(1, 2, 3), heads="own"))
  params, batch = tiny.random_params(model), tiny.packed_batch(CONFIG)
  hidden = executors.exits(CONFIG, params, batch, (1, 2, 3, 4))
  tops = np.stack([np.argmax(model.exits.head(params, i, x), axis=-1) for i, x in enumerate(hidden)])
  real, total = np.asarray(batch["segment_ids"]) > 0, 0
  for row, t in zip(*np.nonzero(real)):
    total += next(depth for depth in (1, 2, 3, 4) if tops[depth - 1, row, t] == tops[-1, row, t])
  assert real.sum() < total < 4 * real.sum()
  found = METHOD.diagnose(model, params, [batch, batch], tiny.mesh(data=1, fsdp=jax.device_count()))
  assert found == {"oracle_layers": np.float32(total / real.sum())}


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_replayed_it_gives_the_full_model_s_output_for_fewer_layers(heads):
  model, params, batch = built(heads)
  real, table = np.asarray(batch["segment_ids"]) > 0, oracle_exits(model, params, batch)
  tops, layers = replayed(model, params, batch, table)
  np.testing.assert_array_equal(np.asarray(tops)[real], full_model_s(params, batch)[real])
  np.testing.assert_array_equal((layers, real.sum()), oracle.layers(model.exits, params, batch))
  assert real.sum() < layers < 4 * real.sum()


def test_a_token_that_leaves_earlier_says_something_else():
  """So no rule that keeps the output leaves earlier, token by token."""
  model, params, batch = built()
  table, rng = oracle_exits(model, params, batch), np.random.default_rng(0)
  tops, _ = replayed(model, params, batch, rng.integers(0, np.maximum(table, 1)).astype(np.int32))
  late = (np.asarray(batch["segment_ids"]) > 0) & (table > 0)
  assert late.sum() > 20
  assert (tops != full_model_s(params, batch))[late].all()


def test_it_runs_no_more_layers_than_any_static_plan_of_equal_output():
  """A depth for all, and the least depth for each place in a row that keeps the output of all rows."""
  model, params, batch = built("shared")
  idle = lambda leaf: leaf.at[2:].set(0.0)  # the last layers add nothing, so a fixed depth of 2 has the same output
  layers = params["layers"]
  params = params | {"layers": layers | {
    part: layers[part] | {out: idle(layers[part][out])} for part, out in (("attention", "out"), ("mlp", "down"))
  }}  # fmt: skip
  real, want = np.asarray(batch["segment_ids"]) > 0, full_model_s(params, batch)
  table = oracle_exits(model, params, batch)
  by_place = np.max(np.where(real, table, 0), axis=0, keepdims=True)
  _, least = replayed(model, params, batch, table)
  equal = []
  for plan in (*range(4), by_place):
    tops, layers = replayed(model, params, batch, np.broadcast_to(plan, table.shape).astype(np.int32))
    if np.array_equal(np.asarray(tops)[real], want[real]):
      equal.append(layers)
      assert least < layers
  assert equal[:3] == [depth * real.sum() for depth in (2, 3, 4)]
  assert len(equal) == 4

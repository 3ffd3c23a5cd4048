"""The oracle of early exit: by hand, and that replaying it with the full model's keys gives the full model's output."""

import jax
import numpy as np
import tiny

from adaptive import executors
from adaptive.depth import oracle
from adaptive.methods import METHODS

CONFIG, METHOD = tiny.model_config(), METHODS["early_exit"]


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

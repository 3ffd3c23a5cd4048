"""Updates that must not be made: a loss or gradient that is not finite, or far above what it was.

One NaN in a gradient leaves NaN in Adam's moments for good, so the check is made on the device, before the update, and
whatever the policy, a bad update changes neither parameters nor moments. The host learns of it one step late, with the
metrics, and then stops, counts, or rolls back (`GuardConfig`).
"""

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from adaptive.config import GuardConfig

FINE, NOT_FINITE, SPIKE = range(3)
REASONS = {NOT_FINITE: "loss or gradient is not finite", SPIKE: "loss or gradient norm is a spike"}

DEFAULT = GuardConfig()

# Standard deviations below this share of the mean are taken for it: a nearly constant loss is no reason for alarm.
_LEAST_SPREAD = 0.01


class BadUpdate(Exception):  # noqa: N818 - the run may well go on
  """An update that was not made. `step` is the number that it would have made."""

  def __init__(self, step: int, verdict: int, loss: float, grad_norm: float):
    super().__init__(f"step {step}: {REASONS[verdict]} (loss {loss:.4g}, gradient norm {grad_norm:.4g})")
    self.step, self.verdict = step, verdict


@flax.struct.dataclass
class GuardState:
  """Part of the train state, so that a resumed run judges as the one that never stopped.

  Attributes:
    history: float32 [2, window], loss and gradient norm of the latest updates that were made; a ring. None when spikes
      are not looked for.
    made: int32 [], updates made. skipped: int32 [], updates not made.
    in_a_row: int32 [], updates not made since the last one that was.
  """

  history: jax.Array | None
  made: jax.Array
  skipped: jax.Array
  in_a_row: jax.Array


def init(config: GuardConfig) -> GuardState:
  """Of a run that has made no update."""
  history = None if config.spike == "off" else jnp.zeros((2, config.spike_window))
  return GuardState(history, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def same_window(config: GuardConfig, saved: Mapping[str, Any]) -> bool:
  """Whether the state of a run with the saved settings fits these."""
  before = saved["spike_window"] if saved["spike"] != "off" else None
  return before == (config.spike_window if config.spike != "off" else None)


def judge(
  config: GuardConfig, state: GuardState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, GuardState]:
  """FINE, NOT_FINITE or SPIKE, int32 [], and the state after it.

  A spike is a loss or a gradient norm more than `spike_sigmas` standard deviations above its mean over the window;
  until the window is full there are none. Bad updates do not enter it.

  Args:
    loss, grad_norm: float [], of the update in question.
  """
  values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  verdict = jnp.where(jnp.isfinite(values).all(), FINE, NOT_FINITE)
  history = state.history
  if history is not None:
    verdict = jnp.where((verdict == FINE) & _is_spike(config, state, values), SPIKE, verdict)
    history = choose(verdict, history.at[:, state.made % config.spike_window].set(values), history)
  one = (verdict == FINE).astype(jnp.int32)
  return verdict, GuardState(history, state.made + one, state.skipped + 1 - one, (state.in_a_row + 1) * (1 - one))


def _is_spike(config: GuardConfig, state: GuardState, values: jax.Array) -> jax.Array:
  mean, spread = state.history.mean(1), state.history.std(1)
  limit = mean + config.spike_sigmas * jnp.maximum(spread, _LEAST_SPREAD * jnp.abs(mean))
  return (values > limit).any() & (state.made >= config.spike_window)


def choose(verdict: jax.Array, new: Any, old: Any) -> Any:
  """The new tree if the update is fine, else the old one."""
  return jax.tree.map(lambda a, b: jnp.where(verdict == FINE, a, b), new, old)

"""SIGTERM and SIGINT: a run that is asked to stop finishes its step, saves, and ends well.

Schedulers send SIGTERM some seconds before they take a machine away; people press Ctrl-C. A second signal ends the
process at once, which loses nothing that was saved.
"""

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """Whether the run was asked to stop; a context manager, during which the signals ask instead of killing."""

  def __init__(self):
    self.name = ""  # of the signal that asked, once there was one
    self._before = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is not threading.main_thread():
      return self  # Python lets only the main thread handle signals
    if jax.process_count() == 1:
      self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
    else:
      # JAX handles SIGTERM already: it tells all processes and agrees on a step. Ctrl-C takes the same way.
      self._before = {signal.SIGINT: signal.signal(signal.SIGINT, _pass_on)}
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def at(self, step: int) -> bool:
    """Whether to stop after `step` finished updates: the same answer on all processes, which must all ask."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.name = self.name or "SIGTERM"
    return bool(self.name)

  def _ask(self, number: int, frame) -> None:
    if self.name:
      # Not by an exception: threads that write a checkpoint would be waited for.
      print(f"{signal.Signals(number).name} again: leaving at once", file=sys.stderr, flush=True)
      os._exit(128 + number)
    self.name = signal.Signals(number).name


def _pass_on(number: int, frame) -> None:
  signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
  os.kill(os.getpid(), signal.SIGTERM)

"""A trace of a few updates, for xprof or TensorBoard (`*.xplane.pb`) and for ui.perfetto.dev (`*.json.gz`)."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from adaptive.config import ConfigError, require
from adaptive.training.workdir import user_errors

FOLDER = "profile"
ANNOTATION = "train"


def parse_window(text: str, steps: int) -> tuple[int, int]:
  """`START:STOP` as numbers of finished updates: those after START up to STOP are traced, so 10:13 traces three.

  Raises:
    ConfigError: not two whole numbers, empty, or not within the run's `steps`.
  """
  start, colon, stop = text.partition(":")
  if not (colon and start.isdecimal() and stop.isdecimal()):
    raise ConfigError(f"--profile={text} is not START:STOP, two numbers of updates such as 10:13")
  window = int(start), int(stop)
  require(window[0] < window[1], f"--profile={text} is empty: STOP must be larger than START")
  require(window[1] <= steps, f"--profile={text} ends after the run's last update, training.steps={steps}")
  return window


class Profiler:
  """Traces one window of a run's updates into `<workdir>/profile`; a context manager.

  Process 0 alone traces: it sees its host and all of its devices, and a second process of the same host would write
  over its files. A run that resumes inside the window traces the rest of it.

  Args:
    window: what `parse_window` returns; None traces nothing. workdir: the run's folder.
  """

  def __init__(self, window: tuple[int, int] | None, workdir: pathlib.Path):
    self._window = window if jax.process_index() == 0 else None
    self.folder = pathlib.Path(workdir) / FOLDER
    self._tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    if self._tracing:  # the run died inside the window: what there is may show why
      with contextlib.suppress(Exception):  # which would hide the error that is on its way
        self._stop()

  @contextlib.contextmanager
  def step(self, finished: int, state: Any) -> Iterator[None]:
    """Surrounds the dispatch of the update that follows `finished` ones; starts the trace when the window begins.

    It waits for `state`, the results of those, before it starts: the devices may be behind by more than an update.
    In the trace the update is `train` with its number, `step_num`, as the log counts: finished + 1.

    Raises:
      ConfigError: the trace's folder cannot be made.
    """
    if self._window and self._window[0] <= finished < self._window[1]:
      self._start(state)
      with jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=finished + 1):
        yield
    else:
      yield

  def done(self, finished: int, state: Any) -> str | None:
    """After the dispatch of update number `finished`, whose results are `state`: ends the trace when the window does.

    Waits for the devices first, so that all of the window's work is in the trace.

    Returns:
      A line for the user when a trace was written.
    """
    if not (self._tracing and finished >= self._window[1]):
      return None
    jax.block_until_ready(state)
    self._stop()
    return f"wrote a trace of updates {self._window[0] + 1} to {finished} to {self.folder}"

  def _start(self, state: Any) -> None:
    if self._tracing:
      return
    with user_errors(f"cannot write {self.folder}"):
      self.folder.mkdir(parents=True, exist_ok=True)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a call of Python is dearer to trace than to make: the steps would be other steps
    jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True, profiler_options=options)
    self._tracing = True

  def _stop(self) -> None:
    self._tracing = False
    jax.profiler.stop_trace()

"""What a run measures: where the numbers go, and what the user sees while it trains.

Metrics of a step are a dict name -> (sum, count) of scalar arrays. Sums and counts add up over micro-batches and hosts,
so a mean taken at the end is exact however unevenly the tokens were spread.
"""

import collections
import contextlib
import importlib
import json
import math
import pathlib
import secrets
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
import tqdm

from adaptive.config import ConfigError, TrainingConfig
from adaptive.training.peak import Peak
from adaptive.training.workdir import trim_json_lines, user_errors, write_atomically

Metrics = Mapping[str, tuple[jax.Array, jax.Array]]
METRICS_FILE = "metrics.jsonl"


def mean(metrics: Metrics) -> dict[str, float]:
  """Sum over count of every metric, NaN where nothing was counted. Waits for the device."""
  pairs = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(metrics)).items()}
  return {name: total / count if count else math.nan for name, (total, count) in pairs.items()}


class Delayed:
  """Hands out a step's metrics one step late, so that the next step is under way when the host asks for them."""

  def __init__(self):
    self._held = None

  def push(self, step: int, metrics: Metrics) -> tuple[int, Metrics] | None:
    """Takes the metrics of the step just started; returns (step, metrics) of the one before, None the first time."""
    jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
    previous, self._held = self._held, (step, metrics)
    return previous

  def flush(self) -> tuple[int, Metrics] | None:
    """Returns what is held. Due before every checkpoint: a resumed run does not measure the saved step again."""
    previous, self._held = self._held, None
    return previous


class Writers:
  """Every writer of a run as one; a context manager. A writer has `write(step, scalars)` and `close()`."""

  def __init__(self, writers: list[Any]):
    self._writers = writers

  def __enter__(self) -> "Writers":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Records numbers that belong to `step` finished updates."""
    for writer in self._writers:
      writer.write(step, scalars)

  def close(self) -> None:
    with contextlib.ExitStack() as stack:  # one that fails leaves none open
      for writer in self._writers:
        stack.callback(writer.close)


def open_writers(
  workdir: pathlib.Path, training: TrainingConfig, resumed_step: int | None, config: Mapping[str, Any]
) -> Writers:
  """The writers that the config asks for; none on processes other than 0.

  Args:
    workdir, training: `training.tensorboard` and `training.wandb` add writers beside `metrics.jsonl`.
    resumed_step: of the checkpoint that the run goes on from, None when it starts anew.
    config: nested dict, shown beside the run in Weights & Biases.

  Raises:
    ConfigError: a writer's package is not installed, or the workdir cannot be written.
  """
  if jax.process_index() != 0:
    return Writers([])
  tensorboard = _extra("tensorboardX", "tensorboard", "training.tensorboard") if training.tensorboard else None
  wandb = _extra("wandb", "wandb", "training.wandb") if training.wandb else None
  writers: list[Any] = [JsonLines(workdir / METRICS_FILE, resumed_step)]  # last: it cuts lines, and the above may raise
  if tensorboard:
    writers.append(TensorBoard(tensorboard, workdir / "tensorboard", resumed_step))
  if wandb:
    writers.append(Wandb(wandb, training.wandb, workdir, config))
  return Writers(writers)


class JsonLines:
  """One JSON object per line: step, time, then the scalars; NaN and infinities become null.

  `time` is in seconds since the run began; a resumed run counts on from the last line it keeps.
  """

  def __init__(self, path: pathlib.Path, resumed_step: int | None):
    self._path = path
    last = trim_json_lines(path, resumed_step)
    self._start = time.monotonic() - (last or {}).get("time", 0.0)
    with user_errors(f"cannot write {path}"):
      self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    line = {"step": step, "time": round(time.monotonic() - self._start, 3)}
    line |= {name: _jsonable(value) for name, value in scalars.items()}
    with user_errors(f"cannot write {self._path}"):
      self._file.write(json.dumps(line, allow_nan=False) + "\n")
      self._file.flush()

  def close(self) -> None:
    with user_errors(f"cannot write {self._path}"):
      self._file.close()


def _jsonable(value: Any) -> int | float | None:
  if isinstance(value, int):
    return value
  return float(value) if math.isfinite(value) else None


class TensorBoard:
  """Event files; on resume TensorBoard hides what a killed run wrote after its last checkpoint."""

  def __init__(self, module: types.ModuleType, folder: pathlib.Path, resumed_step: int | None):
    self._folder = folder
    with user_errors(f"cannot write {folder}"):
      self._writer = module.SummaryWriter(str(folder), purge_step=0 if resumed_step is None else resumed_step + 1)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    with user_errors(f"cannot write {self._folder}"):
      for name, value in scalars.items():
        self._writer.add_scalar(name, float(value), step)
      self._writer.flush()

  def close(self) -> None:
    with user_errors(f"cannot write {self._folder}"):
      self._writer.close()


class Wandb:
  """Weights & Biases. A resumed run keeps its id and its plots; steps that were reported already are ignored there."""

  def __init__(self, module: types.ModuleType, project: str, workdir: pathlib.Path, config: Mapping[str, Any]):
    id_file = workdir / "wandb_id.txt"
    if not id_file.exists():
      write_atomically(id_file, secrets.token_hex(4))
    run = {"id": id_file.read_text(encoding="utf-8"), "name": workdir.name, "config": dict(config)}
    self._run = module.init(project=project, dir=str(workdir), resume="allow", **run)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    self._run.finish()


def _extra(module: str, extra: str, setting: str) -> types.ModuleType:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ConfigError(f"{setting} needs {module}: pip install -e '.[{extra}]'") from error


class Progress:
  """Step, loss, tokens per second, FLOP/s and time left; a context manager. Processes other than 0 show nothing.

  On a terminal this is a bar; elsewhere (a log file, a CI job) one line every `interval` seconds and one at the end.
  The rate is that of the last `_WINDOW` updates. Counting begins when the first step is done, so compiling is left out.

  Args:
    steps, first_step: updates in the whole run, and those finished when this process began.
    peak: what the devices could do; None shows no FLOP/s.
    stream, interval, clock: where to show it (None: stderr), and seconds.
  """

  _WINDOW = 50

  def __init__(
    self, steps: int, first_step: int = 0, peak: Peak | None = None, stream: TextIO | None = None,
    interval: float = 10.0, clock: Callable[[], float] = time.monotonic,
  ):  # fmt: skip
    self._peak, self._flops = peak, 0.0
    self._steps, self._stream, self._interval, self._clock = steps, stream or sys.stderr, interval, clock
    self._marks = collections.deque(maxlen=self._WINDOW + 1)  # (seconds, tokens so far, step, FLOPs so far)
    self._tokens, self._line, self._numbers, self._printed_at = 0, "", "", -math.inf
    self._show, self._bar = jax.process_index() == 0, None
    if self._show and self._stream.isatty():
      layout = "{n_fmt}/{total_fmt} |{bar}| {postfix}"
      self._bar = tqdm.tqdm(total=steps, initial=first_step, file=self._stream, bar_format=layout, dynamic_ncols=True)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  @property
  def tokens_per_second(self) -> float:
    """Over the recent window; NaN until two steps are done."""
    return self._per_second(1)

  @property
  def flops_per_second(self) -> float:
    """Over the same window; NaN until two steps are done."""
    return self._per_second(3)

  def update(self, step: int, tokens: int, loss: float, flops: float = 0.0, skipped: int = 0) -> None:
    """Takes the finished updates, tokens and FLOPs since the last call, the loss, and all updates skipped so far.

    Called once per step.
    """
    self._tokens += tokens
    self._flops += flops
    self._marks.append((self._clock(), self._tokens, step, self._flops))
    numbers = [f"loss {loss:.4f}"]
    if len(self._marks) > 1:
      left = tqdm.tqdm.format_interval((self._steps - step) / max(self._per_second(2), 1e-9))
      achieved = [self._peak.describe(self.flops_per_second)] if self._peak else []
      numbers += [f"{self.tokens_per_second:,.0f} tokens/s", *achieved, f"{left} left"]
    numbers += [f"{skipped} skipped"] if skipped else []
    self._numbers = "  ".join(numbers)
    if self._bar is not None:
      self._bar.set_postfix_str(self._numbers, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    self._line = f"step {step}/{self._steps}  {self._numbers}"
    if self._clock() - self._printed_at >= self._interval:
      self._print_line()

  def waits(self, text: str) -> None:
    """Shows what the next step waits for, until `restart_rate`."""
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    elif self._clock() - self._printed_at >= self._interval:
      self._print(text)

  def restart_rate(self) -> None:
    """Forgets the window: for after an evaluation, whose time should not count as training's."""
    self._marks.clear()
    if self._bar is not None:
      self._bar.set_postfix_str(self._numbers)

  def message(self, text: str) -> None:
    """Shows a line without breaking the bar."""
    if self._show:
      tqdm.tqdm.write(text, file=self._stream)

  def close(self) -> None:
    """Shows the last state."""
    if self._bar is not None:
      self._bar.close()
    elif self._line:
      self._print_line()

  def _per_second(self, column: int) -> float:
    if len(self._marks) < 2:
      return math.nan
    first, last = self._marks[0], self._marks[-1]
    return (last[column] - first[column]) / max(last[0] - first[0], 1e-9)

  def _print_line(self) -> None:
    self._print(self._line)
    self._line = ""

  def _print(self, line: str) -> None:
    if self._show:
      print(line, file=self._stream, flush=True)
    self._printed_at = self._clock()

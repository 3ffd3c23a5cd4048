"""A folder in which tests run the programs as users do, in processes of their own."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import tiny_run

ROOT = pathlib.Path(__file__).parent.parent

CONFIG = """
from adaptive import methods


def get_config(variant=""):
  config = methods.default_config("sorted_net")
  config.model.update({model})
  config.method.update(depths=(1, 2), d_ff=(16, 32))
  config.data.update(source="files", path={data!r}, seq_len=32, batch_size=8)
  config.training.update(steps=8, log_every=1)
  config.training.optimizer.update(warmup_steps=1, learning_rate=1e-2)
  config.evaluation.update(rows=8, batch_size=8, latency_repeats=5, prefill_tokens=8)
  return config
"""


class Place:
  """A folder with a corpus and a config, and a way to run the programs in it."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    text = CONFIG.format(model=tiny_run.MODEL, data=tiny_run.corpus(folder / "corpus"))
    self.config = self.write("tiny.py", text)
    self.train = ["train.py", f"--config={self.config}"]
    self.environment = {
      **os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PLATFORMS": "cpu",
    }  # fmt: skip

  def write(self, name: str, content: str | bytes) -> str:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)

  def run(self, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done

  def run_many(self, commands: dict[str, list[str]]) -> dict[str, dict]:
    done = subprocess.run(
      [sys.executable, "tests/command_lines.py"], input=json.dumps(commands), cwd=ROOT, env=self.environment,
      capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  @contextlib.contextmanager
  def started(self, *arguments: str, before: Callable[[], None] = lambda: None) -> Iterator[subprocess.Popen]:
    """A program under way, which calls `before` when it is born; killed at the end if it has not ended."""
    process = subprocess.Popen(
      [sys.executable, *map(str, arguments)], cwd=ROOT, env=self.environment, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, preexec_fn=lambda: (_heed_interrupts(), before()),
    )  # fmt: skip
    try:
      yield process
    finally:
      process.kill()
      process.communicate()


def _heed_interrupts() -> None:
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # the jobs of a script ignore Ctrl-C, and so do their children


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 200) -> None:
  """Fails when the process ends first, or after some time."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, "waited too long"
    time.sleep(0.002)


def newest_checkpoint(workdir: pathlib.Path) -> int:
  """Step of the newest folder under its final name; 0 when there is none."""
  folder = workdir / "checkpoints"
  return max((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), default=0) if folder.is_dir() else 0

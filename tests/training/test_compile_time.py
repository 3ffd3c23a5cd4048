"""What was compiled, and what came from the cache; a second start of a config compiles nothing that takes long."""

import collections
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from caches import cache_in

from adaptive import config_dict
from adaptive.methods import parse_config
from adaptive.training.compile_time import CompileTime

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def _cache(tmp_path):
  with cache_in(tmp_path):
    yield


def program(name):
  """A jitted function that no one compiled in this process yet, the same to the persistent cache."""

  def run(x):
    return jnp.tanh(x) * 3.0

  run.__name__ = name
  return jax.jit(run)


@pytest.mark.usefixtures("_cache")
def test_programs_are_compiled_once_and_come_from_the_cache_after():
  x = jax.block_until_ready(jnp.ones(7))
  with CompileTime() as first:
    program("early")(x)
    program("late")(x)
  assert [name.removeprefix("jit(").rstrip(")") for name, _ in first.compiled] == ["early", "late"]
  assert first.cached == []
  assert first.seconds == sum(seconds for _, seconds in first.compiled) > 0
  assert first.slow(0.0) == [name for name, _ in first.compiled]
  assert first.slow(1e9) == []
  with CompileTime() as second:
    program("late")(x)
    program("new")(x)
  assert [*second.cached, *(name for name, _ in second.compiled)] == [
    first.compiled[1][0], first.compiled[1][0].replace("late", "new"),
  ]  # fmt: skip
  assert str(second) == f"compiled 1 programs in {second.seconds:.1f} s, 1 more came from the cache"
  assert second.metrics() == {"compile_seconds": second.seconds, "programs_compiled": 1, "programs_from_cache": 1}


def test_nothing_is_counted_before_and_after_and_twice():
  x = jax.block_until_ready(jnp.ones(5))
  with CompileTime() as outer:
    with CompileTime() as inner:
      program("one")(x)
    program("two")(x)
  program("three")(x)
  assert (len(inner.compiled), len(outer.compiled)) == (1, 2)


@pytest.mark.usefixtures("_cache")
def test_a_program_from_the_cache_is_told_apart_when_another_thread_compiles():
  x = jax.block_until_ready(jnp.ones(9))
  program("known")(x)
  with CompileTime() as found:
    jax.monitoring.record_event("/jax/compilation_cache/cache_hits")  # this thread is about to read "known"
    other = threading.Thread(target=program("unknown"), args=(x,))
    other.start()
    other.join()
    program("known")(x)
  assert (len(found.compiled), len(found.cached)) == (1, 1)
  assert "unknown" in found.compiled[0][0]


WATCHED = """
import json, runpy, sys
from adaptive.training.compile_time import CompileTime
with CompileTime() as found:
  try:
    runpy.run_path("train.py", run_name="__main__")
  except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps({"compiled": found.compiled, "cached": found.cached}))
"""

CONFIG = """
import json
from adaptive import methods


def get_config():
  config = methods.default_config("sorted_net")
  config.update(json.loads({fields!r}))
  return config
"""


@pytest.mark.slow
def test_a_second_start_of_a_config_compiles_nothing_that_takes_long(tmp_path):
  """Programs under the cache's threshold of a fifth of a second are not kept; those of twice that surely are."""
  config = tiny_run.config(tiny_run.corpus(tmp_path / "corpus"), "sorted_net", **{"training.steps": 2})
  fields = json.loads(config_dict.to_json(parse_config(config)[1], "sorted_net"))
  (tmp_path / "tiny.py").write_text(CONFIG.format(fields=json.dumps(fields)))
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)

  def start(workdir):
    command = [sys.executable, "-c", WATCHED, f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / workdir}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

  first, second = start("one"), start("two")
  slow = collections.Counter(name for name, seconds in first["compiled"] if seconds > 0.4)
  assert "jit(step)" in dict(first["compiled"])  # which may be quick on a quick machine
  # By name and number: a small program that is compiled again may carry the name of a large one.
  assert slow <= collections.Counter(second["cached"])
  assert sum(seconds for _, seconds in second["compiled"]) < sum(seconds for _, seconds in first["compiled"]) / 2

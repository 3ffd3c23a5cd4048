"""What the command-line programs share: one-line errors, joining other processes, and the compilation cache."""

import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, logging
from absl import flags as absl_flags

from adaptive import cluster
from adaptive.config import ConfigError, RunStopped, nearest

STOPPED = 1
USER_ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141

_DISTRIBUTED = absl_flags.DEFINE_bool(
  "distributed", None, "Be one of several processes; by default, when the environment says so (Slurm, GKE, Open MPI)."
)
_COORDINATOR = absl_flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where no launcher tells.")
_PROCESSES = absl_flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS = absl_flags.DEFINE_integer("process_id", None, "Which of them this one is.", lower_bound=0)
_JOIN_TIMEOUT = absl_flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all to start.", lower_bound=1)
_HEARTBEAT = absl_flags.DEFINE_integer(
  "heartbeat_timeout", 60, "Seconds of silence after which a process counts as lost, and all end.", lower_bound=1
)


def run(main: Callable[[list[str]], None], saves_on_sigterm: bool = False) -> None:
  """Runs `main(argv)`; what the user can mend is told in one line on stderr, with exit code 2.

  Args:
    saves_on_sigterm: whether `main` deals with SIGTERM; it kills otherwise.
  """

  def guarded(argv: list[str]) -> None:
    if "--verbosity" not in " ".join(sys.argv):
      logging.set_verbosity(logging.WARNING)  # absl's default lets jax tell which devices are not there
    try:
      _join_others(saves_on_sigterm)
      main(argv)
    except ConfigError as error:
      fail(str(error), at_once=error.leaves_threads)
    except RunStopped as error:
      fail(str(error), STOPPED)
    except BrokenPipeError:  # who read the output, such as head, has what it wanted
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
      sys.exit(PIPE_CLOSED)
    except KeyboardInterrupt:
      # Not sys.exit: at exit Python waits for threads, and one that was reading or writing may never end.
      print("interrupted", file=sys.stderr, flush=True)
      os._exit(INTERRUPTED)

  app.run(guarded, flags_parser=_parse_flags)


def fail(message: str, code: int = USER_ERROR, at_once: bool = False) -> None:
  """Ends the program with a one-line error; `at_once` waits for no thread."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
  # Other processes may be waiting for this one, which would wait for them at exit.
  if at_once or jax.distributed.is_initialized():
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def _join_others(saves_on_sigterm: bool) -> None:
  """Joins the other processes when flags or the environment say that there are any."""
  address = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  given = any(value is not None for value in address)
  if _DISTRIBUTED.value is False and given:
    fail("--nodistributed does not go with --coordinator_address, --num_processes or --process_id")
  several = given or cluster.launched_as_one_of_many() if _DISTRIBUTED.value is None else _DISTRIBUTED.value
  if several:
    timeouts = dict(timeout=_JOIN_TIMEOUT.value, heartbeat_timeout=_HEARTBEAT.value)
    cluster.join(*address, **timeouts, heed_preemption=saves_on_sigterm)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    rest = absl_flags.FLAGS(argv)
    if "config" in absl_flags.FLAGS and absl_flags.FLAGS["config"].present:
      # A file that is not there raises at the first look at what it should have given.
      if not hasattr(absl_flags.FLAGS["config"].value, "keys"):
        fail(f"{_config_path(argv)}: get_config() returned no config")
    return rest
  except Exception as error:
    config = _load_config(argv)  # tells of the file, if that is where the trouble lies
    fail(_unknown_field(argv, config) or str(error))


def _config_path(argv: list[str]) -> str | None:
  """The value of --config, which may end with an argument of `get_config`, as in configs/x.py:small."""
  for argument, following in zip(argv[1:], [*argv[2:], None]):
    name, equals, value = argument.lstrip("-").partition("=")
    if argument.startswith("-") and name == "config":
      return value if equals else following
  return None


def _load_config(argv: list[str]) -> Any:
  """What the config file returns; None without one. Ends the program if the file cannot be read, or raises."""
  path, _, variant = (_config_path(argv) or "").partition(":")
  if not path:
    return None
  try:
    return runpy.run_path(path)["get_config"](*([variant] if variant else []))
  except OSError as error:
    fail(f"config file {path}: {error.strerror or error}")
  except SyntaxError as error:
    fail(f"{path}, line {error.lineno}: {error.msg}")
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    fail(f"{path}, line {lines[-1]}: {_in_config_file(error)}" if lines else f"{path} has no function get_config")


def _in_config_file(error: Exception) -> str:
  """ml_collections tells of an unknown field by listing all known ones, over several lines."""
  text = str(error.args[0] if error.args else error)
  found = re.search(r'Did you mean "(.+)" instead of "(.+)"\?', text)
  if found:
    return f"unknown config field {found[2]}; did you mean {found[1]}?"
  return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _unknown_field(argv: list[str], config: Any) -> str | None:
  """The first override of an unknown field, and the field nearest to it; None when that was not the trouble."""
  for argument in argv[1:]:
    name = argument.lstrip("-").split("=")[0]
    if not name.startswith("config.") or config is None:
      continue
    place, prefix = config, "config."
    for part in name.split(".")[1:]:
      fields = list(place.keys()) if hasattr(place, "keys") else []
      if part not in fields:
        return f"unknown config field {prefix}{part}; {nearest(part, fields, prefix)}"
      place, prefix = place[part], f"{prefix}{part}."
  return None


def use_compilation_cache(workdir: str, chosen: str = "") -> None:
  """Keeps compiled programs in the chosen folder, or beside the workdir, unless JAX_COMPILATION_CACHE_DIR names one."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    folder = chosen or pathlib.Path(workdir).absolute().parent / ".compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

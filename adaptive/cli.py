"""What the command-line programs share: one-line errors, and the compilation cache."""

import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app
from absl import flags as absl_flags
from absl import logging

from adaptive.config import ConfigError, nearest

USER_ERROR = 2


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main(argv)`; what the user can mend is told in one line on stderr, with exit code 2."""

  absl_flags.FLAGS.set_default("verbosity", logging.WARNING)  # jax tells at level INFO which devices are not there

  def guarded(argv: list[str]) -> None:
    try:
      main(argv)
    except ConfigError as error:
      fail(str(error))

  app.run(guarded, flags_parser=_parse_flags)


def fail(message: str) -> None:
  """Ends the program with a one-line error."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(USER_ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return absl_flags.FLAGS(argv)
  except ConfigError as error:  # raised inside a config file
    fail(str(error))
  except (AttributeError, KeyError) as error:  # an override of a field that is not there
    fail(_unknown_field(argv) or str(error.args[0] if error.args else error))
  except (absl_flags.Error, TypeError, ValueError, OSError, SyntaxError) as error:
    fail(str(error))


def _unknown_field(argv: list[str]) -> str | None:
  """The first override of an unknown field, and the field nearest to it; None when that was not the trouble."""
  config = absl_flags.FLAGS["config"].value if "config" in absl_flags.FLAGS else None
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


def use_compilation_cache(workdir: str) -> None:
  """Keeps compiled programs beside the workdir, unless JAX_COMPILATION_CACHE_DIR names a place."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(workdir).absolute().parent / ".compilation_cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

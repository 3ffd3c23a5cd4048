"""Runs many command lines of the programs, each in a process of its own that starts with the imports done.

Reads {name: [program, argument, ...]} as JSON from stdin and prints {name: {code, out, err, compiled}}. The imports
take most of a short command's time, so they are done once and every command is a fork; no backend of JAX has been
started by then. `compiled` says whether XLA was asked to compile anything, or a backend's devices were used.
"""

import json
import os
import pathlib
import runpy
import sys
import tempfile
import traceback
import warnings

import jax

import adaptive.training.completion
import adaptive.training.dry_run
import adaptive.training.loop
import adaptive.training.reports  # noqa: F401 - loaded for the commands

warnings.simplefilter("ignore")  # jax warns of any fork
compiled = []


def note(name: str, seconds: float, **_) -> None:
  if "backend_compile" in name:
    compiled.append(name)


jax.monitoring.register_event_duration_secs_listener(note)


def run(arguments: list[str]) -> int:
  sys.argv = arguments
  try:
    runpy.run_path(arguments[0], run_name="__main__")
  except SystemExit as stop:
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def main() -> None:
  results = {}
  for name, arguments in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory() as folder:
      out, err, told = (os.path.join(folder, file) for file in ("out", "err", "told"))
      child = os.fork()
      if child == 0:
        for path, descriptor in ((out, 1), (err, 2)):
          os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
        code = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        with open(told, "w") as file:
          file.write(str(len(compiled)))
        os._exit(code)
      code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
      texts = {key: pathlib.Path(path).read_text() for key, path in (("out", out), ("err", err))}
      count = pathlib.Path(told).read_text() if os.path.exists(told) else "killed"
      results[name] = {"code": code, **texts, "compiled": count != "0"}
  print(json.dumps(results))


main()

"""The folder of one run: which config and which library versions produced what lies in it."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jax

from adaptive.config import ConfigError, require
from adaptive.config_dict import differences, to_json
from adaptive.methods import parse_config

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"
LOCK_FILE = ".lock"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "adaptive")
_FIELDS_SHOWN = 3
# Which batch a step reads, and what a checkpoint fits.
_FIXED = ("data.", "seed:", "model.", "method", "training.optimizer.name:", "training.optimizer.mu_dtype:")


def open_workdir(path: str | os.PathLike, config_json: str, change: bool = False) -> pathlib.Path:
  """Creates the workdir, or makes sure that the existing one belongs to this config.

  Only process 0 looks and writes; the others get the path, so a folder that they cannot see is no error.

  Args:
    path: a folder; relative paths are relative to the current directory.
    config_json: the experiment, as `adaptive.config_dict.to_json` writes it.
    change: take this config where it differs from the workdir's; `keep_config` writes it once it is known to work.
      What says which batch a step reads, and what a checkpoint fits, may not be changed.

  Returns:
    The folder as an absolute path.

  Raises:
    ConfigError: the folder cannot be written, holds something else, or belongs to another config. Fields that do not
      change what is learned (`adaptive.config_dict.differences`) may differ; the file keeps their first values.
  """
  require("://" not in str(path), f"--workdir {path} is an address; it must be a folder of a mounted file system")
  folder = pathlib.Path(path).absolute()
  if jax.process_index() != 0:
    return folder
  with user_errors(f"cannot use {path} as workdir"):
    folder.mkdir(parents=True, exist_ok=True)
    contents = {entry.name for entry in folder.iterdir()}
  if CONFIG_FILE in contents:
    _check_same(path, load_config(path), json.loads(config_json), change)
  else:
    # Hidden files do not count: a run killed inside write_atomically leaves one, and file managers do too.
    foreign = sorted(name for name in contents if not name.startswith("."))
    require(not foreign, f"{path} is not empty and holds no {CONFIG_FILE}; choose another --workdir")
    write_atomically(folder / CONFIG_FILE, config_json)
  if VERSIONS_FILE not in contents:
    write_atomically(folder / VERSIONS_FILE, json.dumps(versions(), indent=2) + "\n")
  return folder


def keep_config(folder: pathlib.Path, config_json: str) -> None:
  """Makes this the workdir's config, and says what changed. Raises ConfigError if it cannot be written."""
  if jax.process_index() != 0:
    return
  for difference in differences(_completed(load_config(folder)), json.loads(config_json)):
    print(f"changed: {difference}", file=sys.stderr)
  write_atomically(folder / CONFIG_FILE, config_json)


@contextlib.contextmanager
def in_use(folder: pathlib.Path) -> Iterator[None]:
  """Marks a workdir as this run's while it trains. The mark is a file lock, which goes with the process that held it.

  Raises:
    ConfigError: another live run has it.
  """
  if jax.process_index() != 0:
    yield
    return
  with user_errors(f"cannot write {folder / LOCK_FILE}"):
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ConfigError(f"{folder} is in use by another run ({file.read().strip() or 'it has just begun'})") from None
    except OSError as error:  # a file system without locks, as some mounted buckets are
      print(f"warning: cannot tell whether another run uses {folder}: {error.strerror}", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def load_config(path: str | os.PathLike) -> dict[str, Any]:
  """The config that a workdir holds, as a nested dict.

  Raises:
    ConfigError: no such folder, no `config.json` in it, or one that is not JSON.
  """
  file = pathlib.Path(path) / CONFIG_FILE
  require(file.is_file(), f"{path} is not a workdir: it holds no {CONFIG_FILE}")
  with user_errors(f"cannot read {file}"):
    text = file.read_text(encoding="utf-8")
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ConfigError(f"{file} is not valid JSON (line {error.lineno}): {error.msg}") from error


def versions() -> dict[str, str]:
  """What a result may depend on beside the config: library versions, platform and kind of device."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "not installed"  # adaptive itself, when it runs from a checkout
  return found | {"platform": platform.platform(), "device_kind": jax.devices()[0].device_kind}


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a text file that a kill leaves either as it was or complete.

  Raises:
    ConfigError: the file cannot be written.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  with user_errors(f"cannot write {path}"):
    with temporary.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)


def trim_json_lines(path: pathlib.Path, step: int | None) -> dict[str, Any] | None:
  """Drops from a JSON-lines file, if there is one, lines of steps after `step` (None: all) and a torn last line.

  Returns the last line that stays, None if there is none. Raises ConfigError if the file cannot be read or written.
  """
  if not path.exists():
    return None
  with user_errors(f"cannot read {path}"):
    text = path.read_text(encoding="utf-8", errors="replace")
  parsed = [(line, _parse(line)) for line in text.split("\n")]  # a torn line is no JSON
  kept = [(line, fields) for line, fields in parsed if fields and step is not None and fields["step"] <= step]
  new = "".join(line + "\n" for line, _ in kept)
  if new != text:
    write_atomically(path, new)
  return kept[-1][1] if kept else None


def _parse(line: str) -> dict[str, Any] | None:
  try:
    fields = json.loads(line)
  except json.JSONDecodeError:
    return None
  return fields if isinstance(fields, dict) and isinstance(fields.get("step"), int) else None


@contextlib.contextmanager
def user_errors(what: str) -> Iterator[None]:
  """Turns an OSError (permissions, full disk) into a ConfigError that begins with `what`."""
  try:
    yield
  except OSError as error:
    raise ConfigError(f"{what}: {error.strerror or error}") from error


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
  """A saved config with the defaults of fields that came later, so that they do not lock out older workdirs."""
  try:
    return json.loads(to_json(parse_config(saved)[1], saved["method"]["name"]))
  except ConfigError:
    return saved  # of a version that differs by more than that: let the differences show


def _check_same(path: str | os.PathLike, saved: dict[str, Any], wanted: dict[str, Any], change: bool) -> None:
  different = differences(_completed(saved), wanted)
  fixed = [difference for difference in different if difference.startswith(_FIXED)]
  if change and not fixed:
    return
  shown = "; ".join((fixed if change else different)[:_FIELDS_SHOWN])
  more = f" (and {len(different) - _FIELDS_SHOWN} more)" if len(different) > _FIELDS_SHOWN else ""
  ways = "which cannot be changed within a run" if change else "choose another --workdir, or --change_config"
  require(not different, f"{path} holds another config: {shown}{more}; {ways}")

"""Whether the files of a checkpoint are those that were written: hashes beside them.

Orbax makes a folder appear whole or not at all, but restores a flipped bit without a word. A manifest, written when the
folder is complete and looked at before it is read, names every file that changed since. A folder without one is not
finished: its run died between Orbax's last file and the manifest, or a copy of it was cut short.
"""

import hashlib
import json
import pathlib
import threading

from adaptive.training.workdir import write_atomically

MANIFEST = "sha256.json"


def write(folder: pathlib.Path) -> None:
  """Records size and sha256 of every file below the folder.

  Raises:
    ConfigError: the manifest cannot be written. OSError: a file cannot be read.
  """
  found = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in _files(folder)}
  write_atomically(folder / MANIFEST, json.dumps(found, indent=1) + "\n")


def is_there(folder: pathlib.Path) -> bool:
  """Whether the folder was finished: it has a manifest."""
  return (folder / MANIFEST).exists()


def problem(folder: pathlib.Path, part: int = 0, parts: int = 1) -> str | None:
  """What is wrong with the folder, with the file named; None when every file is as it was written.

  Args:
    part, parts: of `parts` processes that share the reading, this one reads files number part, part + parts, ...
  """
  try:
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return f"it was not finished: {MANIFEST} is missing"
  except (OSError, ValueError) as error:
    return f"{MANIFEST} cannot be read: {error}"
  if not isinstance(recorded, dict) or not recorded:
    return f"{MANIFEST} lists no files"
  for name in sorted(recorded)[part::parts]:
    found = _file_problem(folder / name, recorded[name])
    if found:
      return f"{name} {found}"
  return None


class Sealing(threading.Thread):
  """Waits until a checkpoint's folder has its final name, then writes its manifest; off the training thread."""

  def __init__(self, folder: pathlib.Path):
    super().__init__(name="manifest", daemon=True)
    self._folder, self._over, self._error = folder, threading.Event(), None
    self.start()

  def run(self) -> None:
    try:
      while not self._folder.exists():
        if self._over.wait(0.02) and not self._folder.exists():
          return  # the save failed, and Orbax says why
      write(self._folder)
    except Exception as error:  # raised where the training waits for the save
      self._error = error

  def finish(self) -> None:
    """To be called when the save has ended. Raises what went wrong in the thread."""
    self._over.set()
    self.join()
    if self._error:
      raise self._error


def _file_problem(file: pathlib.Path, recorded: dict) -> str | None:
  try:
    size = file.stat().st_size
    if size != recorded["bytes"]:
      return f"has {size:,} bytes, {recorded['bytes']:,} were written"
    return None if _digest(file) == recorded["sha256"] else "does not hold the bytes that were written"
  except FileNotFoundError:
    return "is missing"
  except (OSError, KeyError, TypeError) as error:
    return f"cannot be checked: {error}"


def _files(folder: pathlib.Path) -> list[str]:
  """Files below the folder, by relative path, without the manifest and hidden files."""
  paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
  return sorted(path.as_posix() for path in paths if path.name != MANIFEST and not path.name.startswith("."))


def _digest(file: pathlib.Path) -> str:
  with file.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()

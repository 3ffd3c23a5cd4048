"""Documents: named texts from the standard library, from files or from TFDS, and which of them are held out."""

import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from absl import logging

from adaptive.config import ConfigError, DataConfig, require

# Test suites differ between distributions of Python (some ship none), and the rest is data tables or vendored code.
_STDLIB_SKIPPED = frozenset({
  "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "ensurepip",
  "idlelib", "turtledemo", "tkinter",
})  # fmt: skip


class Document(NamedTuple):
  """One text. `name` is a path relative to the source's root (posix separators), or split/index for TFDS."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents of both splits, neither of them empty.

  Attributes:
    train, validation: in a fixed order (by name; TFDS: as stored). Empty documents are left out.
    description: one line for the log: what was read and how much.
    fingerprint: 16 hex digits over names, contents and split; equal fingerprints mean equal data.
  """

  train: list[Document]
  validation: list[Document]
  description: str
  fingerprint: str


def load_documents(config: DataConfig) -> Corpus:
  """Reads all documents of `config.source` into memory and splits them.

  A file of `stdlib` or `files` is held out when the first byte of the sha256 of its relative path is below
  `validation_fraction * 256`: a file's side depends on nothing but its name. Where that leaves a split empty (one
  file, or a handful), every document is cut in two instead: its last `validation_fraction` (from the nearest line
  boundary on) is held out. TFDS sets bring their own splits.

  Raises:
    ConfigError: nothing to read, a file that cannot be read or decoded, or too little text for two splits.
  """
  if config.source == "tfds":
    train = _tfds_documents(config, "tfds_train_split")
    validation = _tfds_documents(config, "tfds_validation_split")
    label, unit = f"tfds {config.tfds_name}", "documents"
  else:
    if config.source == "stdlib":
      documents, label = _stdlib_documents(), f"standard library of Python {platform.python_version()}"
    else:
      documents, label = _file_documents(config), f"files {config.path}"
    train, validation = _split(documents, config)
    unit = "files"
  count = len({d.name for d in train} | {d.name for d in validation})
  megabytes = sum(len(d.text.encode()) for d in train + validation) / 1e6
  return Corpus(
    train=train,
    validation=validation,
    description=f"{label}: {count} {unit}, {megabytes:.2f} MB",
    fingerprint=fingerprint(train=train, validation=validation),
  )


def _stdlib_documents() -> list[Document]:
  """The running interpreter's own source code."""
  root = _stdlib_root()
  paths = [p for p in _walk(root, _STDLIB_SKIPPED) if p.suffix == ".py"]
  # A distributor may have added a file in another encoding; that must not stop anyone's first run.
  documents = _read_all(root, paths, skip_bad=True)
  require(bool(documents), f"data.source='stdlib': no Python source code in {str(root)!r}; use data.source='files'")
  return documents


def _stdlib_root() -> pathlib.Path:
  return pathlib.Path(sysconfig.get_paths()["stdlib"])


def _file_documents(config: DataConfig) -> list[Document]:
  """Every file below a folder, or every file that a glob matches."""
  pattern = os.path.expanduser(config.path)
  if os.path.isdir(pattern):
    root = pathlib.Path(pattern)
    paths = list(_walk(root))
    require(bool(paths), f"data.path={config.path!r}: the folder holds no files (hidden ones are not read)")
  else:
    root = _glob_root(pattern)
    # A match that does not exist is a broken link; it is kept, so that reading it fails and names it.
    matches = set(glob.glob(pattern, recursive=True))
    paths = [pathlib.Path(p) for p in matches if os.path.isfile(p) or not os.path.exists(p)]
    require(bool(paths), f"data.path={config.path!r}: no such folder, and no file matches it as a glob")
  documents = _read_all(root, paths, skip_bad=config.bad_files == "skip")
  require(bool(documents), f"data.path={config.path!r}: no text, all {len(paths)} files are empty or were skipped")
  return documents


def _glob_root(pattern: str) -> pathlib.Path:
  """The folder before a glob's first wildcard: names are relative to it, so that moving a corpus renames nothing."""
  parts = pathlib.Path(pattern).parts
  fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
  return pathlib.Path(*parts[:fixed])


def _walk(root: pathlib.Path, skipped: frozenset[str] = frozenset()) -> Iterator[pathlib.Path]:
  """Files below a folder, without hidden files and folders and those named in `skipped`."""

  def fail(error: OSError):
    raise ConfigError(f"cannot read folder {error.filename!r}: {error.strerror}") from error

  for folder, subfolders, files in os.walk(root, onerror=fail):
    subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith(".")]
    for name in files:
      path = os.path.join(folder, name)
      # Sockets and pipes are passed over. A broken link is not: reading it fails and names it.
      if not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
        yield pathlib.Path(path)


def _read_all(root: pathlib.Path, paths: Iterable[pathlib.Path], skip_bad: bool) -> list[Document]:
  """Documents sorted by name, without empty ones (which hold nothing to learn)."""
  named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
  documents = [Document(name, _read(path, skip_bad)) for name, path in named]
  empty = [document.name for document in documents if document.text == ""]
  if 0 < len(empty) < len(documents) and not root.samefile(
    _stdlib_root()
  ):  # the standard library has dozens, and nobody can mend it
    logging.warning("Left out: %d empty files below %s, such as %s", len(empty), root, empty[0])
  return [document for document in documents if document.text]


def _read(path: pathlib.Path, skip_bad: bool) -> str | None:
  """Text of a UTF-8 file, bytes unchanged (no newline translation); None for a file that is skipped."""
  try:
    return path.read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    message = f"{str(path)!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
  except OSError as error:  # gone since the folder was listed, a broken link, no permission, a bad disk
    message = f"cannot read {str(path)!r}: {error.strerror or type(error).__name__}"
  require(skip_bad, f"{message}; data.bad_files='skip' leaves such files out")
  logging.warning("Skipped: %s", message)
  return None


def _split(documents: list[Document], config: DataConfig) -> tuple[list[Document], list[Document]]:
  """(train, validation) by the hash of the name, or, where that leaves one empty, by cutting every document."""
  fraction = config.validation_fraction
  out = [held_out(os.fsencode(d.name), fraction) for d in documents]
  if any(out) and not all(out):
    train = [d for d, is_out in zip(documents, out) if not is_out]
    return train, [d for d, is_out in zip(documents, out) if is_out]
  cuts = [_cut(d.text, fraction) for d in documents]
  train = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts)]
  validation = [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts) if cut < len(d.text)]
  require(bool(validation), f"data.source={config.source!r}: too little text to hold any of it out")
  return train, validation


def held_out(name: bytes, fraction: float) -> bool:
  """Whether what has this name belongs to validation: by its hash, and by nothing else."""
  return hashlib.sha256(name).digest()[0] < round(fraction * 256)


def _cut(text: str, fraction: float) -> int:
  """Where the held-out end of a text begins: at the line start nearest to 1 - fraction of it.

  A text of one line is cut between characters; one of a single character is not cut.
  """
  target = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
  before = text.rfind("\n", 0, target) + 1
  after = text.find("\n", target) + 1
  starts = [start for start in (before, after) if 0 < start < len(text)]
  return min(starts, key=lambda start: abs(start - target), default=max(target, 1))


def _tfds_documents(config: DataConfig, split_field: str) -> list[Document]:
  """All examples of one split of a prepared TFDS set, as array_record files (read without TensorFlow)."""
  split = getattr(config, split_field)
  source = _tfds_source(config, split_field)
  documents = []
  for i in range(len(source)):
    try:
      text = _tfds_text(_tfds_example(source, i), config)
      text = text.decode("utf-8") if isinstance(text, bytes) else text
    except (UnicodeDecodeError, _Unreadable) as error:
      what = f"is not UTF-8 at offset {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
      message = f"data.tfds_name={config.tfds_name!r}: example {i} of {split!r} {what}"
      require(config.bad_files == "skip", f"{message}; data.bad_files='skip' leaves such examples out")
      logging.warning("Skipped: %s", message)
      continue
    if text:
      documents.append(Document(f"{split}/{i}", text))
  require(bool(documents), f"data.{split_field}={split!r} of {config.tfds_name!r} holds no text")
  return documents


class _Unreadable(Exception):  # noqa: N818 - of one example; the message goes on after its name
  pass


def _tfds_example(source: Any, i: int) -> Any:
  try:
    return source[i]
  except Exception as error:  # the reader of damaged or truncated files raises several kinds
    raise _Unreadable(f"cannot be read: {_first_line(error)}") from error


def _tfds_source(config: DataConfig, split_field: str) -> Any:
  """The split as a random-access sequence of examples."""
  import tensorflow_datasets as tfds  # Costs seconds, and most runs do not need it.

  name, split = config.tfds_name, getattr(config, split_field)
  try:
    builder = tfds.builder(name, data_dir=config.tfds_data_dir or None)
  except Exception as error:  # TFDS documents no common base class of what it raises.
    raise ConfigError(f"data.tfds_name={name!r}: {_first_line(error)}") from error
  require(
    bool(builder.info.splits),
    f"data.tfds_name={name!r} is not prepared in {str(builder.data_dir)!r}; prepare it with "
    "file_format='array_record', or set data.tfds_data_dir",
  )
  try:
    return builder.as_data_source(split=split)
  except NotImplementedError as error:
    message = f"data.tfds_name={name!r} is stored in a format that only TensorFlow reads"
    raise ConfigError(f"{message}; prepare it again with file_format='array_record'") from error
  except Exception as error:
    known = ", ".join(builder.info.splits)
    raise ConfigError(f"data.{split_field}={split!r} of {name!r} (it has {known}): {_first_line(error)}") from error


def _tfds_text(example: Any, config: DataConfig) -> str | bytes:
  known = sorted(example) if isinstance(example, dict) else []
  key = config.tfds_text_key
  require(key in known, f"data.tfds_text_key={key!r} is not a feature of {config.tfds_name!r}; it has {known}")
  text = example[key]
  if text is None:  # what the reader makes of a record whose bytes are gone
    raise _Unreadable("has no content: its file may be damaged")
  require(
    isinstance(text, (str, bytes)),
    f"data.tfds_text_key={key!r} of {config.tfds_name!r} is not text but {type(text).__name__}",
  )
  return text


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def fingerprint(**splits: list[Document]) -> str:
  """16 hex digits over names, contents and split."""
  digest = hashlib.sha256()
  for split, documents in splits.items():
    for name, text in documents:
      # Of fixed length each, so that no two lists of documents give the same stream of bytes.
      for part in (split.encode(), os.fsencode(name), text.encode()):
        digest.update(hashlib.sha256(part).digest())
  return digest.hexdigest()[:16]

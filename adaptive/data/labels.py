"""What a search over layer visits found for each question of a file: the labels that routers are trained on.

The first line of the file says what was searched and how, every other one what was found for one question:

    {"format": "adaptive layer visits", "version": 1, "num_layers": 4, "model": "...", "questions": "...",
     "strategy": "...", "budget": 50, "reward": "...", "seed": 0}
    {"id": "piqa/17", "default_reward": 0.0, "visits": [1, 0, 2, 1], "reward": 1.0, "evaluations": 50, "seed": 5}

Lines are written when their question is done, so a search that was killed goes on after the last of them.
"""

import dataclasses
import fcntl
import json
import math
import os
import types
from collections.abc import Mapping
from typing import Any, BinaryIO

from adaptive.config import ConfigError, require
from adaptive.data.questions import field_of, json_object, read_bytes

FORMAT, VERSION = "adaptive layer visits", 1
MOST_VISITS = 2


@dataclasses.dataclass(frozen=True)
class Header:
  """What was searched.

  Attributes:
    num_layers: of the model, and of every label. model: where it came from. questions: their file's name, and a
      fingerprint of what is in it.
    strategy: of the search. budget: evaluations of one question, at most. reward: what was looked for.
    seed: of the whole search.
  """

  num_layers: int
  model: str
  questions: str
  strategy: str
  budget: int
  reward: str
  seed: int


@dataclasses.dataclass(frozen=True)
class Label:
  """What was found for one question.

  Attributes:
    id: the question's. default_reward: of the model as it is, every layer once.
    visits: how often to run each layer, 0 to 2. reward: of those visits.
    evaluations: that it took. seed: of this question's search.
  """

  id: str
  default_reward: float
  visits: tuple[int, ...]
  reward: float
  evaluations: int
  seed: int


def read_labels(path: str) -> tuple[Header, list[Label]]:
  """Header and labels of a file, in its order; a last line that was not finished is left out.

  Raises:
    ConfigError: no such file, no header, or a line that is no label; it names the file and the line.
  """
  header, labels, _ = _read(path)
  require(header is not None, f"{path!r} holds no labels: its first line is missing")
  return header, labels


def _read(path: str) -> tuple[Header | None, list[Label], int]:
  """Header (None where not even that was finished), labels, and the bytes that finished lines take."""
  content = read_bytes(path)
  whole = content.rfind(b"\n") + 1
  header, labels = None, {}
  for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
    where = f"{path!r}, line {number}"
    found = json_object(line, where)
    if header is None:
      header = _header(found, where)
      continue
    label = _label(found, header.num_layers, where)
    require(label.id not in labels, f"{where}: there is an earlier label of the question {label.id!r}")
    labels[label.id] = label
  return header, list(labels.values()), whole


def _header(line: Mapping[str, Any], where: str) -> Header:
  require(line.get("format") == FORMAT, f"{where}: this is no label file, 'format' is not {FORMAT!r}")
  require(line.get("version") == VERSION, f"{where}: 'version' is {line.get('version')!r}, not {VERSION}")
  header = Header(**{field.name: field_of(line, field.name, field.type, where) for field in dataclasses.fields(Header)})
  require(header.num_layers >= 1, f"{where}: 'num_layers' must be at least 1, not {header.num_layers}")
  return header


def _label(line: Mapping[str, Any], num_layers: int, where: str) -> Label:
  visits = field_of(line, "visits", list, where)
  right = len(visits) == num_layers and all(type(v) is int and 0 <= v <= MOST_VISITS for v in visits)
  require(right, f"{where}: 'visits' must be {num_layers} numbers of 0 .. {MOST_VISITS}, not {visits!r}")
  texts = {"id": field_of(line, "id", str, where)}
  numbers = {name: field_of(line, name, int, where) for name in ("evaluations", "seed")}
  rewards = {name: _number(line, name, where) for name in ("default_reward", "reward")}
  return Label(visits=tuple(visits), **texts, **numbers, **rewards)


def _number(line: Mapping[str, Any], name: str, where: str) -> float:
  value = line.get(name)
  return float(value) if type(value) is int else field_of(line, name, float, where)


class LabelWriter:
  """Writes a label file line by line, and goes on with one that is there: `with LabelWriter(path, header) as writer`.

  Attributes:
    done: ids of the questions that have their label.

  Raises:
    ConfigError: the file cannot be written, is damaged, or has another header.
  """

  def __init__(self, path: str, header: Header):
    self._path, self._header = os.path.expanduser(path), header
    self.done: set[str] = set()
    self._file: BinaryIO | None = None

  def __enter__(self) -> "LabelWriter":
    first = _line({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self._header)})
    try:
      os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
      self._file = open(self._path, "a+b")
    except OSError as error:
      raise ConfigError(f"cannot write {self._path!r}: {error.strerror or type(error).__name__}") from error
    try:
      self._lock()
      whole = self._done_before(first)
      self._file.truncate(whole)  # what a killed search left of its last line
      if not whole:
        self._append(first)
    except BaseException:
      self._file.close()
      raise
    return self

  def _lock(self) -> None:
    """Held until the file is closed, as that of a killed process is, too."""
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(f"another search is writing {self._path!r}") from None
    except OSError:  # a file system without locks, as some mounted buckets are
      pass

  def _done_before(self, first: bytes) -> int:
    """Bytes of the finished lines of the file that is there, and `done`."""
    found, labels, whole = _read(self._path)
    if found is None:  # nothing, or half of a first line; anything else is somebody's file
      require(first.startswith(read_bytes(self._path)), f"{self._path!r} is no label file")
      return 0
    for field in dataclasses.fields(Header):
      old, new = getattr(found, field.name), getattr(self._header, field.name)
      there = f"{self._path!r} holds labels of another search: {field.name} is {old!r} there, and {new!r} here"
      require(old == new, there)
    self.done = {label.id for label in labels}
    return whole

  def __exit__(self, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
    self._file.close()

  def write(self, label: Label) -> None:
    """Adds a label, which is in the file when this returns; ValueError for one that `read_labels` would refuse."""
    require(label.id not in self.done, f"the question {label.id!r} has its label")
    line = dataclasses.asdict(label)
    _label({**line, "visits": list(label.visits)}, self._header.num_layers, f"label of {label.id!r}")
    require(math.isfinite(label.reward + label.default_reward), f"label of {label.id!r}: a reward is not finite")
    self._append(_line(line))
    self.done.add(label.id)

  def _append(self, line: bytes) -> None:
    self._file.write(line)
    self._file.flush()


def _line(fields: Mapping[str, Any]) -> bytes:
  return json.dumps(fields).encode() + b"\n"

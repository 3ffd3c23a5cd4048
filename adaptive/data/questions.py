"""Questions with their right answers, one JSON object per line of a file.

    {"id": "piqa/17", "prompt": "Question: ...\\nAnswer:", "options": [" ...", " ..."], "answer": 0}
    {"id": "pointers/3", "prompt": "...", "answer": " 7\\n", "level": 2}

The first is multiple choice, its answer the number of the right option, from 0; the second asks for a short text. What
follows the prompt is written as it would be in the text, with the blank before it. `level` may say how difficult a
question is.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from adaptive.config import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    id: unlike any other's in its file. prompt: what stands before the answer.
    options: the texts to choose from; empty where the answer is a text of its own.
    answer: the number of the right option, or the text. level: of difficulty, where it has one.
  """

  id: str
  prompt: str
  options: tuple[str, ...]
  answer: int | str
  level: int | None = None

  @property
  def answer_text(self) -> str:
    """What a right answer writes after the prompt."""
    return self.options[self.answer] if self.options else self.answer


def read_questions(path: str) -> list[Question]:
  """The questions of a file, in its order.

  Raises:
    ConfigError: no such file, none in it, or a line that is no question; it names the file and the line.
  """
  questions: dict[str, Question] = {}
  for where, line in json_lines(path):
    question = _question(line, where)
    require(question.id not in questions, f"{where}: there is an earlier question with the id {question.id!r}")
    questions[question.id] = question
  require(bool(questions), f"{path!r} holds no questions")
  return list(questions.values())


def fingerprint(path: str) -> str:
  """A file's name and 16 hex digits of its content: the same wherever the file lies."""
  return f"{os.path.basename(path)} {hashlib.sha256(read_bytes(path)).hexdigest()[:16]}"


def json_lines(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """The objects of a JSONL file, each with the words for where it stands; blank lines are passed over.

  Raises:
    ConfigError: the file cannot be read, or a line is no JSON object.
  """
  for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
    if line.strip():
      where = f"{path!r}, line {number}"
      yield where, json_object(line, where)


def read_bytes(path: str) -> bytes:
  """All of a file; ConfigError when it cannot be read."""
  try:
    with open(os.path.expanduser(path), "rb") as file:
      return file.read()
  except OSError as error:
    raise ConfigError(f"cannot read {path!r}: {error.strerror or type(error).__name__}") from error


def json_object(line: bytes, where: str) -> Mapping[str, Any]:
  """What a line says; ConfigError when it is no JSON object."""
  try:
    found = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a mark of byte order
  except (ValueError, RecursionError) as error:  # of the first kind is what is not UTF-8, too
    raise ConfigError(f"{where} is not JSON: {error}") from error
  require(isinstance(found, dict), f"{where} is not a JSON object")
  try:
    json.dumps(found, ensure_ascii=False).encode("utf-8")
  except UnicodeEncodeError as error:  # JSON can spell out what no text can hold
    raise ConfigError(f"{where} holds half of a character") from error
  return found


def field_of(line: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
  """A field that must be there and of that type; ConfigError otherwise."""
  require(name in line, f"{where}: there is no {name!r}")
  value = line[name]
  right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
  require(right, f"{where}: {name!r} must be of type {kind.__name__}, not {value!r}")
  return value


def _question(line: Mapping[str, Any], where: str) -> Question:
  name, prompt = field_of(line, "id", str, where), field_of(line, "prompt", str, where)
  require(bool(name), f"{where}: 'id' is empty")
  require(bool(prompt.strip()), f"{where}: 'prompt' is empty")
  level = field_of(line, "level", int, where) if line.get("level") is not None else None
  if line.get("options") is None:
    answer = field_of(line, "answer", str, where)
    require(bool(answer.strip()), f"{where}: 'answer' is empty")
    return Question(name, prompt, (), answer, level)
  options = tuple(field_of(line, "options", list, where))
  written = all(isinstance(option, str) and option.strip() for option in options)
  require(len(options) >= 2 and written, f"{where}: 'options' must be two texts or more, none of them empty")
  answer = field_of(line, "answer", int, where)
  require(0 <= answer < len(options), f"{where}: 'answer'={answer} must be one of 0 .. {len(options) - 1}")
  return Question(name, prompt, options, answer, level)

"""Files of questions: what they say, and which are refused."""

import json

import pytest

from adaptive.config import ConfigError
from adaptive.data.questions import Question, read_questions

CHOICE = {"id": "piqa/17", "prompt": "Question: how?\nAnswer:", "options": [" so", " or so"], "answer": 1}
TEXT = {"id": "pointers/3", "prompt": "f = 10; 0 ->", "answer": " 1\n", "level": 2}


def write(path, *lines):
  path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
  return str(path)


def test_both_kinds_of_questions(tmp_path):
  found = read_questions(write(tmp_path / "q.jsonl", CHOICE, "", TEXT))
  assert found == [
    Question("piqa/17", "Question: how?\nAnswer:", (" so", " or so"), 1, None),
    Question("pointers/3", "f = 10; 0 ->", (), " 1\n", 2),
  ]
  assert [question.answer_text for question in found] == [" or so", " 1\n"]


def test_a_mark_of_byte_order_is_no_part_of_the_first_line(tmp_path):
  plain, marked = write(tmp_path / "q.jsonl", CHOICE, TEXT), tmp_path / "marked.jsonl"
  marked.write_text((tmp_path / "q.jsonl").read_text(), encoding="utf-8-sig")
  assert read_questions(str(marked)) == read_questions(plain)


def error_of(path):
  with pytest.raises(ConfigError) as caught:
    read_questions(str(path))
  assert "\n" not in str(caught.value)
  assert path.name in str(caught.value)
  return str(caught.value)


WRONG = {
  "'id'": {"prompt": "a", "answer": "b"},
  "'prompt' must be of type str": {**TEXT, "prompt": 3},
  "'prompt' is empty": {**TEXT, "prompt": " \n"},
  "there is no 'answer'": {"id": "a", "prompt": "b"},
  "'answer' must be of type str": {"id": "a", "prompt": "b", "answer": 3},
  "'answer' is empty": {"id": "a", "prompt": "b", "answer": " "},
  "'answer' must be of type int": {**CHOICE, "answer": " so"},
  "'answer' must be of type int, not True": {**CHOICE, "answer": True},
  "'answer'=2 must be one of 0 .. 1": {**CHOICE, "answer": 2},
  "'answer'=-1 must be": {**CHOICE, "answer": -1},
  "'options' must be of type list": {**CHOICE, "options": "a"},
  "'options' must be two texts or more": {**CHOICE, "options": [" a"], "answer": 0},
  "none of them empty": {**CHOICE, "options": [" a", ""]},
  "'level' must be of type int": {**TEXT, "level": "2"},
  "is not JSON": '{"id": ',
  "is not a JSON object": "[1]",
  "an earlier question with the id 'first'": {**TEXT, "id": "first"},
}


@pytest.mark.parametrize("message", WRONG)
def test_lines_that_are_no_questions_are_refused_by_file_and_line(tmp_path, message):
  write(tmp_path / "q.jsonl", {**TEXT, "id": "first"}, "", WRONG[message])
  said = error_of(tmp_path / "q.jsonl")
  assert message in said
  assert "line 3" in said


def test_files_without_questions_are_refused(tmp_path):
  assert "cannot read" in error_of(tmp_path / "none.jsonl")
  write(tmp_path / "empty.jsonl", "", " ")
  assert "holds no questions" in error_of(tmp_path / "empty.jsonl")
  (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
  assert "line 1 is not JSON" in error_of(tmp_path / "latin.jsonl")
  assert "cannot read" in error_of(tmp_path)

"""The scripts that make question files: what they write are questions, rightly answered, and no split knows another."""

import collections
import itertools
import json
import pathlib
import re
import subprocess
import sys

import pytest

from adaptive.data.questions import read_questions

TASKS = pathlib.Path(__file__).parents[1] / "tasks"


def run(script, folder, **options):
  command = [sys.executable, str(TASKS / script), f"--folder={folder}", *(f"--{k}={v}" for k, v in options.items())]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def made(script, folder, kind, **options):
  result = run(script, folder, kind=kind, **options)
  assert result.returncode == 0, result.stderr
  files = [folder / f"{kind}_{split}.jsonl" for split in ("train", "held_out")]
  assert result.stdout.count("wrote") == 2
  splits = [read_questions(str(file)) for file in files]
  prompts = [" ".join(question.prompt.split()) for question in itertools.chain(*splits)]
  assert len(set(prompts)) == len(prompts)
  assert len({question.id for question in itertools.chain(*splits)}) == len(prompts)
  return splits, [file.read_bytes() for file in files]


@pytest.fixture
def source(tmp_path):
  """Twenty questions, one of them twice, one without a right answer and one without any."""
  lines = [
    {"passage": f"There are {i}.", "question": f"How many{i}? ", "options": "A. three \nB. 4.5", "answer": "B. 4.5"}
    for i in range(20)
  ]
  lines += [{**lines[3], "question": "How  many3?", "answer": "A. three"}, {**lines[4], "answer": "C. no"}]
  lines.append({name: text for name, text in lines[5].items() if name != "answer"})
  (tmp_path / "source.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(tmp_path / "source.jsonl")


@pytest.mark.parametrize("kind", ["piqa", "siqa"])
def test_multiple_choice(tmp_path, source, kind):
  (train, held_out), content = made("make_questions.py", tmp_path / "a", kind, source=source, train=12, held_out=8)
  assert (len(train), len(held_out)) == (12, 8)
  for question in train + held_out:
    number = question.id.removeprefix(f"{kind}/")
    wanted = {
      "piqa": f"Question: How many{number}? \nAnswer:",
      "siqa": f"Q: There are {number}. How many{number}? \nA:",
    }
    assert question.prompt == wanted[kind]
    assert question.options == (" three", " 4.5")
    assert question.answer_text == " 4.5"
  options = dict(source=source, train=12, held_out=8)
  assert made("make_questions.py", tmp_path / "b", kind, **options)[1] == content
  assert made("make_questions.py", tmp_path / "c", kind, **options, seed=1)[1] != content
  refused = run("make_questions.py", tmp_path / "d", kind=kind, source=source, train=13, held_out=8)
  assert "has 20 questions, too few" in refused.stderr


def test_multiple_choice_with_the_fields_of_the_published_data(tmp_path):
  piqa = [{"goal": f"Do {i}?", "sol1": "this", "sol2": "that ", "label": i % 2} for i in range(4)]
  siqa = {"answerA": "x", "answerB": "y", "answerC": "z"}
  siqa = [{"context": "Ann ran.", "question": f"Why {i}?", **siqa, "label": str(i % 3 + 1)} for i in range(4)]
  (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*piqa, {**piqa[0], "label": -1}]))
  (tmp_path / "siqa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in siqa))
  for kind in ("piqa", "siqa"):
    options = dict(source=str(tmp_path / f"{kind}.jsonl"), train=3, held_out=1)
    (train, held_out), _ = made("make_questions.py", tmp_path / kind, kind, **options)
    for question in train + held_out:
      number = int(question.id.removeprefix(f"{kind}/"))
      if kind == "piqa":
        assert question.prompt == f"Question: Do {number}?\nAnswer:"
        assert (question.options, question.answer) == ((" this", " that"), number % 2)
      else:
        assert question.prompt == f"Q: Ann ran. Why {number}?\nA:"
        assert (question.options, question.answer) == ((" x", " y", " z"), number % 3)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "cannot read .*No such file"),
    ("{", "line 1 is not JSON"),
    ('{"question": "a"}', "line 1 has no field 'options'"),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": "x"}', "line 1 is not such a question"),
    ("[1]", "line 1 is not such a question"),
    ('{"goal": "a", "sol1": 3, "sol2": "c", "label": 0}', "line 1 is not such a question"),
  ],
)
def test_sources_that_cannot_be_read_are_one_line(tmp_path, text, message):
  source = tmp_path / "source.jsonl"
  if text is not None:
    source.write_text(text + "\n")
  refused = run("make_questions.py", tmp_path, kind="piqa", source=str(source), train=1, held_out=1)
  assert re.search(message, refused.stderr.splitlines()[-1])
  assert "Traceback" not in refused.stderr


def follow(prompt):
  """Every place on the way, the start too, of "0>3 ...; steps 2: 0>"."""
  table, steps, start = re.fullmatch(r"((?:\d>\d ?)+); steps (\d): (\d)>", prompt).groups()
  arrows, places = dict(arrow.split(">") for arrow in table.split()), [start]
  assert sorted(arrows) == sorted(arrows.values()) == [str(i) for i in range(len(arrows))]
  for _ in range(int(steps)):
    places.append(arrows[places[-1]])
  return places


def test_pointers(tmp_path):
  options = dict(levels="1,2,3,4", train=80, held_out=16)
  (train, held_out), content = made("make_graded.py", tmp_path / "a", "pointers", **options)
  for questions, number in ((train, 20), (held_out, 4)):
    assert collections.Counter(question.level for question in questions) == dict.fromkeys((1, 2, 3, 4), number)
  assert len({len(question.prompt) for question in train + held_out}) == 1, "the length tells nothing of the level"
  for question in train + held_out:
    places = follow(question.prompt)
    assert len(places) == len(set(places)) == question.level + 1, "no shorter way leads there"
    assert question.answer == places[-1]
  assert len({question.level for question in train[:20]}) == 4, "levels are mixed"
  assert made("make_graded.py", tmp_path / "b", "pointers", **options)[1] == content
  assert made("make_graded.py", tmp_path / "c", "pointers", **options, seed=1)[1] != content


def test_arithmetic(tmp_path):
  (train, held_out), _ = made("make_graded.py", tmp_path, "arithmetic", levels="1,3", train=60, held_out=20)
  for question in train + held_out:
    expression = question.prompt.removesuffix(" =")
    assert question.answer == f" {eval(expression) % 10}"
    assert question.level == {1: 1, 7: 3}[expression.count("(")]


def test_what_cannot_be_made_is_refused(tmp_path):
  refuse = lambda **options: run("make_graded.py", tmp_path, **options).stderr
  assert "multiples of their number, 4" in refuse(kind="pointers", train=10, held_out=4)
  assert "must be more than the highest level" in refuse(kind="pointers", levels="4", size=4, train=1, held_out=1)
  assert "no more than" in refuse(kind="arithmetic", levels="1", train=300, held_out=1)
  assert not list(tmp_path.iterdir())

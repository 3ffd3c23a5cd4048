"""search.py: label files are right, resume to the very same lines, and what cannot work is said in one line."""

import json
import pathlib

import numpy as np
import pytest
import quizzed
from caches import cache_in
from places import Place

from adaptive.config import ConfigError
from adaptive.data.labels import read_labels
from adaptive.data.questions import fingerprint, read_questions
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.search import rewards, trees, visits
from adaptive.search.scorer import PathScorer
from adaptive.training import path_search
from adaptive.training.path_search import Request
from adaptive.training.run import load_params, load_plan

LAYERS, BUDGET = 4, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Folder of a run, its questions with options and a mixture, and the parameters."""
  folder = tmp_path_factory.mktemp("place")
  with cache_in(folder / "cache"):
    train, _ = quizzed.graded(folder / "data")
    workdir = quizzed.made(folder / "run")
    files = {"texts": train, "options": quizzed.with_options(train), "both": quizzed.with_options(train, 2)}
    yield folder, workdir, files


def search(place, labels, kind="options", **changes):
  _, workdir, files = place
  path_search.search(workdir, Request(questions=files[kind], labels=str(labels), budget=BUDGET, **changes))
  return read_labels(str(labels))


def lines(path):
  return sorted(path.read_bytes().splitlines())


@pytest.fixture(scope="module")
def scored(place):
  """(kind of questions, reward, id, plan) -> the reward of a plan, by a scorer that keeps nothing."""
  _, workdir, files = place
  plan = load_plan(workdir)
  _, params = load_params(plan, workdir)
  tokens = ByteTokenizer()
  found = {}
  for kind, path in files.items():
    questions = read_questions(path)
    planted = [trees.plant(q, lambda text: tokens.encode(text).tolist(), (tokens.bos,), 64) for q in questions]
    found[kind] = questions, PathScorer(plan.experiment.model, params, planted, pairs=8, kept=0)

  def reward(kind, name, which, chosen):
    questions, scorer = found[kind]
    place = next(i for i, question in enumerate(questions) if question.id == which)
    (options,) = scorer([(place, chosen)])
    return rewards.find(name, questions)(questions[place], options)

  return reward


@pytest.mark.parametrize(
  ("kind", "reward", "strategy"),
  [
    ("options", "margin", "find_then_shrink"),
    ("both", "likelihood", "hill_climb"),
    ("options", "choice", "mcts"),
    ("texts", "exact", "greedy"),
    ("options", "choice_per_character", "random"),
  ],
)
def test_labels_are_what_they_say(place, scored, tmp_path, capsys, kind, reward, strategy):
  header, labels = search(place, tmp_path / "l.jsonl", kind, reward=reward, strategy=strategy)
  questions = read_questions(place[2][kind])
  assert (header.num_layers, header.budget, header.reward, header.strategy) == (LAYERS, BUDGET, reward, strategy)
  wanted = f"{place[1]} at step 8", fingerprint(place[2][kind]), 0
  assert (header.model, header.questions, header.seed) == wanted
  assert {label.id for label in labels} == {question.id for question in questions}
  assert len({label.seed for label in labels}) == len(labels)
  default, changed = visits.default(LAYERS), 0
  for label in labels:
    assert visits.allowed(label.visits)
    assert 1 <= label.evaluations <= BUDGET
    assert label.default_reward == pytest.approx(scored(kind, reward, label.id, default), rel=1e-5)
    assert label.reward == pytest.approx(scored(kind, reward, label.id, label.visits), rel=1e-5)
    assert label.reward >= label.default_reward
    assert label.visits == default or label.reward >= rewards.goal(reward)
    changed += label.visits != default
  assert changed > 0 or reward == "exact"  # which random parameters do not reach
  told = capsys.readouterr().out
  assert f"12 questions in {tmp_path / 'l.jsonl'}, by {strategy}, reward {reward}" in told
  counts = np.bincount(np.ravel([label.visits for label in labels]), minlength=3)
  assert f"{counts[0]} skip, {counts[1]} execute, {counts[2]} repeat" in told


@pytest.fixture(scope="module")
def whole(place):
  path = place[0] / "whole.jsonl"
  search(place, path)
  return path


@pytest.mark.parametrize("written", [0, 5, 11])
def test_a_search_that_was_cut_goes_on_to_the_same_labels(place, whole, tmp_path, monkeypatch, written):
  path, real = tmp_path / "l.jsonl", path_search.LabelWriter.write
  left = [written]

  def write(self, label):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    real(self, label)

  with monkeypatch.context() as patch:
    patch.setattr(path_search.LabelWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
      search(place, path)
  with open(path, "ab") as file:
    file.write(b'{"id": "pointers/')
  assert len(lines(path)) == 1 + written + 1
  search(place, path)
  assert lines(path) == lines(whole)


def test_a_search_that_is_done_runs_nothing_and_more_questions_are_added(place, whole, tmp_path, monkeypatch, capsys):
  path = tmp_path / "l.jsonl"
  search(place, path, limit=4)
  assert len(read_labels(str(path))[1]) == 4
  search(place, path)
  assert lines(path) == lines(whole)
  with monkeypatch.context() as patch:
    patch.setattr(path_search, "PathScorer", None)
    search(place, path)
  assert lines(path) == lines(whole)
  told = capsys.readouterr().out
  told = told[told.rindex("12 questions in") :]  # of the last search
  _, labels = read_labels(str(path))
  goal = rewards.goal(path_search.Request("", "").reward)
  right = [sum(reward >= goal for reward in each) for each in zip(*((x.default_reward, x.reward) for x in labels))]
  assert f"{right[0]:8} by the model as it is, {right[1]} by the plans found" in told
  level = {question.id: question.level for question in read_questions(place[2]["options"])}
  for one in {value for value in level.values() if value is not None}:
    mean = np.mean([sum(label.visits) for label in labels if level[label.id] == one])
    assert f"{mean:.2f} at {one}" in told


@pytest.mark.parametrize("changes", [{"width": 1}, {"width": 3}, {"width": 100}, {"together": 2, "width": 5}])
def test_the_seed_alone_decides(place, whole, tmp_path, changes):
  _, labels = search(place, tmp_path / "l.jsonl", **changes)
  _, wanted = read_labels(str(whole))
  of = lambda found: {label.id: (label.visits, label.evaluations, label.seed) for label in found}
  assert of(labels) == of(wanted)
  if "together" not in changes:  # a batch of another size may round elsewhere
    assert lines(tmp_path / "l.jsonl") == lines(whole)


def test_another_seed_searches_elsewhere(place, whole, tmp_path):
  _, labels = search(place, tmp_path / "l.jsonl", seed=1)
  _, wanted = read_labels(str(whole))
  assert {label.seed for label in labels}.isdisjoint(label.seed for label in wanted)
  assert {label.id: label.default_reward for label in labels} == {label.id: label.default_reward for label in wanted}


def test_one_plan_for_all(place, scored, tmp_path):
  header, labels = search(place, tmp_path / "l.jsonl", shared=True, reward="likelihood", strategy="hill_climb")
  assert header.strategy == "hill_climb, one plan for all"
  assert len(labels) == 12
  (chosen,) = {label.visits for label in labels}
  assert visits.allowed(chosen)
  assert len({(label.reward, label.default_reward, label.seed, label.evaluations) for label in labels}) == 1
  for plan, told in ((chosen, labels[0].reward), (visits.default(LAYERS), labels[0].default_reward)):
    each = [scored("options", "likelihood", label.id, plan) for label in labels]
    assert told == pytest.approx(np.mean(each), rel=1e-5)
  assert labels[0].reward >= labels[0].default_reward
  (tmp_path / "l.jsonl").write_bytes(b"\n".join((tmp_path / "l.jsonl").read_bytes().splitlines()[:5]) + b"\n")
  with pytest.raises(ConfigError, match="is of fewer questions"):
    search(place, tmp_path / "l.jsonl", shared=True, reward="likelihood", strategy="hill_climb")


def test_questions_that_changed_are_others(place, tmp_path):
  """The ids are as they were, and the file lies elsewhere: what counts is what is in it."""
  moved, labels = tmp_path / pathlib.Path(place[2]["options"]).name, tmp_path / "l.jsonl"
  content = pathlib.Path(place[2]["options"]).read_text()
  moved.write_text(content)
  again = lambda limit: path_search.search(place[1], Request(str(moved), str(labels), limit=limit, budget=BUDGET))
  search(place, labels, limit=2)
  again(3)
  assert len(read_labels(str(labels))[1]) == 3
  moved.write_text(content.replace("steps", "Steps"))
  with pytest.raises(ConfigError, match="holds labels of another search: questions is"):
    again(4)


@pytest.mark.parametrize("idle", [0, 2, 3])
@pytest.mark.parametrize("strategy", ["hill_climb", "greedy"])
def test_a_layer_that_does_nothing_is_left_out_for_every_question(place, tmp_path, idle, strategy):
  """Its two matrices that write to the stream are zero, so that every plan is as good without it as with it.

  It stays only where its neighbours, without which the answer is likelier, leave no other choice.
  """

  def silence(params):
    layers = params["layers"]
    attention = {**layers["attention"], "out": layers["attention"]["out"].at[idle].set(0.0)}
    mlp = {**layers["mlp"], "down": layers["mlp"]["down"].at[idle].set(0.0)}
    return {**params, "layers": {**layers, "attention": attention, "mlp": mlp}}

  workdir = quizzed.made(tmp_path / "run", change=silence)
  request = Request(
    questions=place[2]["both"], labels=str(tmp_path / "l.jsonl"), strategy=strategy, reward="likelihood", budget=40
  )
  path_search.search(workdir, request)
  _, labels = read_labels(request.labels)
  kept = np.sum([label.visits for label in labels], axis=0)
  for label in labels:
    without = (*label.visits[:idle], 0, *label.visits[idle + 1 :])
    assert label.visits[idle] == 0 or not visits.allowed(without), label
  assert kept[idle] <= 3
  assert np.delete(kept, idle).min() >= 3


@pytest.fixture(scope="module")
def told(place):
  folder, workdir, files = place
  shell = Place(folder / "shell")
  routed = quizzed.made(folder / "routed", "mixture_of_depths")
  (folder / "other.jsonl").write_bytes(b"something else\n")
  here = folder / "labels.jsonl"
  start = ["search.py", f"--workdir={workdir}", f"--questions={files['both']}"]
  command = [*start, f"--labels={here}", "--reward=margin", "--budget=6"]
  given = {
    "works": [*command, "--limit=5"],
    "again": [*command, "--limit=5"],
    "another search": [*command, "--budget=7"],
    "somebody's file": [*start, f"--labels={folder / 'other.jsonl'}"],
    "strategy": [*command, "--strategy=luck"],
    "reward": [*command, "--reward=luck"],
    "choice": [*command, "--reward=choice"],
    "exhaustive": [*command, "--strategy=exhaustive", f"--labels={folder / 'e.jsonl'}"],
    "long": [*command, "--max_len=20"],
    "no dense model": [*start[:1], f"--workdir={routed}", *command[2:]],
    "no workdir": [*start[:1], f"--workdir={folder / 'gone'}", *command[2:]],
    "no questions": [*command[:2], f"--questions={folder / 'gone'}", *command[3:]],
    "no model": ["search.py", *command[2:]],
    "two models": [*command, "--model=x"],
    "missing questions": [*command[:2], command[3]],
    "missing labels": command[:3],
    "budget": [*command, "--budget=0"],
    "argument": [*command, "more"],
    "step": [*command, "--step=5"],
  }
  return shell.run_many(given)


ERRORS = {
  "another search": "holds labels of another search: budget is 6 there, and 7 here",
  "somebody's file": "is not JSON",
  "strategy": "unknown strategy 'luck'; they are exhaustive, random, hill_climb, greedy, mcts, find_then_shrink",
  "reward": "unknown reward 'luck'; the rewards are choice, ",
  "choice": "reward 'choice' needs options, which question 'pointers/",
  "exhaustive": "4 layers have 76 plans, more than the budget of 6",
  "long": "tokens, more than max_len=20",
  "no dense model": "paths are those of a dense model, which mixture_of_depths has not",
  "no workdir": "gone",
  "no questions": "cannot read",
  "no model": "name one of --workdir, such as --workdir=runs/demo, and --model",
  "two models": "name one of --workdir, such as --workdir=runs/demo, and --model",
  "missing questions": "--questions is missing, such as --questions=data/questions.jsonl",
  "missing labels": "--labels is missing, such as --labels=data/labels.jsonl",
  "budget": "budget",
  "argument": "unexpected argument 'more'",
  "step": "no checkpoint of step 5",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_work_is_one_line(told, name):
  found = told[name]
  assert found["code"] == 2, found["err"]
  assert ERRORS[name] in found["err"]
  said = [line for line in found["err"].splitlines() if "searching" not in line]
  assert len(said) == 1, found["err"]
  assert said[0].startswith("error: ")


def test_the_command_searches_and_goes_on(place, told):
  assert told["works"]["code"] == told["again"]["code"] == 0, told["works"]["err"]
  first, *rest = told["works"]["out"].splitlines()
  assert "plans of questions evaluated in" in first
  assert rest == told["again"]["out"].splitlines()
  header, labels = read_labels(str(place[0] / "labels.jsonl"))
  assert (header.budget, len(labels)) == (6, 5)
  assert json.loads((place[0] / "labels.jsonl").read_text().splitlines()[0])["model"] == f"{place[1]} at step 8"

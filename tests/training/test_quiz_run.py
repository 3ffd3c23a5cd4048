"""quiz.py: what it tells of every contender, and Dr.LLM from a trained model over its labels to its answers."""

import json
import pathlib

import jax
import matplotlib.image
import numpy as np
import pytest
import quizzed
import tiny_run
from caches import cache_in
from places import Place

from adaptive.config import ConfigError
from adaptive.data.labels import Header, Label, LabelWriter, read_labels
from adaptive.data.pieces import continuation
from adaptive.data.questions import read_questions
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.evaluation import quiz
from adaptive.evaluation.likelihood import Scorer
from adaptive.training import loop, path_search, quiz_run
from adaptive.training.quiz_run import Request
from adaptive.training.run import load_params, load_plan

PLAN, LAYERS = (1, 0, 2, 0), 4
NAMES = ["chance, as budget=-0.6", "chance, as budget=-0.5", "budget=-0.6", "budget=-0.5"]
FIXED, FULL = "fixed one, 3 layers", "depth=4"


def varied(params):
  """Routers that decide differently for different prompts."""
  routers = params["routers"]
  return {**params, "routers": {**routers, "weight": 12 * routers["weight"], "bias": 0.2 * routers["bias"]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Folder of a Dr.LLM run, its questions, those with options, and a label file that mostly has one plan."""
  folder = tmp_path_factory.mktemp("place")
  with cache_in(folder / "cache"):
    _, held_out = quizzed.graded(folder / "data")
    fixed = str(folder / "one.jsonl")
    with LabelWriter(fixed, Header(LAYERS, "m", "q", "s", 5, "r", 0)) as writer:
      for i in range(5):
        writer.write(Label(f"q/{i}", 0.0, PLAN if i % 2 == 0 else (1, 1, i % 3, 1), 1.0, 5, i))
    workdir = quizzed.made(folder / "run", "dr_llm", varied)
    yield folder, workdir, held_out, quizzed.with_options(held_out), fixed


def test_a_label_file_of_several_plans_says_which_is_asked(place, capsys):
  assert quiz_run._plan_of(place[4], LAYERS) == tuple(i for i, count in enumerate(PLAN) for _ in range(count))
  assert "its most frequent is asked, of 3 of 5 questions" in capsys.readouterr().err


@pytest.fixture(scope="module")
def asked(place):
  """What is written of questions with options."""
  folder, workdir, _, options, fixed = place
  output = folder / "out" / "quiz.json"
  quiz_run.run(workdir, Request(questions=options, fixed=(fixed,), output=str(output)))

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  return json.loads(output.read_text(), parse_constant=refuse)


def test_the_output_holds_every_contender_and_question(place, asked):
  _, workdir, _, options, _ = place
  questions = read_questions(options)
  assert (asked["workdir"], asked["questions"], asked["reward"]) == (workdir, options, "choice")
  assert asked["asked"] == [{"id": question.id, "level": question.level} for question in questions]
  assert [one["name"] for one in asked["contenders"]] == [*NAMES, FIXED, FULL]
  for one in asked["contenders"]:
    assert set(one) == {"name", "rewards", "layers", "seconds", "against", "time"}
    assert len(one["rewards"]) == len(one["layers"]) == len(one["seconds"]) == len(questions)
    assert set(one["rewards"]) <= {0.0, 1.0}
    assert min(one["seconds"]) > 0
  full = asked["contenders"][-1]
  assert (full["against"], full["time"]) == ([0.0, 0.0, 0.0], 1.0)
  for one in asked["contenders"]:
    found = quiz.interval(np.array(one["rewards"]), np.array(full["rewards"]))
    assert one["against"] == list(found)
    assert one["time"] == pytest.approx(sum(one["seconds"]) / sum(full["seconds"]))


def test_layers_are_those_that_ran(asked):
  layers = {one["name"]: one["layers"] for one in asked["contenders"]}
  assert set(layers[FULL]) == {4.0}
  assert set(layers[FIXED]) == {3.0}
  for name in NAMES:
    assert all(0 <= ran <= 2 * LAYERS for ran in layers[name])
  assert len(set(layers["budget=-0.5"])) > 1


def test_rewards_are_those_of_the_options_scores(place, asked):
  _, workdir, _, options, _ = place
  plan = load_plan(workdir)
  _, params = load_params(plan, workdir)
  tokens, rewards = ByteTokenizer(), {one["name"]: one["rewards"] for one in asked["contenders"]}
  encode = lambda text: tokens.encode(text).tolist()
  for index, name in enumerate((*NAMES[2:], FULL)):
    scorer = Scorer(plan.method, plan.model, params, index, plan.mesh)
    for number, question in enumerate(read_questions(options)):
      scores = scorer([continuation(encode, (tokens.bos,), question.prompt, text) for text in question.options])
      right = np.argmax([score.log_prob for score in scores]) == question.answer
      assert rewards[name][number] == right, (name, question)


def test_a_fixed_plan_is_what_the_label_file_mostly_has(place):
  folder, workdir, held_out, _, fixed = place
  assert quiz_run._plan_of(fixed, LAYERS) == (0, 2, 2)
  routed = load_plan(workdir)
  _, params = load_params(routed, workdir)
  bias = 9.0 * jax.nn.one_hot(np.array(PLAN), 3)
  still = {**params["routers"], "weight": 0 * params["routers"]["weight"], "bias": bias}
  other = quizzed.made(folder / "decided", "dr_llm", lambda _: {**jax.device_get(params), "routers": still})
  output = folder / "decided.json"
  request = Request(questions=held_out, fixed=(fixed,), output=str(output), chance=False, reward="likelihood")
  quiz_run.run(other, request)
  _, routers, path, full = json.loads(output.read_text())["contenders"]
  np.testing.assert_allclose(routers["rewards"], path["rewards"], rtol=1e-4)
  assert routers["layers"] == path["layers"] == [3.0] * 12
  assert not np.allclose(full["rewards"], path["rewards"], rtol=0.1)


def test_the_picture_lies_beside_the_output(place, asked):
  image = matplotlib.image.imread(place[0] / "out" / "quiz.png")
  assert image.shape[1] == round(2 * 6.4 * 160)


def test_the_table_and_the_levels(place, capsys):
  _, workdir, held_out, _, _ = place
  quiz_run.run(workdir, Request(questions=held_out, limit=7, submodels=("budget=-0.5", "full"), reward="likelihood"))
  out = capsys.readouterr().out.splitlines()
  levels = sorted({question.level for question in read_questions(held_out)[:7]})
  assert out[0] == f"7 questions of {held_out}, reward likelihood, run"
  assert out[1].split() == ["reward", "to", "the", "full", "model", "layers", "time"]
  names = ["chance, as budget=-0.5", "budget=-0.5", FULL]
  for line, name in zip(out[2:5], names, strict=True):
    assert line.startswith(name)
    reward, difference, *interval, layers, time = line[len(names[0]) :].replace("[", "").replace("]", "").split()
    assert float(interval[0].rstrip(",")) <= float(difference) <= float(interval[1])
    assert 0 <= float(layers) <= 8
    assert float(time) > 0
    assert 0 < float(reward) < 1
  assert out[5].split() == ["reward", "/", "layers", "at", "level", *map(str, levels)]
  assert [line.split("  ")[0].strip() for line in out[6:]] == names
  assert all(line.count("/") == len(levels) for line in out[6:])
  assert out[8].split("/")[1].split()[0] == "4.00"
  assert len({len(line) for line in out[5:]}) == 1


def test_without_options_the_answer_is_to_be_written(place, capsys):
  _, workdir, held_out, options, _ = place
  quiz_run.run(workdir, Request(questions=held_out, limit=2, submodels=("full",)))
  assert f"2 questions of {held_out}, reward exact" in capsys.readouterr().out
  quiz_run.run(workdir, Request(questions=options, limit=2, submodels=("full",)))
  assert "reward choice" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("method", "fields"),
  [
    ("sorted_net", {"method.depths": (2, 4)}), ("recursive", {}), ("early_exit", {}), ("mixture_of_depths", {}),
    ("recurrent_depth", {"method.num_recursions": 4}),
  ],
)  # fmt: skip
def test_other_methods_are_asked_too(place, tmp_path, method, fields):
  """Their full model runs the layers that the config says, however few of them have parameters of their own."""
  workdir = quizzed.made(tmp_path / method, method, **fields)
  quiz_run.run(workdir, Request(questions=place[3], limit=2, output=str(tmp_path / "quiz.json")))
  found = json.loads((tmp_path / "quiz.json").read_text())["contenders"]
  plan = load_plan(workdir)
  submodels = plan.method.submodels(plan.model)
  assert [one["name"] for one in found][-len(submodels) :] == [submodel.name for submodel in submodels]
  assert found[-1]["layers"] == [4.0, 4.0]
  assert all(layers is None or 0 < layers <= 4 for one in found for layers in one["layers"])
  assert (tmp_path / "quiz.png").exists()


def test_what_cannot_be_is_refused(place, tmp_path):
  _, workdir, held_out, options, fixed = place

  def refused(workdir=workdir, **changes):
    with pytest.raises(ConfigError) as caught:
      quiz_run.run(workdir, Request(**{"questions": options, "limit": 2, **changes}))
    assert "\n" not in str(caught.value)
    return str(caught.value)

  assert "unknown reward 'luck'" in refused(reward="luck")
  assert "reward 'choice' needs options" in refused(questions=held_out, reward="choice")
  assert "no sub-model 'budget=0.6'; did you mean budget=-0.6?" in refused(submodels=("budget=0.6",))
  assert "tokens: set --max_len, which is 9" in refused(max_len=9)
  other = str(tmp_path / "other.jsonl")
  with LabelWriter(other, Header(3, "m", "q", "s", 5, "r", 0)):
    pass
  assert "is of a model of 3 layers, this one has 4" in refused(fixed=(other,))
  empty = str(tmp_path / "empty.jsonl")
  with LabelWriter(empty, Header(4, "m", "q", "s", 5, "r", 0)) as writer:
    pass
  assert "holds no labels" in refused(fixed=(empty,))
  with LabelWriter(empty, Header(4, "m", "q", "s", 5, "r", 0)) as writer:
    writer.write(Label("q", 0.0, (0,) * 4, 1.0, 1, 0))
  assert "its plan runs no layer at all" in refused(fixed=(empty,))
  routed = quizzed.made(tmp_path / "routed", "mixture_of_depths")
  message = refused(workdir=routed, fixed=(fixed,))
  assert "fixed paths are those of a dense model, which mixture_of_depths has not" in message
  assert "is for JSON; its picture comes by itself" in refused(output=str(tmp_path / "quiz.png"))
  blocked = tmp_path / "file"
  blocked.write_text("")
  assert "cannot write" in refused(output=str(blocked / "quiz.json"), submodels=("full",))


def test_from_a_trained_model_over_its_labels_to_its_answers(place, tmp_path, capsys):
  """train.py, search.py, train.py and quiz.py; the trained model stays bit for bit what it was."""
  train, held_out = quizzed.graded(tmp_path / "data", 48)
  folder, labels = tmp_path / "base", str(tmp_path / "labels.jsonl")
  fields = {**quizzed.DEPTH, "data.validation_path": held_out, "training.steps": 4}
  base = tiny_run.assemble(train, "dense", **fields)
  loop.train(base, str(folder))
  request = path_search.Request(train, labels, budget=8, reward="likelihood", strategy="hill_climb")
  path_search.search(str(folder), request)
  assert len(read_labels(labels)[1]) == 48
  learned = {**fields, "data.labels": labels, "training.init_from": str(folder), "training.steps": 16}
  run = tiny_run.assemble(train, "dr_llm", **learned)
  loop.train(run, str(tmp_path / "run"))
  losses = [line["loss"] for line in tiny_run.lines(tmp_path / "run") if "loss" in line]
  assert np.mean(losses[-4:]) < np.mean(losses[:4])
  before, after = tiny_run.checkpoint(base, folder, 4), tiny_run.checkpoint(run, tmp_path / "run", 16)
  given = [name for name in before if name.startswith("['params']")]
  assert len(given) > 8
  for name in given:
    np.testing.assert_array_equal(after[name], before[name], err_msg=name, strict=True)
  routers = [name for name in after if name.startswith("['params']") and name not in before]
  assert routers
  assert all("routers" in name for name in routers)
  quiz_run.run(str(tmp_path / "run"), Request(held_out, reward="likelihood", output=str(tmp_path / "quiz.json")))
  full = json.loads((tmp_path / "quiz.json").read_text())["contenders"][-1]
  quiz_run.run(str(folder), Request(held_out, reward="likelihood", output=str(tmp_path / "dense.json")))
  (dense,) = json.loads((tmp_path / "dense.json").read_text())["contenders"]
  np.testing.assert_allclose(full["rewards"], dense["rewards"], rtol=1e-6)
  assert f"picture: {tmp_path / 'quiz.png'}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def told(place):
  folder, workdir, _, options, fixed = place
  shell = Place(folder / "shell")
  start = ["quiz.py", f"--workdir={workdir}", f"--questions={options}"]
  few = [*start, "--limit=2", "--submodel=budget=-0.5"]
  return shell.run_many({
    "works": [*few, f"--fixed={fixed}", "--nochance", f"--output={folder / 'command.json'}"],
    "setting": [*few, "--set=method.when=per_step", "--set=method.budgets=(-0.55,-0.5)", "--reward=margin"],
    "no model": ["quiz.py", start[2]],
    "two models": [*start, "--model=x"],
    "missing questions": start[:2],
    "argument": [*start, "more"],
    "trained setting": [*few, "--set=method.hidden=9"],
    "step": [*few, "--step=5"],
    "sub-model": [*start, "--submodel=depth=9"],
  })  # fmt: skip


def test_the_command(place, told):
  assert told["works"]["code"] == told["setting"]["code"] == 0, told["works"]["err"] + told["setting"]["err"]
  rows = told["works"]["out"].splitlines()[2:5]
  assert [row.split("  ")[0] for row in rows] == ["budget=-0.5", FIXED, FULL]
  assert told["works"]["out"].splitlines()[-1] == f"picture: {place[0] / 'command.png'}"
  assert pathlib.Path(place[0] / "command.png").exists()
  assert "chance, as budget=-0.5" in told["setting"]["out"]


@pytest.mark.parametrize(
  ("name", "wanted"),
  [
    ("no model", "name one of --workdir"),
    ("two models", "name one of --workdir"),
    ("missing questions", "--questions is missing, such as --questions=data/pointers_held_out.jsonl"),
    ("argument", "unexpected argument 'more'"),
    ("trained setting", "method.hidden"),
    ("step", "no checkpoint of step 5"),
    ("sub-model", "no sub-model 'depth=9'"),
  ],
)
def test_what_cannot_work_is_one_line(told, name, wanted):
  assert told[name]["code"] == 2
  assert wanted in told[name]["err"]
  assert told[name]["err"].startswith("error: ")
  assert told[name]["err"].count("\n") == 1

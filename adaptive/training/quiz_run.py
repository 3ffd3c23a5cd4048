"""What `quiz.py` does: a run's sub-models, chance and fixed paths on a file of questions."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer
from adaptive.config import require
from adaptive.data.labels import read_labels
from adaptive.data.pieces import continuation
from adaptive.data.questions import Question, read_questions
from adaptive.data.tokenizers import check_vocab, make_tokenizer, prefix_of
from adaptive.evaluation import quiz, quiz_plot
from adaptive.evaluation.quiz import CHANCE, Answers, Contender, Line
from adaptive.methods.contract import Output, Params, SubModel
from adaptive.search import rewards
from adaptive.search.scorer import Options
from adaptive.training.run import Plan, find_submodel, load_params, load_plan
from adaptive.training.workdir import user_errors

_PILOT = 128  # questions from which chance takes its rates


@dataclasses.dataclass(frozen=True)
class Request:
  """What to ask.

  Attributes:
    questions: their file. limit: at most so many, the first of the file. reward: of `rewards.REWARDS`; empty:
      `choice`, or `exact` where there are no options.
    submodels: their names; empty: all of them. chance: whether those that decide are also asked deciding by chance.
    fixed: label files, of each of which the plan that it has most often is asked too.
    max_len: tokens of the longest question; None: the run's. step: of the checkpoint; None is the newest.
    changes: settings that are not trained. output: JSON file; empty: none.
  """

  questions: str
  limit: int | None = None
  reward: str = ""
  submodels: tuple[str, ...] = ()
  chance: bool = True
  fixed: tuple[str, ...] = ()
  max_len: int | None = None
  step: int | None = None
  changes: tuple[str, ...] = ()
  output: str = ""


def run(workdir: str, request: Request) -> None:
  """Prints a line for every contender; the last one is the full model.

  Raises:
    ConfigError: anything that cannot work, most of it before parameters are read.
  """
  require(jax.process_count() == 1, "quiz.py runs in one process")
  require(not request.output.endswith(".png"), f"--output={request.output} is for JSON; its picture comes by itself")
  questions = read_questions(request.questions)[: request.limit]
  request = dataclasses.replace(request, reward=request.reward or ("choice" if questions[0].options else "exact"))
  reward = rewards.find(request.reward, questions)
  plan = load_plan(workdir, request.changes)
  every = plan.method.submodels(plan.model)
  chosen = [find_submodel(plan, name) for name in request.submodels] or list(every)
  chosen = [*[submodel for submodel in chosen if submodel != every[-1]], every[-1]]
  plans = {path: _plan_of(path, plan.experiment.model.num_layers) for path in request.fixed}
  pieces = _pieces(questions, plan, request.max_len)
  _, params = load_params(plan, workdir, request.step)
  contenders = _contenders(plan, params, chosen, plans)
  if request.chance:
    contenders = [*_by_chance(plan, params, chosen, pieces), *contenders]
  with tqdm.tqdm(total=len(questions), desc="asking", unit="question") as bar:
    answers = quiz.ask(contenders, pieces, plan.mesh, bar.update)
  lines = [_line(one, found, questions, pieces, reward) for one, found in zip(contenders, answers)]
  _compare(lines)
  print(f"{len(questions)} questions of {request.questions}, reward {request.reward}, {pathlib.Path(workdir).name}")
  print("\n".join(_table(lines)))
  levels = sorted({question.level for question in questions if question.level is not None})
  if levels:
    print("\n".join(_by_level(lines, questions, levels)))
  if request.output:
    _write(request, workdir, lines, questions)
    print(f"picture: {_draw(request, lines, questions)}")


def _pieces(questions: Sequence[Question], plan: Plan, max_len: int | None) -> list:
  tokenizer = make_tokenizer(plan.experiment.data)
  check_vocab(tokenizer, plan.experiment.model.vocab_size)
  encode, prefix = lambda text: tokenizer.encode(text).tolist(), prefix_of(tokenizer, plan.experiment.data)
  texts = lambda question: question.options or (question.answer_text,)
  pieces = [[continuation(encode, prefix, q.prompt, text) for text in texts(q)] for q in questions]
  longest, limit = max(len(p.tokens) for each in pieces for p in each), max_len or plan.experiment.data.seq_len
  require(longest - 1 <= limit, f"the longest question has {longest} tokens: set --max_len, which is {limit}")
  return pieces


def _plan_of(path: str, num_layers: int) -> tuple[int, ...]:
  """The layers of the plan that a label file has most often, as a path; says so where it has others too."""
  header, labels = read_labels(path)
  require(
    header.num_layers == num_layers, f"{path!r} is of a model of {header.num_layers} layers, this one has {num_layers}"
  )
  require(bool(labels), f"{path!r} holds no labels")
  plans = [label.visits for label in labels]
  commonest = max(set(plans), key=plans.count)
  if len(set(plans)) > 1:
    number = plans.count(commonest)
    what = f"its most frequent is asked, of {number} of {len(plans)} questions"
    print(f"{path} holds no plan for all questions: {what}", file=sys.stderr)
  layers = tuple(layer for layer, count in enumerate(commonest) for _ in range(count))
  require(bool(layers), f"{path!r}: its plan runs no layer at all")
  return layers


def _contenders(
  plan: Plan, params: Params, chosen: Sequence[SubModel], plans: Mapping[str, tuple[int, ...]]
) -> list[Contender]:
  """Fixed paths, sub-models and the full model."""
  every = plan.method.submodels(plan.model)
  traced = lambda params, batch, index: plan.method.forward(plan.model, params, batch, index)
  full = lambda params, batch, _: plan.method.forward(plan.model, params, batch, len(every) - 1)
  found = [Contender(s.name, params, traced, every.index(s)) for s in chosen[:-1]]
  dense = plan.method.extract(plan.model, params, every[-1]) if plans else None
  require(not plans or dense is not None, f"fixed paths are those of a dense model, which {plan.method_name} has not")
  for path, layers in plans.items():
    found.append(_fixed(path, *dense, layers))
  return [*found, Contender(every[-1].name, params, full, None, plan.experiment.model.num_layers)]


def _fixed(path: str, config: Any, params: Params, layers: tuple[int, ...]) -> Contender:
  part = subnets.Subnet(layers, config.q_per_kv, config.d_ff)
  small, picked = subnets.config_of(config, part), subnets.extract(config, params, part)
  forward = lambda params, batch, _: Output(Transformer(small).apply({"params": params}, batch), {})
  return Contender(f"fixed {pathlib.Path(path).stem}, {len(layers)} layers", picked, forward, None, len(layers))


def _by_chance(plan: Plan, params: Params, chosen: Sequence[SubModel], pieces: Sequence) -> list[Contender]:
  """Twins of those that decide, at the rates measured on some of the questions."""
  every = plan.method.submodels(plan.model)
  traced = lambda params, batch, index: plan.method.forward(plan.model, params, batch, index)
  pilot = [pieces[i] for i in np.linspace(0, len(pieces) - 1, min(_PILOT, len(pieces)), dtype=int)]
  asked = [Contender(s.name, params, traced, i) for i, s in enumerate(every)]
  with tqdm.tqdm(total=len(pilot), desc="rates for chance", unit="question") as bar:
    realised = [quiz.added(found.realised) for found in quiz.ask(asked, pilot, plan.mesh, bar.update)]
  twin = plan.method.at_random(plan.model, realised)
  if twin is None:
    return []
  model, indices = twin
  random = lambda params, batch, index: plan.method.forward(model, params, batch, index)
  names = {submodel: index for submodel, index in zip(every, indices) if index is not None}
  return [Contender(f"{CHANCE}{s.name}", params, random, names[s]) for s in chosen if s in names]


def _line(one: Contender, found: Answers, questions: Sequence[Question], pieces: Sequence, reward: Callable) -> Line:
  sizes = [np.array([len(piece.tokens) - piece.given for piece in options]) for options in pieces]
  each = map(Options, found.log_probs, sizes, found.greedy)
  won = np.array([reward(question, scores) for question, scores in zip(questions, each, strict=True)])
  ran = lambda measured: float(measured["layers"][0]) / max(float(measured["layers"][1]), 1.0)
  layers = [ran(measured) if "layers" in measured else one.layers for measured in found.realised]
  return Line(one.name, won, np.array(layers, float), found.seconds)


def _compare(lines: Sequence[Line]) -> None:
  full = lines[-1]
  for line in lines:
    line.against = quiz.interval(line.rewards, full.rewards)
    line.time = float(line.seconds.sum() / full.seconds.sum())


def _table(lines: Sequence[Line]) -> list[str]:
  width = max(len(line.name) for line in lines)
  rows = [f"{'':{width}} {'reward':>8} {'to the full model':>28} {'layers':>8} {'time':>6}"]
  for line in lines:
    difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*line.against)
    rows.append(
      f"{line.name:{width}} {line.rewards.mean():8.4f} {difference:>28} {line.layers.mean():8.2f} {line.time:6.2f}"
    )
  return rows


def _by_level(lines: Sequence[Line], questions: Sequence[Question], levels: Sequence[int]) -> list[str]:
  title, of = "reward / layers at level", np.array([question.level for question in questions])
  width = max(len(title), *(len(line.name) for line in lines))
  rows = [f"{title:{width}} " + " ".join(f"{level:>14}" for level in levels)]
  for line in lines:
    cells = [f"{line.rewards[of == level].mean():7.4f} /{line.layers[of == level].mean():5.2f}" for level in levels]
    rows.append(f"{line.name:{width}} " + " ".join(f"{cell:>14}" for cell in cells))
  return rows


def _write(request: Request, workdir: str, lines: Sequence[Line], questions: Sequence[Question]) -> None:
  asked = [{"id": question.id, "level": question.level} for question in questions]
  found = {"workdir": workdir, "questions": request.questions, "reward": request.reward, "asked": asked}
  with user_errors(f"cannot write {request.output}"):
    path = pathlib.Path(request.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, "contenders": [_listed(line) for line in lines]}), encoding="utf-8")


def _listed(line: Line) -> dict[str, Any]:
  """As JSON has it, which knows no nan: layers that nothing tells are null."""
  fields = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(line).items()}
  return {**fields, "layers": [None if np.isnan(layers) else layers for layers in fields["layers"]]}


def _draw(request: Request, lines: Sequence[Line], questions: Sequence[Question]) -> pathlib.Path:
  """Draws the picture beside the output, and says where."""
  path = pathlib.Path(request.output).with_suffix(".png")
  with user_errors(f"cannot write {path}"):
    quiz_plot.plot_png(lines, [question.level for question in questions], path, f"Reward, {request.reward}")
  return path

"""What `search.py` does: for each question of a file, which layers to run how often; or one plan for all of them."""

import collections
import dataclasses
import time
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm

from adaptive.config import require
from adaptive.data.labels import Header, Label, LabelWriter, read_labels
from adaptive.data.questions import Question, fingerprint, read_questions
from adaptive.data.tokenizers import check_vocab, make_tokenizer, prefix_of
from adaptive.pretrained.published import is_published
from adaptive.search import rewards, trees
from adaptive.search.driver import search_many
from adaptive.search.memory import Found, Search
from adaptive.search.scorer import KEPT, PathScorer
from adaptive.search.strategies import STRATEGIES
from adaptive.search.visits import Visits, default
from adaptive.training.run import load_params, load_plan


@dataclasses.dataclass(frozen=True)
class Request:
  """What to search.

  Attributes:
    questions: their file. labels: the file to write. limit: at most so many questions, the first of the file.
    strategy, budget, reward: of `strategies.STRATEGIES` and `rewards.REWARDS`; plans evaluated of a question, at most.
    shared: whether one plan is to serve all questions, its reward being their mean.
    seed: of the search. width: questions that are searched side by side. together: of `PathScorer`.
    max_len: tokens of the longest question; None: the model's rows. step: of the checkpoint; None is the newest.
  """

  questions: str
  labels: str
  limit: int | None = None
  strategy: str = "find_then_shrink"
  budget: int = 50
  reward: str = "margin"
  shared: bool = False
  seed: int = 0
  width: int = 16
  together: int | None = None
  max_len: int | None = None
  step: int | None = None


def search(workdir: str, request: Request) -> None:
  """Writes a line of the label file for every question as soon as it is done; goes on with a file that is there.

  Raises:
    ConfigError: anything that cannot work, most of it before parameters are read.
  """
  require(jax.process_count() == 1, "search.py runs in one process")
  r = request
  require(r.strategy in STRATEGIES, f"unknown strategy {r.strategy!r}; they are {', '.join(STRATEGIES)}")
  require(r.budget >= 1 and r.width >= 1, f"budget={r.budget} and width={r.width} must be at least 1")
  questions = read_questions(r.questions)[: r.limit]
  reward = rewards.find(r.reward, questions)
  plan = load_plan(workdir)
  next(_search(r, plan.experiment.model.num_layers, 0))  # where its settings cannot work, it does not begin
  tokenizer = make_tokenizer(plan.experiment.data)
  check_vocab(tokenizer, plan.experiment.model.vocab_size)
  encode, prefix = lambda text: tokenizer.encode(text).tolist(), prefix_of(tokenizer, plan.experiment.data)
  max_len = plan.experiment.data.seq_len if r.max_len is None else r.max_len
  planted = {question.id: trees.plant(question, encode, prefix, max_len) for question in questions}
  # Searched side by side, questions of one length share a program.
  questions.sort(key=lambda question: planted[question.id].shape)
  step, params = load_params(plan, workdir, r.step)
  found = plan.method.extract(plan.model, params, plan.method.submodels(plan.model)[-1])
  require(found is not None, f"{workdir}: paths are those of a dense model, which {plan.method_name} has not")
  config, params = found
  layers = config.num_layers
  model = workdir if is_published(workdir) else f"{workdir} at step {step}"
  header = Header(layers, model, fingerprint(r.questions), _name(r), r.budget, r.reward, r.seed)
  with LabelWriter(r.labels, header) as writer:
    left = [question for question in questions if question.id not in writer.done]
    if left:
      side = r.together or (1 if jax.default_backend() == "cpu" else 8)
      kept = 0 if r.shared else KEPT  # streams of all questions at once would be too many
      scorer = PathScorer(config, params, [planted[question.id] for question in left], together=side, kept=kept)
      run = _one_for_all if r.shared else _one_for_each
      began = time.monotonic()
      with jax.set_mesh(plan.mesh):
        run(left, scorer, reward, layers, r, writer)
      _tell_speed(scorer, time.monotonic() - began)
  _summarise(read_labels(r.labels)[1], layers, r, {question.id: question.level for question in questions})


def _name(request: Request) -> str:
  return f"{request.strategy}, one plan for all" if request.shared else request.strategy


def _search(request: Request, layers: int, seed: int) -> Search:
  rng, goal = np.random.default_rng(seed), rewards.goal(request.reward)
  return STRATEGIES[request.strategy](layers, request.budget, rng, goal=goal)


def _seed(request: Request, name: str) -> int:
  """Of one question's search: it does not hang on which others are searched."""
  return zlib.crc32(f"{request.seed}/{name}".encode())


def _one_for_each(questions: Sequence[Question], scorer: PathScorer, reward, layers: int, r: Request, writer) -> None:
  seeds = [_seed(r, question.id) for question in questions]
  searches = ((i, lambda seed=seed: _search(r, layers, seed)) for i, seed in enumerate(seeds))

  def evaluate(asked: list[tuple[int, Visits]]) -> list[float]:
    return [reward(questions[i], options) for (i, _), options in zip(asked, scorer(asked))]

  with tqdm.tqdm(total=len(questions), desc="searching", unit="question") as bar:
    show = lambda p: bar.set_postfix_str(f"{p.evaluations} plans evaluated")
    for i, found in search_many(searches, evaluate, r.width, show):
      writer.write(_label(questions[i].id, found, layers, seeds[i], rewards.goal(r.reward)))
      scorer.forget(i)
      bar.update()


def _label(name: str, found: Found, layers: int, seed: int, goal: float) -> Label:
  """Where nothing answers the question the model stays as it is: a plan that is as wrong is no label."""
  solved = found.reward >= goal
  visits, reward = (found.visits, found.reward) if solved else (default(layers), found.default_reward)
  return Label(name, found.default_reward, visits, reward, found.evaluations, seed)


def _one_for_all(questions: Sequence[Question], scorer: PathScorer, reward, layers: int, r: Request, writer) -> None:
  require(not writer.done, f"{r.labels!r} is of fewer questions, and one plan for all is searched anew: remove it")
  seed = _seed(r, "")
  with tqdm.tqdm(total=r.budget, desc="searching", unit="plan") as bar:

    def evaluate(asked: list[tuple[int, Visits]]) -> list[float]:
      found = []
      for _, visits in asked:
        scores = scorer([(i, visits) for i in range(len(questions))])
        found.append(float(np.mean([reward(question, options) for question, options in zip(questions, scores)])))
        bar.update()
      return found

    ((_, found),) = search_many([(0, lambda: _search(r, layers, seed))], evaluate, 1)
  for question in questions:
    writer.write(Label(question.id, found.default_reward, found.visits, found.reward, found.evaluations, seed))


def _tell_speed(scorer: PathScorer, seconds: float) -> None:
  share = scorer.computed / max(scorer.visits, 1)
  print(
    f"{scorer.scored:,} plans of questions evaluated in {seconds:.1f} s, {scorer.programs} programs compiled; "
    f"{scorer.rate:.1f} per second beside that, and {share:.0%} of their layers had to be run"
  )


def _summarise(labels: Sequence[Label], layers: int, request: Request, levels: Mapping[str, int | None]) -> None:
  before, after = (np.mean([getattr(x, name) for x in labels]) for name in ("default_reward", "reward"))
  ran = np.array([label.visits for label in labels])
  print(f"{len(labels)} questions in {request.labels}, by {_name(request)}, reward {request.reward}")
  print(f"mean reward          {before:8.4f} of the model as it is, {after:.4f} of the plans found")
  goal = rewards.goal(request.reward)
  if goal > 0 and not request.shared:
    before, after = (sum(getattr(x, name) >= goal for x in labels) for name in ("default_reward", "reward"))
    print(f"questions answered   {before:8,} by the model as it is, {after:,} by the plans found")
  print(f"layers of a plan     {ran.sum(1).mean():8.2f} of {layers}")
  print(f"plans evaluated      {np.mean([label.evaluations for label in labels]):8.1f} of a question")
  counts = collections.Counter(ran.ravel().tolist())
  print(
    "labels               " + ", ".join(f"{counts[c]:,} {name}" for c, name in enumerate(("skip", "execute", "repeat")))
  )
  for name, which in (("skipped most", 0), ("repeated most", 2)):
    share = (ran == which).mean(0)
    most = [f"{layer} ({share[layer]:.0%})" for layer in np.argsort(-share)[:6] if share[layer]]
    print(f"{name:20} " + (", ".join(most) or "none"))
  of = [levels.get(label.id) for label in labels]
  if known := sorted(set(of) - {None}):
    means = [ran[[level == one for one in of]].sum(1).mean() for level in known]
    print("layers by level      " + ", ".join(f"{mean:.2f} at {level}" for mean, level in zip(means, known)))

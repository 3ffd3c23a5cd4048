"""Questions put to contenders in turns: what they answer is what a scorer finds, and intervals of their differences."""

import jax
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import MeshConfig
from adaptive.data.pieces import Piece
from adaptive.evaluation import quiz
from adaptive.evaluation.likelihood import Scorer
from adaptive.evaluation.quiz import Contender
from adaptive.methods import METHODS

CONFIG, METHOD = tiny.model_config(), METHODS["dr_llm"]
MODEL = METHOD.build(CONFIG, METHOD.Config(hidden=8, windows=3, budgets=(-0.6, -0.5)))


def varied(params):
  """Routers that decide differently for different prompts."""
  routers = params["routers"]
  return {**params, "routers": {**routers, "weight": 12 * routers["weight"], "bias": 0.2 * routers["bias"]}}


PARAMS = varied(tiny.random_params(MODEL))


def pieces(number=9, seed=0):
  """Questions of one to four options and 3 to 20 tokens; the prompts are long enough to decide differently."""
  rng, found = np.random.default_rng(seed), []
  for which in range(number):
    prompt = rng.integers(0, 32, rng.integers(2, 15)).tolist()
    sizes = rng.integers(1, 6, 1 + which % 4)
    found.append([Piece([*prompt, *rng.integers(0, 32, size).tolist()], len(prompt)) for size in sizes])
  return found


def contenders(model=MODEL):
  forward = lambda params, batch, index: METHOD.forward(model, params, batch, index)
  full = lambda params, batch, _: METHOD.forward(model, params, batch, 2)
  return [Contender("a", PARAMS, forward, 0), Contender("b", PARAMS, forward, 1), Contender("full", PARAMS, full, None)]


@pytest.mark.parametrize("devices", [1, 4])
def test_answers_are_those_of_a_scorer(devices):
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
  questions, reported = pieces(), []
  found = quiz.ask(contenders(), questions, mesh, lambda: reported.append(1))
  assert len(reported) == len(questions)
  layers = []
  for index, answers in enumerate(found):
    scorer = Scorer(METHOD, MODEL, PARAMS, index, mesh, rows=4)
    for number, question in enumerate(questions):
      scores = scorer(question)
      np.testing.assert_allclose(answers.log_probs[number], [score.log_prob for score in scores], rtol=1e-4, atol=1e-4)
      assert answers.greedy[number].tolist() == [score.greedy for score in scores]
      assert answers.log_probs[number].dtype == np.float64
    assert answers.seconds.shape == (len(questions),)
    assert (answers.seconds > 0).all()
    layers.append([float(m["layers"][0] / m["layers"][1]) for m in answers.realised if m])
  assert [len(each) for each in layers] == [9, 9, 0]  # the full model tells nothing
  assert len(set(layers[1])) > 1


def test_what_is_measured_is_of_the_question_s_own_tokens():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  questions = pieces()
  (found,) = quiz.ask(contenders()[1:2], questions, mesh)
  for question, realised in zip(questions, found.realised):
    assert float(realised["layers"][1]) == sum(len(piece.tokens) - 1 for piece in question)
  total = quiz.added(found.realised)
  assert total["layers"][1] == sum(len(piece.tokens) - 1 for question in questions for piece in question)
  assert set(total) == set(found.realised[0])
  assert quiz.added([]) == {}


def test_every_program_is_compiled_before_it_is_timed(monkeypatch):
  """Contenders take turns, and each asked twice at first: once to compile, for every length and every function."""
  order, mesh = [], sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  real = jax.jit

  def watched(function):
    compiled = real(function)

    def run(params, batch, index):
      order.append((batch["inputs"].shape[1], None if index is None else int(index)))
      return compiled(params, batch, index)

    return run

  monkeypatch.setattr(quiz.jax, "jit", watched)
  row = lambda size: [Piece([1] * size, 2)]
  quiz.ask(contenders(), [row(5), row(9), row(20), row(4)], mesh)
  assert order == [
    (16, 0), (16, 0), (16, 1), (16, None), (16, None),
    (16, 1), (16, None), (16, 0),
    (32, None), (32, None), (32, 0), (32, 0), (32, 1),
    (16, 0), (16, 1), (16, None),
  ]  # fmt: skip


def test_an_interval_holds_the_mean_and_shrinks_with_more_questions():
  rng, widths = np.random.default_rng(0), []
  for number in (30, 300, 3000):
    one, other = rng.integers(0, 2, (2, number)).astype(float)
    mean, low, high = quiz.interval(one, other)
    assert mean == pytest.approx((one - other).mean())
    assert low < mean < high
    error = (one - other).std() / np.sqrt(number)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    widths.append(high - low)
  assert widths == sorted(widths, reverse=True)


def test_an_interval_is_of_pairs():
  """Two contenders who are wrong together do not differ, however much questions do."""
  rewards = np.random.default_rng(0).integers(0, 2, 200).astype(float)
  assert quiz.interval(rewards, rewards) == (0.0, 0.0, 0.0)
  assert quiz.interval(rewards, rewards - 0.25) == (0.25, 0.25, 0.25)
  other = rewards.copy()
  other[:2] = 1 - other[:2]
  _, low, high = quiz.interval(rewards, other)
  assert high - low < 0.05


def test_an_interval_does_not_depend_on_what_is_held_at_a_time(monkeypatch):
  one, other = np.random.default_rng(0).random((2, 50))
  before = quiz.interval(one, other)
  assert before == quiz.interval(one, other)
  assert before != quiz.interval(one, other, seed=1)
  monkeypatch.setattr(quiz, "_AT_ONCE", 1000)
  np.testing.assert_allclose(quiz.interval(one, other), before, atol=0.01)
  assert quiz.interval(np.ones(1), np.zeros(1)) == (1.0, 1.0, 1.0)


def test_chance_has_the_rates_and_not_the_places():
  """A twin runs about as many layers as its sub-model, but for other questions."""
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  questions = [[Piece(np.random.default_rng(i).integers(0, 32, 14).tolist(), 12)] for i in range(150)]
  one, other, full = quiz.ask(contenders(), questions, mesh)
  model, indices = METHOD.at_random(MODEL, [quiz.added(found.realised) for found in (one, other, full)])
  assert list(indices) == [0, 1, None]
  _, twin, _ = quiz.ask(contenders(model), questions, mesh)
  of = lambda found: np.array([m["layers"][0] / m["layers"][1] for m in found.realised])
  assert abs(of(other).mean() - of(twin).mean()) < 0.35
  assert np.corrcoef(of(other), of(twin))[0, 1] < 0.3

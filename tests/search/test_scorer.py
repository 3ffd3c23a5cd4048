"""Many paths in one program: against the dense model of each path, one option after the other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import subnet as subnets
from adaptive.backbone.transformer import Transformer
from adaptive.data.pieces import continuation
from adaptive.data.questions import Question
from adaptive.search import trees
from adaptive.search.scorer import PathScorer, tree_mask

MODEL = tiny.model_config()
LAYERS, LONGEST = MODEL.num_layers, 40
PARAMS = tiny.random_params(MODEL)
PREFIX = (31,)
QUESTIONS = [
  Question("two", "abcab", ("cd", "e"), 0),
  Question("text", "fed", (), "cba"),
  Question("four", "a", ("bcd", "b", "efghi", "bce"), 3),
  Question("long", "hgfedcbaabcdefgh", ("ijkl", "mno", "p" * 8), 2),
]
PLANS = [(1, 1, 1, 1), (0, 2, 1, 0), (2, 2, 2, 2), (0, 0, 0, 0), (1, 1, 0, 2), (1, 1, 1, 0), (2, 0, 0, 1)]
REQUESTS = [(which, plan) for plan in PLANS for which in range(len(QUESTIONS))]


def encode(text):
  return [ord(letter) - ord("a") for letter in text]


TREES = [trees.plant(question, encode, PREFIX, LONGEST) for question in QUESTIONS]


@functools.cache
def program(config):
  return jax.jit(lambda params, batch: Transformer(config).apply({"params": params}, batch))


def dense(plan, config=MODEL, params=PARAMS):
  """Batch -> logits of the dense model that has the path's layers; with no layer, of what embeds and reads."""
  path = tuple(itertools.chain.from_iterable([layer] * count for layer, count in enumerate(plan)))
  if not path:
    read = lambda batch: params["embedding"]["table"].astype(config.dtype)[batch["inputs"]]
    return lambda batch: Transformer(config).apply({"params": params}, read(batch), method="head")
  part = subnets.Subnet(path, config.q_per_kv, config.d_ff)
  return functools.partial(program(subnets.config_of(config, part)), subnets.extract(config, params, part))


def slow(question, plan, config=MODEL, params=PARAMS):
  """Log-probabilities, sizes and greediness of the options, each a row of its own."""
  run, log_probs, tokens, greedy = dense(plan, config, params), [], [], []
  for text in question.options or (question.answer_text,):
    piece = continuation(encode, PREFIX, question.prompt, text)
    row, real = np.zeros((1, LONGEST), np.int32), np.arange(LONGEST)[None] < len(piece.tokens)
    row[0, : len(piece.tokens)] = piece.tokens
    positions = np.arange(LONGEST, dtype=np.int32)[None] * real
    logits = run({"inputs": row, "segment_ids": real.astype(np.int32), "positions": positions})[0]
    logs, scored = np.asarray(jax.nn.log_softmax(logits)), range(piece.given, len(piece.tokens))
    log_probs.append(sum(logs[place - 1, row[0, place]] for place in scored))
    greedy.append(all(logs[place - 1].argmax() == row[0, place] for place in scored))
    tokens.append(len(scored))
  return log_probs, tokens, greedy


@pytest.fixture(scope="module")
def expected():
  return {(which, plan): slow(QUESTIONS[which], plan) for which, plan in REQUESTS}


def built(config=MODEL, params=PARAMS, **settings):
  return PathScorer(config, params, TREES, **settings)


def assert_scores(found, wanted, tolerance=1e-5):
  log_probs, tokens, greedy = wanted
  np.testing.assert_allclose(found.log_probs, log_probs, rtol=tolerance, atol=tolerance)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_array_equal(found.greedy, greedy)


def assert_same(found, wanted):
  for one, other in zip(found, wanted, strict=True):
    for name in one._fields:
      np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.fixture(scope="module")
def plain():
  """What comes out one request at a time, when nothing is kept."""
  scorer = built(pairs=2, kept=0)
  found = {request: scorer([request])[0] for request in REQUESTS}
  assert scorer.computed == scorer.visits == sum(sum(plan) for _, plan in REQUESTS)
  return found


def test_scores_are_those_of_the_dense_model_of_the_path(plain, expected):
  for request in REQUESTS:
    assert_scores(plain[request], expected[request])


def test_the_likeliest_answer_is_greedy(plain):
  """Answers that the path itself writes, and the same with another last token."""
  plan, tokens = (1, 0, 2, 1), encode("abc")
  for _ in range(3):
    row, length = np.zeros((1, LONGEST), np.int32), len(tokens) + 1
    row[0, :length] = [*PREFIX, *tokens]
    real = (np.arange(LONGEST) < length).astype(np.int32)[None]
    batch = {"inputs": row, "segment_ids": real, "positions": np.arange(LONGEST, dtype=np.int32)[None] * real}
    tokens.append(int(dense(plan)(batch)[0, length - 1].argmax()))
  texts = [tokens[3:], [*tokens[3:5], (tokens[5] + 1) % MODEL.vocab_size], [(tokens[3] + 1) % 32, *tokens[4:]]]
  options = tuple("".join(chr(token + ord("a")) for token in text) for text in texts)
  tree = trees.plant(Question("q", "abc", options, 0), encode, PREFIX, LONGEST)
  (found,) = PathScorer(MODEL, PARAMS, [tree])([(0, plan)])
  assert found.greedy.tolist() == [True, False, False]


@pytest.mark.parametrize(
  ("pairs", "together", "kept"), [(1, 1, 6), (16, 1, 1), (3, 2, 6), (16, 4, 0), (5, 4, 6), (64, 2, 2)]
)
def test_company_order_and_what_is_kept_change_nothing(plain, pairs, together, kept):
  scorer, rng = built(pairs=pairs, together=together, kept=kept), np.random.default_rng(pairs)
  for number in (len(REQUESTS), 1, 7):
    chosen = [REQUESTS[i] for i in rng.permutation(len(REQUESTS))[:number]]
    found = scorer(chosen)
    for options, request in zip(found, chosen, strict=True):
      assert_scores(options, plain[request])
  assert scorer.scored == len(REQUESTS) + 8
  assert scorer([]) == []


def test_a_path_begins_where_it_first_differs(plain):
  """Computed visits of a sequence of plans, worked out by hand; and the scores are bit for bit those without."""
  scorer, done = built(pairs=2), (0, 0)
  for plan, computed in [
    ((1, 1, 1, 1), 4),
    ((1, 1, 0, 2), 2),  # the first two layers are the default's
    ((1, 1, 1, 0), 0),  # of the default three, and the last does not run
    ((1, 1, 1, 1), 1),  # the stream that leaves the last layer is not kept
    ((0, 2, 1, 0), 3),
    ((0, 0, 0, 0), 0),  # nothing to run, whatever is kept
    ((2, 0, 0, 1), 3),
    ((2, 2, 2, 2), 6),
  ]:
    assert_same(scorer([(0, plan)]), [plain[0, plan]])
    assert (scorer.visits - done[0], scorer.computed - done[1]) == (sum(plan), computed), plan
    done = scorer.visits, scorer.computed


def test_questions_keep_streams_of_their_own(plain):
  scorer = built(pairs=4)
  for plan in PLANS:
    for order in ((0, 1), (1, 0)):
      requests = [(which, plan) for which in order]
      assert_same(scorer(requests), [plain[request] for request in requests])
  assert scorer.computed < scorer.visits


def test_streams_of_a_path_that_was_begun_late_are_whole():
  """A path that begins within another leaves streams from which a third can begin before that place."""
  scorer, alone = built(pairs=1, kept=2), built(pairs=1, kept=0)
  for plan in [(1, 1, 1, 1), (1, 0, 1, 1), (1, 0, 1, 2), (1, 0, 2, 2), (1, 0, 2, 1), (1, 2, 1, 1)]:
    assert_same(scorer([(3, plan)]), alone([(3, plan)]))


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_default_path_is_kept_whatever_comes(kept):
  scorer = built(pairs=1, kept=kept)
  scorer([(0, (1, 1, 1, 1))])
  for plan in itertools.islice(itertools.product((0, 2), repeat=LAYERS), 8):
    scorer([(0, plan)])
    assert len(scorer._streams[0]) <= kept
  before = scorer.computed
  scorer([(0, (1, 1, 1, 0))])
  assert scorer.computed == before


def test_the_path_that_came_first_goes_first():
  scorer = built(pairs=1, kept=3)
  for plan in [(1, 1, 1, 1), (0, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 1), (0, 0, 1, 1)]:
    scorer([(0, plan)])
  assert list(scorer._streams[0]) == [(1, 1, 1, 1), (2, 1, 1, 1), (0, 0, 1, 1)]


def test_a_forgotten_question_begins_anew(plain):
  scorer = built(pairs=1)
  for plan in PLANS:
    scorer([(0, plan)])
  scorer.forget(0)
  scorer.forget(0)
  before = scorer.computed
  assert_same(scorer([(0, (1, 1, 0, 2))]), [plain[0, (1, 1, 0, 2)]])
  assert scorer.computed == before + 4


def test_one_program_for_each_shape():
  scorer = built(pairs=4)
  scorer(REQUESTS)
  shapes = {tree.shape for tree in TREES}
  assert scorer.programs == scorer._program._cache_size() == len(shapes) > 1
  rate = scorer.rate
  assert rate > 0
  for request in REQUESTS[::5]:
    scorer([request])
  scorer(REQUESTS[::-1])
  assert scorer.programs == scorer._program._cache_size() == len(shapes)


def test_nothing_is_timed_that_was_compiled():
  scorer = built(pairs=1)
  scorer([REQUESTS[0]])
  assert (scorer.programs, scorer.rate) == (1, 0.0)


def test_bfloat16():
  config = tiny.model_config(dtype="bfloat16")
  requests = [(which, plan) for which, plan in REQUESTS if sum(plan) <= 5]
  scorer, alone = built(config, kept=6), built(config, pairs=1, kept=0)
  found = [scorer([request])[0] for request in requests]
  assert scorer.computed < scorer.visits
  for (which, plan), options, other in zip(requests, found, (alone([request])[0] for request in requests)):
    np.testing.assert_array_equal(options.log_probs, other.log_probs)
    log_probs, tokens, _ = slow(QUESTIONS[which], plan, config)
    np.testing.assert_allclose(options.log_probs, log_probs, atol=0.05 * max(tokens))
    assert options.log_probs.dtype == np.float64


def test_who_sees_whom():
  options = jnp.array([[7, 7, 3, 1, 2, 4, 0]])
  assert tree_mask(options)[0, 0, :-1].astype(int).tolist() == [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 0, 1, 0, 0],
    [1, 1, 0, 0, 0, 1, 0],
  ]

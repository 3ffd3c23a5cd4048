"""Scores of continuations: against sums of log-probabilities taken one by one, and how texts are cut into pieces."""

import jax
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import MeshConfig
from adaptive.evaluation.likelihood import Piece, Score, Scorer, continuation
from adaptive.methods import METHODS

CONFIG, METHOD = tiny.model_config(), METHODS["early_exit"]
MODEL = METHOD.build(CONFIG, METHOD.Config(exits=(1, 3)))
PARAMS = tiny.random_params(MODEL)


forward = jax.jit(lambda batch, index: METHOD.forward(MODEL, PARAMS, batch, index).logits, static_argnums=1)


def log_probs(tokens, index):
  """Of every next token of a row by itself, float64 [t, v]; filled up to 40 tokens, so that one program is enough."""
  row = np.zeros((1, 40), np.int32)
  row[0, : len(tokens)] = tokens
  real = (np.arange(40) < len(tokens)).astype(np.int32)[None]
  batch = {"inputs": row, "segment_ids": real, "positions": np.arange(40, dtype=np.int32)[None] * real}
  logits = np.asarray(forward(batch, index), np.float64)[0, : len(tokens)]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def slow(tokens, given, index):
  """The sum over the scored tokens, one by one, and whether each was the likeliest."""
  logs, scored = log_probs(tokens, index), range(given, len(tokens))
  return sum(logs[i - 1, tokens[i]] for i in scored), all(logs[i - 1].argmax() == tokens[i] for i in scored)


@pytest.mark.parametrize(
  ("index", "mesh"), [(0, MeshConfig(1, 1, 1)), (3, MeshConfig(1, 1, 1)), (5, MeshConfig(4, 2, 1))]
)
def test_scores_are_sums_over_the_tokens_that_are_not_given(index, mesh):
  devices = jax.devices()[: mesh.data * mesh.fsdp]
  rng = np.random.default_rng(0)
  pieces = [
    Piece(rng.integers(0, 32, size).tolist(), given) for size, given in ((9, 4), (2, 1), (40, 39), (5, 1), (9, 8))
  ]
  scorer = Scorer(METHOD, MODEL, PARAMS, index, sharding.make_mesh(mesh, devices), rows=3)
  for piece, score in zip(pieces, scorer(pieces)):
    total, greedy = slow(*piece, index)
    assert score.log_prob == pytest.approx(total, rel=1e-5)
    assert score.greedy == greedy


def test_the_likeliest_continuation_is_greedy():
  scorer = Scorer(METHOD, MODEL, PARAMS, 5, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  tokens = [3, 1, 4]
  for _ in range(4):
    tokens.append(int(log_probs(tokens, 5)[-1].argmax()))
  assert scorer([Piece(tokens, 3)])[0].greedy
  assert not scorer([Piece([*tokens[:-1], (tokens[-1] + 1) % 32], 3)])[0].greedy
  assert scorer([]) == []
  assert Score._fields == ("log_prob", "greedy")


def test_the_model_is_told_what_is_given_and_what_is_scored():
  seen = {}

  class Watching:
    def forward(self, model, params, batch, index):
      seen.update({name: values.shape for name, values in batch.items()})
      jax.debug.callback(lambda scored: seen.update(scored=np.asarray(scored)), batch["scored"])
      return METHOD.forward(model, params, batch, index)

  Scorer(Watching(), MODEL, PARAMS, 0, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), rows=1)([Piece([1] * 5, 3)])
  assert set(seen) == {"inputs", "targets", "segment_ids", "positions", "scored"}
  jax.effects_barrier()
  assert np.flatnonzero(seen["scored"]).tolist() == [2, 3]


def test_running_text_has_no_prompt():
  """Dr.LLM decides by prompts, and runs the given model where there is none."""
  method = METHODS["dr_llm"]
  model = method.build(CONFIG, method.Config(hidden=4, budgets=(-1.0,)))
  scorer = Scorer(method, model, tiny.random_params(model), 0, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  full = Scorer(method, model, tiny.random_params(model), 1, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  pieces = [Piece([3, 1, 4, 1, 5], 1), Piece([9, 2, 6, 5], 2)]
  text, wanted = scorer(pieces, prompts=False), full(pieces)
  assert [score.log_prob for score in text] == pytest.approx([score.log_prob for score in wanted], rel=1e-5)
  assert abs(scorer(pieces)[0].log_prob - wanted[0].log_prob) > 1e-2


def test_texts_are_cut_where_the_context_s_tokens_end():
  """A tokenizer of words, each with the blanks before it."""
  words = {"the": 1, " cat": 2, " sat": 3, "cat": 4, " ": 5}

  def encode(text):
    found = []
    while text:
      word = max((w for w in words if text.startswith(w)), key=len)
      found.append(words[word])
      text = text[len(word) :]
    return found

  assert continuation(encode, (), "the", " cat sat", 10) == Piece([1, 2, 3], 1)
  assert continuation(encode, (), "the ", "cat sat", 10) == Piece([1, 2, 3], 1), "the blank belongs to the next word"
  assert continuation(encode, (9,), "", "cat sat", 10) == Piece([9, 4, 3], 1)
  assert continuation(encode, (9,), "the cat", " sat", 2) == Piece([1, 2, 3], 2), "what is too long loses its beginning"

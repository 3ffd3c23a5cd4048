"""What lm-evaluation-harness gets: log-likelihoods, whole texts, continuations up to their stop texts."""

import types

import jax
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import ConfigError, MeshConfig
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.evaluation.likelihood import Piece, Scorer
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import METHODS

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here: pip install -e '.[harness]'")
from adaptive.evaluation import harness  # after it is known to be there

CONFIG, METHOD, TOKENIZER = tiny.model_config(vocab_size=257), METHODS["dense"], ByteTokenizer()
MODEL = METHOD.build(CONFIG, METHOD.Config())
PARAMS = tiny.random_params(MODEL)
MESH = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
SCORER = Scorer(METHOD, MODEL, PARAMS, 0, MESH, rows=4)


def asked(*arguments):
  return [types.SimpleNamespace(args=each) for each in arguments]


def generator(sampling, max_len):
  decoder = METHOD.decoder(MODEL, PARAMS, METHOD.submodels(MODEL)[0])
  return Generator(decoder, TOKENIZER.vocab_size, sampling, (TOKENIZER.eos,), max_len)


def model(prefix=(TOKENIZER.bos,), max_len=64, **settings):
  return harness.AdaptiveLM(TOKENIZER, prefix, SCORER, generator, max_len, rows=2, **settings)


def ids(text):
  return TOKENIZER.encode(text).tolist()


def test_a_continuation_is_scored_after_its_context():
  found = model().loglikelihood(asked(("ab", "cd"), ("a ", "b"), ("", "xy")), disable_tqdm=True)
  want = SCORER([Piece([256, *ids("abcd")], 3), Piece([256, *ids("a b")], 2), Piece([256, *ids("xy")], 1)])
  np.testing.assert_allclose([score for score, _ in found], [score.log_prob for score in want], rtol=1e-5)
  without = model(prefix=()).loglikelihood(asked(("ab", "cd"), ("", "xy")), disable_tqdm=True)
  want = SCORER([Piece(ids("abcd"), 2), Piece([256, *ids("xy")], 1)])
  np.testing.assert_allclose([score for score, _ in without], [score.log_prob for score in want], rtol=1e-5)


def test_a_long_text_is_scored_once_in_windows():
  text = "the quick brown fox"
  found = model(max_len=8).loglikelihood_rolling(asked((text,)), disable_tqdm=True)[0]
  tokens = [256, *ids(text)]
  assert len(tokens) == 20
  windows = [Piece(tokens[:9], 1), Piece(tokens[8:17], 1), Piece(tokens[11:], 6)]  # the last sees as much as fits
  assert sum(len(piece.tokens) - piece.given for piece in windows) == 19
  assert found == pytest.approx(sum(score.log_prob for score in SCORER(windows)), rel=1e-5)


def test_what_is_generated_ends_before_the_first_stop_text():
  settings = {"max_gen_toks": 12, "do_sample": False}
  whole = model().generate_until(asked(("ab", settings), ("q", settings)), disable_tqdm=True)
  alone = generator(Sampling(temperature=0.0), 64)([[256, *ids("ab")]], 12).tokens[0]
  assert whole[0] == TOKENIZER.decode(alone)
  stop = whole[0][3:5]
  assert stop
  cut = model().generate_until(asked(("ab", {**settings, "until": [stop, whole[0][4:6]]})), disable_tqdm=True)[0]
  assert cut == whole[0].split(stop)[0]


def test_settings_have_the_names_that_tasks_give_them():
  assert harness._settings({"until": "\n"}) == (("\n",), 256, Sampling(temperature=0.0))
  sampled = harness._settings({"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9})
  assert sampled == ((), 5, Sampling(0.7, 0, 0.9))
  assert harness._settings({"temperature": 0.5})[2].temperature == 0.5
  with pytest.raises(ConfigError, match="no chat template"):
    model().apply_chat_template([{"role": "user", "content": "x"}])
  with pytest.raises(ConfigError, match="set --max_len"):
    model(max_len=8).generate_until(asked(("ab", {"max_gen_toks": 12})), disable_tqdm=True)

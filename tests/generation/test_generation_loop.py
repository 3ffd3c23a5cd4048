"""The loop over tokens: every row as if it were alone, however long its neighbours are and whenever they end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import sharding
from adaptive.config import ConfigError
from adaptive.generation import loop
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import METHODS
from adaptive.methods.contract import Decoder

CONFIG = tiny.model_config(qk_norm=True, qkv_bias=True, num_layers=2)
VOCAB, NEW = 30, 6  # two of the model's ids are no tokens
PROMPTS = [
  [3, 1, 4, 1, 5],
  [9],
  [2, 6, 5, 3, 5, 8, 9, 7, 9, 3],
]  # with NEW tokens no more than 16, so all run in one program
GREEDY = Sampling(temperature=0)


@functools.cache
def model():
  """The dense method's model, its parameters and a jitted forward of one row, padded to 24 tokens."""
  dense = METHODS["dense"]
  made, params = dense.build(CONFIG, dense.Config()), tiny.random_params(CONFIG)
  return made, params, jax.jit(lambda batch: dense.forward(made, params, batch, 0).logits)


@functools.cache
def generator(sampling=GREEDY, stop_tokens=(), max_len=None):
  made, params, _ = model()
  decoder = METHODS["dense"].decoder(made, params, METHODS["dense"].submodels(made)[0])
  return Generator(decoder, VOCAB, sampling, stop_tokens, max_len)


def logits_after(tokens):
  """Logits of the token after these, from a forward pass without a cache, [VOCAB]."""
  row = np.zeros((3, 1, 24), np.int32)
  row[0, 0, : len(tokens)], row[1, 0, : len(tokens)], row[2, 0] = tokens, 1, np.arange(24)
  return np.asarray(model()[2](dict(zip(("inputs", "segment_ids", "positions"), row))))[0, len(tokens) - 1, :VOCAB]


def greedy(prompt, number):
  """The slow way: a whole forward pass for every token."""
  tokens, log_probs = list(prompt), []
  for _ in range(number):
    logits = logits_after(tokens).astype(np.float64)
    tokens.append(int(logits.argmax()))
    log_probs.append(logits.max() - np.log(np.exp(logits).sum()))
  return tokens[len(prompt) :], log_probs


@pytest.fixture(scope="module")
def slow():
  return [greedy(prompt, NEW) for prompt in PROMPTS]


def test_greedy_rows_are_those_of_the_slow_loop(slow):
  found = generator()(PROMPTS, NEW)
  assert found.tokens == [tokens for tokens, _ in slow]
  np.testing.assert_allclose(found.log_probs, [log_probs for _, log_probs in slow], atol=1e-4)
  assert len({tuple(tokens) for tokens in found.tokens}) == 3
  assert found.metrics == {}
  assert found.prefill_seconds > 0
  assert found.tokens_per_second == pytest.approx(3 * (NEW - 1) / found.seconds)


def test_a_row_depends_on_its_prompt_number_and_seed_only():
  sampling = generator(Sampling(temperature=1.5, top_k=20))
  together = sampling(PROMPTS, NEW, seed=3)
  for row in (1, 2):
    alone = sampling(PROMPTS[row : row + 1], NEW, seed=3, numbers=[row])
    assert alone.tokens == together.tokens[row : row + 1]
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)
  turned = sampling(PROMPTS[::-1], NEW, seed=3, numbers=[2, 1, 0])
  assert turned.tokens == together.tokens[::-1]
  assert sampling(PROMPTS, NEW, seed=3).tokens == together.tokens
  assert sampling(PROMPTS, NEW, seed=4).tokens != together.tokens
  same = sampling([PROMPTS[0]] * 3, NEW, seed=3).tokens
  assert same[0] == together.tokens[0]
  assert len({tuple(tokens) for tokens in same}) == 3, "equal prompts of one batch must not be given equal samples"


def test_only_tokens_of_the_vocabulary_are_sampled():
  hot = generator(Sampling(temperature=50.0))([PROMPTS[0]] * 3, 12)
  assert max(max(tokens) for tokens in hot.tokens) < VOCAB
  assert len({token for tokens in hot.tokens for token in tokens}) > 10


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(slow):
  stop = slow[1][0][2]
  expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens, _ in slow]
  assert len(expected[1]) <= 3 < max(map(len, expected))
  found = generator(stop_tokens=(stop, 31))(PROMPTS, NEW)
  assert found.tokens == expected
  assert [len(row) for row in found.log_probs] == [len(row) for row in expected]


def test_rows_that_have_all_ended_end_the_loop(slow):
  tokens, stop, seen = slow[1][0], slow[1][0][2], []
  generated, steps = generator(stop_tokens=(stop, 31)), []
  first, following = generated._programs(3, 16, 16)
  with pytest.MonkeyPatch.context() as patch:
    counted = lambda *arguments: (steps.append(1), following(*arguments))[1]
    patch.setattr(generated, "_programs", lambda *_: (first, counted))
    found = generated([PROMPTS[1]] * 3, 15, watch=lambda *token: seen.append(token))
  expected = tokens[: tokens.index(stop) + 1]
  assert found.tokens == [expected] * 3
  assert seen == [(row, token) for token in expected for row in range(3)]
  assert len(steps) == len(expected), "one step was under way when the last token was read"


def test_watch_sees_tokens_in_order_and_ends_its_row_only(slow):
  seen = []

  def watch(row, token):
    seen.append((row, token))
    return row == 2 and len([r for r, _ in seen if r == 2]) == 2

  found = generator()(PROMPTS, NEW, watch=watch)
  assert found.tokens == [slow[0][0], slow[1][0], slow[2][0][:2]]
  assert [token for row, token in seen if row == 0] == slow[0][0]
  assert [row for row, _ in seen[:6]] == [0, 1, 2, 0, 1, 2]
  assert len(seen) == 2 * NEW + 2


@pytest.mark.parametrize("number", [1, 2])
def test_the_fewest_tokens(slow, number):
  assert generator()(PROMPTS, number).tokens == [tokens[:number] for tokens, _ in slow]


def counting_decoder():
  """A decoder whose next token is always one more than the newest; it counts real tokens, and its rows' sums."""

  def step(params, tokens, counts, cache):
    real = jnp.arange(tokens.shape[1])[None] < counts[:, None]
    last = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    sums = jnp.sum(tokens * real, axis=1)
    return jax.nn.one_hot(last + 1, VOCAB), cache + sums, {"mean": (jnp.sum(sums), jnp.sum(counts))}

  return Decoder((), lambda rows, slots: jnp.zeros((rows,), jnp.int32), step)


def test_metrics_add_up_over_prompts_and_new_tokens():
  generated = Generator(counting_decoder(), VOCAB, GREEDY)([[1, 2], [10]], 4)
  assert generated.tokens == [[3, 4, 5, 6], [11, 12, 13, 14]]
  assert generated.metrics == {"mean": (1 + 2 + 3 + 4 + 5 + 10 + 11 + 12 + 13, 9)}, "the last token is not fed back"


def test_finished_rows_take_part_in_nothing():
  generated = Generator(counting_decoder(), VOCAB, GREEDY, stop_tokens=(4,))([[1, 2], [10]], 5)
  assert generated.tokens == [[3, 4], [11, 12, 13, 14, 15]]
  assert generated.metrics == {"mean": (1 + 2 + 3 + 10 + 11 + 12 + 13 + 14, 8)}


def test_a_row_that_watch_ended_is_fed_one_token_more_and_no_other():
  generated = Generator(counting_decoder(), VOCAB, GREEDY)([[1, 2], [10]], 4, watch=lambda row, token: token == 3)
  assert generated.tokens == [[3], [11, 12, 13, 14]]
  assert generated.metrics == {"mean": (1 + 2 + 3 + 10 + 11 + 12 + 13, 7)}, "3 was on its way when the host read it"


def test_the_host_reads_a_token_when_the_next_step_is_under_way(monkeypatch):
  generated = Generator(counting_decoder(), VOCAB, GREEDY)
  first, following = generated._programs(1, 16, 16)
  events = []

  def noted(program, name):
    return lambda *arguments: (events.append(name), program(*arguments))[1]

  monkeypatch.setattr(generated, "_programs", lambda *_: (noted(first, "step"), noted(following, "step")))
  generated([[1]], 4, watch=lambda row, token: events.append(token))
  assert events == ["step", "step", 2, "step", 3, "step", 4, 5]


def test_the_cache_is_donated_and_programs_are_kept():
  generated = generator()
  compiled = generated._programs.cache_info().currsize
  _, following = generated._programs(3, 16, 32)
  assert following.as_text().count("input_output_alias={ {0}") == 1, "the step writes into the cache it was given"
  for prompts in ([[1] * 3, [2], [3]], [[1] * 14, [2], [3]]):
    generated(prompts, 3 + 16)
  assert generated._programs.cache_info().currsize <= compiled + 1


@pytest.mark.parametrize(
  ("size", "expected"), [(1, 16), (16, 16), (17, 32), (129, 256), (256, 256), (257, 512), (513, 768)]
)
def test_buckets(size, expected):
  assert loop.bucket(size) == expected


def test_a_mesh_changes_no_token(slow):
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  made, params, _ = model()
  params = jax.device_put(params, sharding.state_shardings(tiny.shapes(CONFIG), mesh))
  decoder = METHODS["dense"].decoder(made, params, METHODS["dense"].submodels(made)[0])
  spread = Generator(decoder, VOCAB, GREEDY, mesh=mesh)
  assert spread(PROMPTS, NEW).tokens == [tokens for tokens, _ in slow]
  first, _ = spread._programs(4, 16, 16)
  for layer in first.output_shardings[0].layers:
    assert layer.key.shard_shape((4, 2, 16, 4)) == (1, 1, 16, 4), "rows and heads lie apart"
  query = decoder.params["layers"][0]["attention"]["query"]
  assert query.sharding.shard_shape(query.shape) == tuple(np.array(query.shape) // (2, 2, 1, 1)), "as in training"


@pytest.mark.parametrize(
  ("prompts", "changes", "message"),
  [
    ([], {}, "there is no prompt"),
    ([[1], []], {}, "prompt 2 is empty"),
    ([[1], [2, -1]], {}, "prompt 2: there is no token -1, only 0 .. 29"),
    ([[30]], {}, "prompt 1: there is no token 30, only 0 .. 29"),
    ([[1], [1] * 15], {}, "prompt 2 of 15 tokens and max_new_tokens=6 make 21, more than max_len=20"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ([[1]], {"seed": -1}, "seed=-1 must lie in 0 .. 4294967295"),
  ],
  ids=str,
)
def test_what_cannot_be_continued(prompts, changes, message):
  with pytest.raises(ConfigError, match=message):
    generator(max_len=20)(prompts, **{"max_new_tokens": NEW, **changes})

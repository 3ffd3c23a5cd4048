"""Self-speculation gives what the model alone gives: token for token when greedy, in distribution when sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive.backbone import decoding
from adaptive.config import ConfigError
from adaptive.generation.drafts import Choice, Chooser, Fixed, expected_tokens
from adaptive.generation.loop import Generator, Rows
from adaptive.generation.sampling import Sampling
from adaptive.generation.speculative import SpeculativeGenerator
from adaptive.methods import METHODS

CONFIG, VOCAB = tiny.model_config(), 30
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]
SETTINGS = {
  "early_exit": dict(exits=(1, 3), heads="own"),
  "layer_skip": {},
  "sorted_net": dict(depths=(1, 2, 4)),
  "recursive": dict(num_recursions=2, sharing="middle_cycle"),
  "unified_skip": dict(speedups=(1.3, 2.0)),
  "ponder": dict(num_recursions=2),
  "recurrent_depth": dict(prelude=1, core=1, num_recursions=3),
}


@functools.cache
def family(name, close=True):
  """Method, model and parameters. Where close, the later layers change little, so that drafts are often right."""
  method = METHODS[name]
  model = method.build(CONFIG, method.Config(**SETTINGS[name]))
  params = tiny.random_params(model)
  if close:
    damp = np.where(np.arange(jax.tree.leaves(params["layers"])[0].shape[0]) > 0, 0.15, 1.0).astype(np.float32)
    layers = params["layers"]
    for part, leaf in (("attention", "out"), ("mlp", "down")):
      weight = layers[part][leaf]
      layers = {**layers, part: {**layers[part], leaf: weight * damp.reshape(-1, *[1] * (weight.ndim - 1))}}
    params = {**params, "layers": layers}
  return method, model, params


def plain(name, sampling=GREEDY, stop_tokens=(), close=True):
  method, model, params = family(name, close)
  return Generator(method.decoder(model, params, method.submodels(model)[-1]), VOCAB, sampling, stop_tokens)


def speculative(name, draft, tokens, sampling=GREEDY, stop_tokens=(), close=True, mesh=None):
  method, model, params = family(name, close)
  ladder = method.ladder(model, params, [method.submodels(model)[draft]])
  return SpeculativeGenerator(ladder, VOCAB, Fixed(0, tokens), sampling, stop_tokens, mesh=mesh)


DRAFTS = [
  ("early_exit", 0),
  ("early_exit", 1),
  ("layer_skip", 0),
  ("layer_skip", 2),
  ("sorted_net", 1),
  ("recursive", 0),
  ("unified_skip", 0),
  ("unified_skip", 1),
  ("ponder", 0),
  ("recurrent_depth", 0),
  ("recurrent_depth", 1),
]


@pytest.mark.parametrize(("name", "draft"), DRAFTS)
@pytest.mark.parametrize("close", [True, False])
def test_greedy_rounds_give_the_tokens_of_the_model_alone(name, draft, close):
  want = plain(name, close=close)(PROMPTS, 20)
  found = speculative(name, draft, 3, close=close)(PROMPTS, 20)
  assert found.tokens == want.tokens
  np.testing.assert_allclose(np.array(found.log_probs), np.array(want.log_probs), atol=1e-4)
  accepted, proposed = found.metrics["accepted"]
  assert 0 <= accepted <= proposed
  if close and name != "early_exit":  # whose own heads are random
    assert accepted > 0


@pytest.mark.parametrize(
  ("settings", "layers", "draft"),
  [
    (dict(num_recursions=3), 5, 0),
    (dict(num_recursions=3), 5, 1),
    (dict(num_recursions=3, sharing="cycle", gating="additive"), 3, 1),
    (dict(num_recursions=3, sharing="cycle", kv_cache="shared"), 3, 0),
    (dict(num_recursions=3, kv_cache="hybrid", inference="aux_router", router="mlp"), 5, 1),
  ],
  ids=str,
)
def test_fewer_recursions_draft_for_all(settings, layers, draft):
  """Some tokens pass every recursion and some do not, so refused ones leave caches of different lengths behind."""
  method = METHODS["mixture_of_recursions"]
  model = method.build(tiny.model_config(num_layers=layers), method.Config(**settings))
  params = tiny.random_params(model)
  full = Generator(method.decoder(model, params, method.submodels(model)[-1]), VOCAB, GREEDY)
  want = full(PROMPTS, 20)
  passed = want.metrics["capacity/3"][0] / want.metrics["capacity/1"][0]
  assert 0 < passed < 1
  ladder = method.ladder(model, params, [method.submodels(model)[draft]])
  assert ladder.tails == ((settings.get("sharing") != "cycle"),)
  found = SpeculativeGenerator(ladder, VOCAB, Fixed(0, 3), GREEDY)(PROMPTS, 20)
  assert found.tokens == want.tokens
  assert found.metrics["accepted"][0] > 0


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_any_number_of_drafted_tokens_gives_the_same(tokens):
  want = plain("layer_skip")(PROMPTS, 17)
  found = speculative("layer_skip", 1, tokens)(PROMPTS, 17)
  assert found.tokens == want.tokens


@pytest.mark.parametrize("new", [6, 9, 14, 20])
def test_no_round_is_begun_that_nobody_wants(new):
  """What a call leaves under way, the next call's prompts wait for."""
  generator = speculative("layer_skip", 2, 3)
  found = generator(PROMPTS[:1], new)
  assert found.metrics["tokens_per_round"][1] < new - 1, "some rounds bring several tokens"
  assert not generator._taken


def test_a_batch_gives_each_row_what_it_gets_alone():
  together = speculative("layer_skip", 1, 4)
  rows = together(PROMPTS, 12).tokens
  assert [together([prompt], 12).tokens[0] for prompt in PROMPTS] == rows


def test_a_stop_token_ends_a_row_in_the_midst_of_a_round():
  free = plain("layer_skip")(PROMPTS, 20).tokens
  stops = (free[0][4], free[2][7])
  want = plain("layer_skip", stop_tokens=stops)(PROMPTS, 20).tokens
  assert speculative("layer_skip", 1, 5, stop_tokens=stops)(PROMPTS, 20).tokens == want
  assert {len(row) for row in want} != {20}


def test_watching_ends_a_row_and_leaves_the_others_as_they_are():
  seen = []

  def watch(row, token):
    seen.append((row, token))
    return row == 1 and sum(r == 1 for r, _ in seen) == 3

  want = plain("layer_skip")(PROMPTS, 15).tokens
  found = speculative("layer_skip", 1, 4)(PROMPTS, 15, watch=watch).tokens
  assert found == [want[0], want[1][:3], want[2]]
  assert [token for row, token in seen if row == 2] == want[2]


def test_the_acceptance_is_how_often_the_draft_agrees_on_what_is_accepted():
  method, model, params = family("layer_skip")
  found = speculative("layer_skip", 0, 1)(PROMPTS[:1], 20)
  agrees, at = 0, len(PROMPTS[0]) + 1  # the first new token comes from the prompt
  tokens = PROMPTS[0] + found.tokens[0]
  draft = Generator(method.decoder(model, params, method.submodels(model)[0]), VOCAB, GREEDY)
  rounds = 0
  while at < len(tokens):
    rounds += 1
    right = draft([tokens[:at]], 1).tokens[0][0] == tokens[at]
    agrees += right
    at += 1 + right
  accepted, proposed = found.metrics["accepted"]
  # The host is one round late, so the device may have begun one or two more.
  assert rounds <= proposed <= rounds + 2
  assert agrees <= accepted <= agrees + 2


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=6, top_p=0.9)])
def test_sampling_has_the_distribution_of_the_model_alone(sampling):
  """Chi-squared over each new token, and over pairs of neighbours: a draft's randomness may not be used again."""
  many, few = drawn(plain("layer_skip", sampling)), drawn(speculative("layer_skip", 0, 2, sampling))
  assert_same_distribution(many, few)
  assert not np.array_equal(many[:, 1:], few[:, 1:])  # other randomness, same distribution


def drawn(generator, rows=3000):
  return np.array(generator([[3, 1, 4]] * rows, 4, seed=5).tokens)


def assert_same_distribution(many, few):
  columns = [many[:, i] for i in (1, 2, 3)] + [many[:, i] * VOCAB + many[:, i + 1] for i in (1, 2)]
  others = [few[:, i] for i in (1, 2, 3)] + [few[:, i] * VOCAB + few[:, i + 1] for i in (1, 2)]
  for which, (x, y) in enumerate(zip(columns, others)):
    a, b = (np.bincount(z, minlength=VOCAB**2) for z in (x, y))
    used = a + b >= 10
    statistic = np.sum((a - b)[used] ** 2 / (a + b)[used])
    freedom = used.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (which, statistic, freedom)


def test_sampling_by_any_sequence_of_choices_has_the_distribution_too():
  method, model, params = family("layer_skip")
  sampling = Sampling(temperature=1.0)
  found = SpeculativeGenerator(method.ladder(model, params, None), VOCAB, _Anything(1), sampling)
  assert_same_distribution(drawn(plain("layer_skip", sampling)), drawn(found))


def test_rows_on_a_mesh_say_the_same():
  mesh = tiny.mesh(data=4, tensor=2)
  method, model, params = family("layer_skip")
  spread, _ = tiny.spread(model, params, tiny.packed_batch(CONFIG, rows=8), mesh)
  ladder = method.ladder(model, spread, [method.submodels(model)[1]])
  found = SpeculativeGenerator(ladder, VOCAB, Fixed(0, 3), GREEDY, mesh=mesh)(PROMPTS, 10)
  assert found.tokens == plain("layer_skip")(PROMPTS, 10).tokens


class _Anything:
  """Any sequence of drafts and lengths, no draft among them."""

  most, drafts, learns = 5, (0, 1, 2), True

  def __init__(self, seed):
    self._rng = np.random.default_rng(seed)
    self.begin()

  def choose(self):
    draft, tokens, look = (
      int(self._rng.integers(len(self.drafts))),
      int(self._rng.choice([0, 1, 3, 5])),
      self._rng.random() < 0.3,
    )
    self.made.append(Choice(draft, tokens, bool(look)))
    return self.made[-1]

  def begin(self):
    self.seen, self.taken, self.made, self.seconds = [], [], [], []

  def renew(self):
    """There are no programs yet."""

  def observe(self, metrics, taken, seconds):
    self.seen.append(metrics)
    self.taken.append(taken)
    self.seconds.append(seconds)


@pytest.mark.parametrize("name", ["layer_skip", "early_exit"])
def test_any_sequence_of_choices_gives_the_same_tokens(name):
  method, model, params = family(name)
  choice = _Anything(0)
  choice.drafts = choice.drafts[: len(method.ladder(model, params, None).rungs)]
  found = SpeculativeGenerator(method.ladder(model, params, None), VOCAB, choice, GREEDY)(PROMPTS, 25)
  assert found.tokens == plain(name)(PROMPTS, 25).tokens
  # Rounds are told in the order of their choice; none is begun after what ends all.
  assert choice.taken == [None, *choice.made]
  assert len({c.tokens for c in choice.made} | {0}) == len({c.tokens for c in choice.made}) > 2
  for taken, metrics in zip(choice.taken, choice.seen):
    assert ("agrees" in metrics) is (taken is None or taken.look)
    agreed, number = metrics.get("agrees", metrics.get("right"))
    assert np.all((np.asarray(agreed) >= 0) & (np.asarray(agreed) <= number))


def test_what_is_under_way_ends_before_a_program_is_compiled_whose_seconds_do_not_count(monkeypatch):
  method, model, params = family("layer_skip")
  choice, waits = _Anything(0), []
  generator = SpeculativeGenerator(method.ladder(model, params, None), VOCAB, choice, GREEDY)
  wait = jax.block_until_ready
  monkeypatch.setattr(jax, "block_until_ready", lambda args: waits.append(generator._compiling) or wait(args))
  generator(PROMPTS, 25)
  assert len(waits) == len(set(choice.made))
  assert sorted(set(waits)) == waits, "each before its own program"
  assert len(choice.seconds) == len(choice.made) + 1
  assert all(0 < seconds < 10 for seconds in choice.seconds)


def test_the_chooser_learns_how_often_each_exit_is_right():
  """Its counts are those of the draft's decoder on the same positions, found one by one."""
  method, model, params = family("layer_skip")
  ladder = method.ladder(model, params, None)
  chooser = Chooser(ladder.layers[:-1], ladder.layers[-1], lengths=(1, 3), decay=1.0, looks=(1, 1))
  found = SpeculativeGenerator(ladder, VOCAB, chooser, GREEDY)(PROMPTS[:1], 25)
  assert found.tokens == plain("layer_skip")(PROMPTS[:1], 25).tokens
  full = plain("layer_skip")(PROMPTS[:1], 40)
  tokens = PROMPTS[0] + full.tokens[0]
  batch = {
    "inputs": np.array([tokens], np.int32),
    "segment_ids": np.ones((1, len(tokens)), np.int32),
    "positions": np.arange(len(tokens), dtype=np.int32)[None],
  }
  indices = (0, 1, 2, len(method.submodels(model)) - 1)
  top = [np.asarray(method.forward(model, params, batch, i).logits)[0, :, :VOCAB].argmax(-1) for i in indices]
  for which in range(3):
    same = top[which] == top[3]
    seen = int(chooser._seen)
    # Of the prompt all positions, the last of which is where the first new token comes from; then one after the other.
    assert 5 + 20 <= seen <= 45
    assert chooser._agreed[which] == sum(same[:seen])


def test_the_choice_is_the_best_by_simulated_throughput():
  rates, layers, full = np.array([0.3, 0.7, 0.9]), np.array([1, 3, 6]), 8
  rng = np.random.default_rng(0)
  chooser = Chooser(layers, full, lengths=(1, 2, 4, 8), overhead=0.0, decay=1.0)
  chooser._agreed, chooser._seen = rates * 1e6, 1e6

  def simulated(rate, length, cost):
    right = rng.random((20000, length)) < rate
    return (1 + np.cumprod(right, axis=1).sum(axis=1)).mean() / (length * cost + full)

  table = {(e, d): simulated(rates[e], d, layers[e]) for e in range(3) for d in (1, 2, 4, 8)}
  draft, tokens = chooser.choose()[:2]
  assert table[draft, tokens] > 0.98 * max(table.values())
  assert expected_tokens(0.5, 1) == pytest.approx(1.5)


def test_old_counts_fade_and_new_prompts_begin_anew():
  chooser = Chooser((1, 2), 4, decay=0.5)
  for agreed in (4.0, 0.0):
    chooser.observe({"agrees": (np.array([agreed, 2.0]), 4.0)}, None)
  np.testing.assert_allclose(chooser.rates, [(2.0 + 0.5) / (6 + 1), (3 + 0.5) / (6 + 1)])
  before = chooser.rates
  chooser.observe({"right": (3.0, 4.0)}, Choice(0, 4))
  assert np.all(chooser.rates > before)
  chooser.begin()
  np.testing.assert_array_equal(chooser.rates, [0.5, 0.5])


def test_drafts_without_hope_are_not_taken():
  chooser = Chooser((1, 2), 16)
  chooser.observe({"agrees": (np.array([0.0, 1.0]), 32.0)}, None)
  assert chooser.choose().tokens == 0


def test_a_round_s_layers_are_those_of_its_program():
  """By XLA's count of a round whose layers are written out one by one, beside rounds of other lengths."""
  method = METHODS["unified_skip"]
  model = method.build(tiny.model_config(num_layers=6), method.Config(speedups=(2.0,)))
  ladder = method.ladder(model, tiny.random_params(model), None)
  assert ladder.tails[0] > 0
  (draft, full), tail = ladder.layers, ladder.tails[0]
  below = draft - tail
  assert ladder.calls(0, 3) == 3 * draft + (below + tail) + (full - below)
  assert ladder.layer_tokens(0, 3) == 4 * (full + tail)

  def flops(tokens):
    generator = SpeculativeGenerator(ladder, VOCAB, Fixed(0, max(tokens, 1)), GREEDY)
    rows = Rows(*jnp.zeros((3, 1), jnp.int32), jnp.zeros(1, bool))
    cache = ladder.empty_cache(1, 16)
    function = lambda params: generator._round(Choice(0, tokens), params, cache, rows, rows.done, np.uint32(0))
    return jax.jit(function).lower(ladder.params).compile().cost_analysis()["flops"]

  one, three, five = map(flops, (1, 3, 5))
  assert five - three == pytest.approx(three - one, rel=0.02)
  per_token = (five - three) / 2
  layer = jax.jit(lambda p: _layer(model.config, p)).lower(ladder.params).compile().cost_analysis()["flops"]
  head = 2 * model.config.d_model * model.config.vocab_size
  assert per_token == pytest.approx((full + tail) * layer + 2 * head, rel=0.1)


def _layer(config, params):
  x, context = jnp.ones((1, 1, config.d_model)), decoding.context_of(config, jnp.zeros(1, int), jnp.ones(1, int), 1, 16)
  return decoding.run_layers(config, params["layers"][:1], x, context, [decoding.empty_layer(config, 1, 16)])


@pytest.mark.parametrize("name", [*SETTINGS, "mixture_of_recursions"])
def test_the_full_model_is_no_draft_of_itself(name):
  method = METHODS[name]
  config = CONFIG if name in SETTINGS else tiny.model_config(num_layers=5)
  model = method.build(config, method.Config(**SETTINGS.get(name, {})))
  *_, full = method.submodels(model)
  with pytest.raises(ConfigError, match=f"{full.name} .* cannot draft"):
    method.ladder(model, tiny.random_params(model), [full])


def test_drafts_that_cannot_be_are_refused():
  method, model, params = family("layer_skip")
  with pytest.raises(ConfigError, match="only a fixed depth"):
    method.ladder(model, params, [s for s in method.submodels(model) if "threshold" in s.name][:1])
  method = METHODS["mixture_of_recursions"]
  model = method.build(tiny.model_config(num_layers=5), method.Config(num_recursions=3, routing="token_choice"))
  assert method.ladder(model, None, None) is None
  with pytest.raises(ConfigError, match="under token choice"):
    method.ladder(model, None, method.submodels(model)[:1])
  method, model, params = family("recursive")
  with pytest.raises(ConfigError, match="layers of their own"):
    SpeculativeGenerator(method.ladder(model, params, None), VOCAB, Chooser((1,), 4), GREEDY)
  for tokens in (0, 33):
    with pytest.raises(ConfigError, match=rf"draft_tokens={tokens} must lie in 1 .. 32"):
      Fixed(0, tokens)

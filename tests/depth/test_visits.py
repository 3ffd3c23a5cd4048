"""Visits of layers: both faces of every key/value rule against the slow reference, for arbitrary decisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_visits
import tiny

from adaptive.backbone.transformer import Transformer
from adaptive.depth import replay, visits

CONFIG = tiny.model_config(num_layers=3, qk_norm=True, qkv_bias=True)
ONE_SHOT = jax.jit(replay.one_shot, static_argnums=(0, 4, 5))
RULES = ("project", "copy", "hole")
every_rule = pytest.mark.parametrize("rule", RULES)


def plan(kind, rows, length, most, seed=0):
  """Visits [l, b, t], by token, by row (a prompt), for all, or an exit of each token."""
  rng = np.random.default_rng(seed)
  shape = (CONFIG.num_layers, rows, length)
  if kind == "exits":
    return (np.arange(CONFIG.num_layers)[:, None, None] < rng.integers(0, 4, shape[1:])).astype(np.int32)
  drawn = rng.integers(0, most + 1, shape)
  if kind == "prompt":
    drawn = np.broadcast_to(drawn[:, :, :1], shape)
  if kind == "batch":
    drawn = np.broadcast_to(drawn[:, :1, :1], shape)
  return drawn.astype(np.int32)


@every_rule
@pytest.mark.parametrize(("kind", "most"), [("token", 2), ("prompt", 2), ("batch", 2), ("exits", 1)])
def test_whole_rows_are_the_slow_ones(rule, kind, most):
  params, batch = tiny.random_params(CONFIG), tiny.packed_batch(CONFIG, length=9)
  n = plan(kind, 2, 9, most)
  want = slow_visits.logits(CONFIG, params, batch, n, rule, most)
  found = ONE_SHOT(CONFIG, params, batch, n, rule, most)
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found)[real], want[real], rtol=2e-5, atol=2e-5)


@functools.cache
def played(rule, seed):
  """A decoder with its step compiled, tokens, and their logits of one forward pass."""
  params, batch = tiny.random_params(CONFIG), tiny.one_document(CONFIG, rows=3, length=8)
  n = plan("token", 3, 8, 2, seed)
  want = ONE_SHOT(CONFIG, params, batch, n, rule, 2)
  made, empty, step = replay.decoder(CONFIG, params, jnp.asarray(n), rule, 2)
  return made, empty, jax.jit(step), np.asarray(batch["inputs"]), np.asarray(want)


@every_rule
@pytest.mark.parametrize("calls", [[1] * 8, [3, 1, 1, 3], [8], [5, 3]], ids=str)
def test_steps_are_the_forward_pass_however_the_tokens_are_cut(rule, calls):
  params, empty, step, tokens, want = played(rule, 0)
  cache, start = empty(3, 8), 0
  for count in calls:
    logits, cache, _ = step(params, tokens[:, start : start + count], np.full(3, count, np.int32), cache)
    start += count
    np.testing.assert_allclose(logits, want[:, start - 1], rtol=2e-5, atol=2e-5)


@every_rule
def test_rows_of_different_lengths_do_not_disturb_each_other(rule):
  params, empty, step, tokens, want = played(rule, 0)
  cache, done = empty(3, 8), np.zeros(3, int)
  for counts in ([3, 1, 0], [2, 4, 1], [0, 3, 2], [3, 0, 3]):
    piece = np.ones((3, 4), np.int32)
    for row, count in enumerate(counts):
      piece[row, :count] = tokens[row, done[row] : done[row] + count]
    logits, cache, _ = step(params, piece, np.array(counts, np.int32), cache)
    done += counts
    for row, count in enumerate(counts):
      if count:
        np.testing.assert_allclose(logits[row], want[row, done[row] - 1], rtol=2e-5, atol=2e-5)


@every_rule
def test_one_visit_of_every_layer_is_the_plain_model(rule):
  params, batch = tiny.random_params(CONFIG), tiny.packed_batch(CONFIG)
  ones = np.ones((CONFIG.num_layers, 2, 12), np.int32)
  found = ONE_SHOT(CONFIG, params, batch, ones, rule, 2)
  plain = Transformer(CONFIG).apply({"params": params}, batch)
  real = np.asarray(batch["segment_ids"]) > 0
  np.testing.assert_allclose(np.asarray(found)[real], np.asarray(plain)[real], rtol=1e-5, atol=1e-5)


@every_rule
def test_the_rules_differ_and_a_second_visit_has_keys_of_its_own(rule):
  """Teeth: with one slot for both visits, or another rule, the tests above would have to fail."""
  params, batch = tiny.random_params(CONFIG), tiny.one_document(CONFIG)
  n = plan("token", 2, 8, 2)
  found = {r: np.asarray(ONE_SHOT(CONFIG, params, batch, n, r, 2)) for r in RULES}
  others = [np.abs(found[rule] - found[r]).max() for r in RULES if r != rule]
  assert min(others) > 0.01
  once = np.asarray(ONE_SHOT(CONFIG, params, batch, np.minimum(n, 1), rule, 2))
  assert np.abs(found[rule] - once).max() > 0.01


@every_rule
def test_a_later_token_and_its_decisions_change_nothing_before(rule):
  params, batch = tiny.random_params(CONFIG), tiny.one_document(CONFIG)
  n = plan("token", 2, 8, 2)
  changed = {**batch, "inputs": batch["inputs"].at[:, 5:].add(1) % CONFIG.vocab_size}
  other = np.concatenate([n[:, :, :5], 2 - n[:, :, 5:]], axis=2)
  a = ONE_SHOT(CONFIG, params, batch, n, rule, 2)
  b = ONE_SHOT(CONFIG, params, changed, other, rule, 2)
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert not np.allclose(a[:, 5:], b[:, 5:])


@every_rule
def test_visits_that_no_new_token_makes_are_not_run(rule):
  """Where none is active the program takes the other branch of a conditional, which has no feed-forward in it."""
  params = tiny.random_params(CONFIG)
  x = jnp.ones((1, 1, CONFIG.d_model))
  _, context = Transformer(CONFIG).apply(
    {"params": params}, tiny.one_document(CONFIG, rows=1, length=1), method="embed"
  )
  context = context._replace(slots=jnp.zeros((1, 1), jnp.int32))
  layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
  cache = visits.empty(CONFIG, rule, 1, 1)

  def step(active):
    return visits.step(CONFIG, (layer,), x, context, active, rule, (cache,), visits.nothing(CONFIG, x))[0]

  (conditional,) = [e for e in jax.make_jaxpr(step)(jnp.zeros((1, 1), bool)).eqns if e.primitive.name == "cond"]
  left, run = conditional.params["branches"]
  products = lambda branch: str(branch).count("dot_general")
  assert products(left) == {"project": 2, "copy": 0, "hole": 0}[rule]
  assert products(run) >= 8
  np.testing.assert_array_equal(step(jnp.zeros((1, 1), bool)), x)
  assert not np.allclose(step(jnp.ones((1, 1), bool)), x)


def test_gradients_flow_through_visits_and_stop_where_a_token_stays_away():
  params, batch = tiny.random_params(CONFIG), tiny.one_document(CONFIG)
  n = np.ones((CONFIG.num_layers, 2, 8), np.int32)
  n[1] = 0
  grads = jax.jit(jax.grad(lambda p: jnp.sum(replay.one_shot(CONFIG, p, batch, n, "hole") ** 2)))(params)
  size = lambda layer: max(float(jnp.abs(leaf[layer]).max()) for leaf in jax.tree.leaves(grads["layers"]))
  assert size(0) > 0 < size(2)
  assert size(1) == 0


def test_a_hole_needs_room_for_those_that_visit_and_no_less():
  params, empty, step, tokens, want = played("hole", 0)
  n, full = plan("token", 3, 8, 2), empty(3, 8)
  most = [int((n[layer] > visit).sum(axis=1).max()) for layer in range(CONFIG.num_layers) for visit in range(2)]
  assert max(most[1::2]) < 8  # some of the second visits

  def last_logits(rooms):
    own = tuple(visits.empty(CONFIG, "hole", 3, room) for room in rooms)
    return step(params, tokens, np.full(3, 8, np.int32), full._replace(layers=own))[0]

  np.testing.assert_allclose(last_logits(most), want[:, -1], rtol=2e-5, atol=2e-5)
  assert not np.allclose(last_logits([most[0] - 1, *most[1:]]), want[:, -1], atol=1e-4)


def test_a_hole_cut_back_forgets_whom_it_held_from_there_on():
  cache = visits.empty(CONFIG, "hole", 2, 4)._replace(index=jnp.array([[0, 3, 5, visits.EMPTY], [1, 2, 4, 6]]))
  index = visits.cut_back(cache, jnp.array([4, 2])).index
  none = visits.EMPTY
  np.testing.assert_array_equal(index, [[0, 3, none, none], [1, none, none, none]])


def test_room_is_for_a_share_of_the_tokens():
  assert [visits.room(share, 16) for share in (0.25, 0.3, 1.0, float("inf"))] == [5, 6, 16, 16]

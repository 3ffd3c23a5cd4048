import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from adaptive import losses, routing

quick = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(("capacity", "length", "tokens"), [
  (1 / 3, 255, 85), (2 / 3, 255, 170), (1 / 3, 256, 85), (2 / 3, 256, 170), (1 / 3, 2048, 682), (2 / 3, 2048, 1365),
  (1.0, 2048, 2048), (0.1, 5, 1), (0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57),
])  # fmt: skip
def test_tokens_of_a_capacity_are_rounded_down_but_never_none(capacity, length, tokens):
  assert routing.capacity_tokens(capacity, length) == tokens


@quick
@hypothesis.given(st.integers(1, 64), st.integers(1, 3000), st.data())
def test_a_fraction_is_exact_whatever_floating_point_makes_of_it(parts, length, data):
  some = data.draw(st.integers(1, parts))
  assert routing.capacity_tokens(some / parts, length) == max(some * length // parts, 1)


@pytest.mark.parametrize(("capacity", "length", "chunk", "tokens"), [
  (0.5, 12, 4, 6), (0.6, 12, 4, 9), (1 / 3, 12, 6, 4), (2 / 3, 12, 3, 8), (0.01, 12, 4, 3), (1.0, 12, 4, 12),
])  # fmt: skip
def test_chunks_are_rounded_up_one_by_one(capacity, length, chunk, tokens):
  assert routing.capacity_tokens(capacity, length, chunk) == tokens


@pytest.mark.parametrize(("capacity", "length", "multiple", "tokens"), [
  (1 / 3, 2048, 128, 640), (2 / 3, 2048, 128, 1408), (0.01, 2048, 128, 128), (1.0, 2048, 128, 2048),
  (0.5, 100, 128, 100),
])  # fmt: skip
def test_a_multiple_rounds_to_the_nearest_and_stays_in_the_row(capacity, length, multiple, tokens):
  assert routing.capacity_tokens(capacity, length, multiple=multiple) == tokens


top = jax.jit(routing.top, static_argnums=(1, 2))
first = jax.jit(routing.first, static_argnums=1)
within_budget = jax.jit(routing.within_budget)


@quick
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([(1, 7, 1), (3, 7, 1), (7, 7, 1), (2, 4, 3), (3, 3, 2)]))
def test_top_is_the_highest_of_each_piece_in_order_and_ties_go_to_the_first(seed, sizes):
  each, size, chunks = sizes
  scores = np.random.default_rng(seed).integers(0, 4, (3, size * chunks)).astype(np.float32)
  scores[scores == 0] = -np.inf
  found = np.asarray(top(jnp.asarray(scores), each * chunks, chunks))
  for row in range(3):
    expected = []
    for start in range(0, size * chunks, size):
      best = sorted(range(start, start + size), key=lambda t: (-scores[row, t], t))[:each]
      expected += sorted(best)
    assert found[row].tolist() == expected


def test_a_token_that_is_not_a_number_is_not_taken_for_the_best():
  assert routing.top(jnp.asarray([[0.0, jnp.nan, 1.0]]), 2).tolist() == [[0, 2]]


@quick
@hypothesis.given(st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([1, 3, 8]))
def test_first_keeps_those_that_come_first_and_fills_up(keep, tokens):
  (found,) = first(jnp.asarray([keep]), tokens).tolist()
  wanted = [t for t, k in enumerate(keep) if k][:tokens]
  assert found == sorted(set(found))
  assert len(found) == tokens
  assert [t for t in found if keep[t]] == wanted


@pytest.mark.parametrize("extra", [(), (3,), (2, 2)])
def test_take_and_put_are_numpy_s(extra):
  rng = np.random.default_rng(0)
  x, entries = rng.normal(size=(3, 7, *extra)), rng.normal(size=(3, 4, *extra))
  index = np.array([[0, 1, 2, 3], [1, 3, 5, 6], [0, 2, 4, 6]])
  expected = np.stack([row[i] for row, i in zip(x, index)])
  np.testing.assert_array_equal(routing.take(jnp.asarray(x), jnp.asarray(index)), expected.astype(np.float32))
  for row in range(3):
    x[row, index[row]] = entries[row]
  start = jnp.asarray(rng.normal(size=x.shape))
  start = jnp.where(routing.at(jnp.asarray(index), 7).reshape(3, 7, *[1] * len(extra)), start, jnp.asarray(x))
  np.testing.assert_array_equal(routing.put(start, jnp.asarray(index), jnp.asarray(entries)), x.astype(np.float32))


def test_at_marks_the_positions():
  assert routing.at(jnp.asarray([[0, 3], [1, 2]]), 4).tolist() == [
    [True, False, False, True],
    [False, True, True, False],
  ]


def test_gradients_of_take_and_put_are_those_of_selection_matrices():
  index = jnp.asarray([[0, 2], [1, 3]])
  x, entries, weights = (
    jnp.asarray(np.random.default_rng(s).normal(size=(2, n, 3))) for s, n in ((0, 4), (1, 2), (2, 4))
  )
  keep = np.asarray(routing.at(index, 4))[..., None]
  to_x, to_entries = jax.grad(lambda x, e: jnp.sum(weights * routing.put(x, index, e)), (0, 1))(x, entries)
  np.testing.assert_array_equal(to_x, np.where(keep, 0, weights))
  np.testing.assert_array_equal(to_entries, routing.take(weights, index))
  back = jax.grad(lambda x: jnp.sum(entries * routing.take(x, index)))(x)
  np.testing.assert_array_equal(back, routing.put(jnp.zeros_like(x), index, entries))


def slow_budget(want, positions, share, count):
  passed = []
  for wanted, position in zip(want, positions):
    count = 0 if position == 0 else count
    fits = count + 1 <= math.ceil(min(share, 1) * (position + 1) - 1e-4)
    passed.append(bool(wanted and fits))
    count += passed[-1]
  return passed, count


@quick
@hypothesis.given(
  st.lists(st.tuples(st.booleans(), st.booleans()), min_size=16, max_size=16),
  st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 2 / 3, 0.9, 1.0, 1.5]), st.integers(0, 3),
)  # fmt: skip
def test_within_budget_is_a_count_that_begins_anew_with_each_document(tokens, share, count):
  position, positions = 3, []
  for _, new in tokens:
    position = 0 if new else position + 1
    positions.append(position)
  want = [wanted for wanted, _ in tokens]
  expected, after = slow_budget(want, positions, share, count)
  arrays = jnp.asarray([want]), jnp.asarray([positions])
  passed, left = within_budget(*arrays, share, jnp.asarray([count]))
  assert (passed[0].tolist(), int(left[0])) == (expected, after)
  one, middle = within_budget(*(a[:, :8] for a in arrays), share, jnp.asarray([count]))
  two, end = within_budget(*(a[:, 8:] for a in arrays), share, middle)
  assert one[0].tolist() + two[0].tolist() == expected, "in two parts, the count handed on"
  assert int(end[0]) == after


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.5, 2 / 3, 0.7])
def test_a_budget_lets_no_more_than_its_share_pass_and_as_many(share):
  positions = jnp.arange(300)[None]
  passed, _ = within_budget(jnp.ones((1, 300), bool), positions, share, jnp.zeros(1, jnp.int32))
  so_far = np.cumsum(passed[0])
  np.testing.assert_array_equal(so_far, [math.ceil(round(share * n, 6)) for n in range(1, 301)])


@pytest.mark.parametrize("kind", ["linear", "mlp", "wide_mlp"])
def test_router_logits_are_float32_and_as_the_paper_says(kind):
  config = tiny.model_config(dtype="bfloat16")
  router = routing.Router(config, kind, 3, 2)
  params = tiny.nn.unbox(router.init(jax.random.key(0)))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
  wide = {"linear": 1, "mlp": 2, "wide_mlp": 4}[kind]
  assert params["weight"].shape == (3, wide * 16, 2)
  x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.bfloat16)
  found = routing.router_logits(params, 1, x, 2.0)
  assert found.dtype == jnp.float32
  h = np.asarray(x, np.float64) / 2
  if kind != "linear":
    assert params["hidden"].shape == (3, 16, wide * 16)
    h = h @ np.asarray(params["hidden"][1], np.float64)
    h = h * 0.5 * (1 + scipy.special.erf(h / math.sqrt(2)))
  np.testing.assert_allclose(found, h @ np.asarray(params["weight"][1], np.float64), rtol=1e-5, atol=1e-4)


def test_losses_of_routers_on_hand_worked_numbers():
  logits, mask = jnp.log(jnp.asarray([[3.0, 1.0, 9.0]])), jnp.asarray([[True, True, False]])
  total, count = losses.binary_cross_entropy(logits, jnp.asarray([[True, False, False]]), mask)
  np.testing.assert_allclose([total, count], [-math.log(0.75) - math.log(0.5), 2], rtol=1e-6)
  scores = jnp.log(jnp.asarray([[[1.0, 3.0], [2.0, 2.0], [5.0, 5.0]]]))
  total, count = routing.z_loss(scores, mask)
  np.testing.assert_allclose([total, count], [2 * math.log(4) ** 2, 2], rtol=1e-6)
  even = routing.balance_loss(jnp.full(4, 0.25), jnp.full(4, 0.25))
  np.testing.assert_allclose(even, 1.0)
  np.testing.assert_allclose(routing.balance_loss(jnp.eye(4)[0], jnp.eye(4)[0]), 4.0)
  for extreme in (1e4, -1e4):
    total, _ = losses.binary_cross_entropy(jnp.full((1, 1), extreme), jnp.asarray([[True]]), mask[:, :1])
    np.testing.assert_allclose(total, max(-extreme, 0.0))

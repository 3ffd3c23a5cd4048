import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (2, 5, 7)).astype(np.float32)
TEACHER = RNG.normal(0, 2, (2, 5, 7)).astype(np.float32)
TARGETS = RNG.integers(0, 7, (2, 5))
MASK = np.array([[True, True, False, True, False], [False, False, False, True, True]])


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_token_losses_are_minus_the_log_probability_of_the_target():
  expected = -np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
  np.testing.assert_allclose(losses.token_losses(LOGITS, TARGETS), expected, rtol=1e-5, atol=1e-6)


def test_token_losses_survive_huge_logits():
  np.testing.assert_allclose(losses.token_losses(jnp.array([[[1e4, 0.0]]]), jnp.array([[1]])), [[1e4]])


def test_cross_entropy_sums_over_the_mask_only():
  token = np.asarray(losses.token_losses(LOGITS, TARGETS), np.float64)
  total, count = losses.cross_entropy(LOGITS, TARGETS, MASK)
  assert count == 5
  assert count.dtype == jnp.float32
  assert float(total) == pytest.approx(token[MASK].sum(), rel=1e-6)


def test_soft_cross_entropy_matches_the_formula():
  temperature = 2.5
  soft = np.exp(log_softmax(TEACHER / temperature))
  expected = -(soft * log_softmax(LOGITS / temperature)).sum(-1) * temperature**2
  total, count = losses.soft_cross_entropy(LOGITS, TEACHER, MASK, temperature)
  assert float(total) == pytest.approx(expected[MASK].sum(), rel=1e-5)
  assert count == 5


def test_no_gradient_reaches_the_teacher():
  loss = lambda student, teacher: losses.soft_cross_entropy(student, teacher, MASK, 2.0)[0]
  student, teacher = jax.grad(loss, argnums=(0, 1))(jnp.asarray(LOGITS), jnp.asarray(TEACHER))
  assert not np.any(teacher)
  assert np.all(np.any(student, axis=-1) == MASK)


def test_a_student_equal_to_its_teacher_has_no_gradient():
  loss = lambda student: losses.soft_cross_entropy(student, LOGITS, MASK, 2.0)[0]
  np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(LOGITS)), np.zeros_like(LOGITS), atol=1e-5)


def test_correct_counts_hits_under_the_mask():
  targets = np.where(np.arange(5) % 2, LOGITS.argmax(-1), (LOGITS.argmax(-1) + 1) % 7)
  hits, count = losses.correct(LOGITS, targets, MASK)
  assert (float(hits), float(count)) == (float(MASK[:, 1::2].sum()), 5.0)


def test_the_mean_of_nothing_is_zero():
  assert float(losses.mean((jnp.float32(0), jnp.float32(0)))) == 0
  assert float(losses.mean((jnp.float32(6), jnp.float32(4)))) == 1.5


SEGMENTS = np.array([[1, 1, 1, 1, 0], [1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], np.int32)


def test_all_but_padding_counts_unless_the_batch_says_what_is_scored():
  np.testing.assert_array_equal(losses.counted({"segment_ids": SEGMENTS}), SEGMENTS > 0)
  scored = np.array([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], np.int32)
  np.testing.assert_array_equal(losses.counted({"segment_ids": SEGMENTS, "scored": scored}), scored > 0)


def test_the_prompt_ends_with_the_token_that_predicts_the_answer():
  assert losses.prompt({"segment_ids": SEGMENTS}) is None
  scored = np.array([[0, 0, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], np.int32)
  wanted = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], bool)
  np.testing.assert_array_equal(losses.prompt({"segment_ids": SEGMENTS, "scored": scored}), wanted)


def quadratic(params, shared, entry):
  """A loss that weighs each entry differently, and two metrics."""
  error = params["w"] * entry + params["b"] - shared["x"]
  return jnp.sum(error**2), {"largest": jnp.max(error), "pair": (jnp.sum(error), jnp.float32(3))}


PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([0.1, 0.2, -0.3])}
SHARED = {"x": jnp.array([3.0, 1.0, 2.0]), "tokens": jnp.arange(3)}
ENTRIES = [0.5, -1.0, 2.0, 3.0]


def naive(params, shared=SHARED):
  return sum(quadratic(params, shared, entry)[0] for entry in ENTRIES) / len(ENTRIES)


@pytest.mark.parametrize("entries", [jnp.array(ENTRIES), ENTRIES], ids=["traced", "static"])
def test_mean_over_is_the_mean_and_so_is_its_gradient(entries):
  loss = lambda params: 3.0 * losses.mean_over(quadratic, params, SHARED, entries)[0]
  found = jax.jit(jax.value_and_grad(loss))(PARAMS)
  tiny.assert_trees_close(found, jax.value_and_grad(lambda p: 3.0 * naive(p))(PARAMS), rtol=1e-6)
  assert float(losses.mean_over(quadratic, PARAMS, SHARED, entries)[0]) == pytest.approx(float(naive(PARAMS)), rel=1e-6)


@pytest.mark.parametrize("entries", [jnp.array(ENTRIES), ENTRIES], ids=["traced", "static"])
def test_mean_over_stacks_metrics_with_and_without_a_gradient(entries):
  loss = lambda params: losses.mean_over(quadratic, params, SHARED, entries)
  alone = [quadratic(PARAMS, SHARED, entry)[1] for entry in ENTRIES]
  expected = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
  tiny.assert_trees_close(loss(PARAMS)[1], expected)
  tiny.assert_trees_close(jax.grad(loss, has_aux=True)(PARAMS)[1], expected)


@pytest.mark.parametrize("entries", [jnp.full(64, 0.01), [0.01] * 64], ids=["traced", "static"])
def test_mean_over_adds_gradients_of_bfloat16_parameters_up_in_float32(entries):
  """The first gradient is large; in bfloat16 the others, each too small to change the sum, would all be lost."""
  entries = entries.at[0].set(4.0) if isinstance(entries, jax.Array) else [4.0, *entries[1:]]
  loss = lambda params, shared, entry: (params.astype(jnp.float32) * entry, ())
  mean = jax.jit(jax.grad(lambda params: losses.mean_over(loss, params, None, entries)[0]))
  found = mean(jnp.bfloat16(1.0))
  assert found.dtype == jnp.bfloat16
  assert float(found) == pytest.approx((4 + 63 * 0.01) / 64, rel=2**-8)
  assert mean(jnp.float32(1.0)).dtype == jnp.float32


def test_mean_over_holds_the_residuals_of_one_entry_at_a_time():
  """Sixteen entries need no more memory than two, unlike the derivative of a scan."""

  def loss(params, shared, entry):
    return jnp.sum(jnp.sin(shared @ params * entry) ** 2), ()

  params, shared = jnp.ones((64, 64)), jnp.ones((512, 64))

  def memory(number):
    fn = jax.grad(lambda p: losses.mean_over(loss, p, shared, jnp.arange(number, dtype=jnp.float32))[0])
    return jax.jit(fn).lower(params).compile().memory_analysis().temp_size_in_bytes

  assert memory(16) < 1.2 * memory(2)


def test_static_entries_may_be_anything():
  loss = lambda params, shared, entry: (jnp.sum(params ** len(entry)), jnp.float32(len(entry)))
  total, metrics = losses.mean_over(loss, jnp.array([2.0]), None, ["a", "bb"])
  assert (float(total), metrics.tolist()) == (3.0, [1.0, 2.0])

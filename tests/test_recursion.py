import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adaptive import recursion
from adaptive.backbone.transformer import Transformer
from adaptive.config import ConfigError
from adaptive.recursion import Sharing


@pytest.mark.parametrize(("scheme", "layers", "path"), [
  ("cycle", 9, (0, 1, 2, 0, 1, 2, 0, 1, 2)),
  ("sequence", 9, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
  ("middle_cycle", 11, (0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4)),
  ("middle_sequence", 11, (0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4)),
])  # fmt: skip
def test_layers_of_the_schemes_are_those_of_the_paper_s_table(scheme, layers, path):
  sharing = Sharing(scheme, layers, 3)
  assert sharing.layer_path == path
  assert sharing.block_size == 3
  assert sharing.unique == max(path) + 1


def test_a_loop_after_layers_of_its_own():
  looped = recursion.Looped(prelude=2, block_size=3, num_recursions=2)
  assert looped.layer_path == (0, 1, 2, 3, 4, 2, 3, 4)
  assert (looped.unique, looped.depths) == (5, (5, 8))
  assert [looped.passes(depth) for depth in looped.depths] == [1, 2]
  assert recursion.Looped(0, 2, 2).layer_path == Sharing("cycle", 4, 2).layer_path
  layers = {"w": jnp.arange(8.0)}
  picked = lambda how: looped.tie(layers, how)["w"].tolist()
  assert picked("lower") == [0, 1, 2, 3, 4]
  assert picked("upper") == [0, 1, 5, 6, 7]
  assert picked("average") == [0, 1, 3.5, 4.5, 5.5]


@pytest.mark.parametrize("scheme", ["cycle", "sequence"])
def test_one_recursion_shares_nothing(scheme):
  assert Sharing(scheme, 4, 1).layer_path == (0, 1, 2, 3)
  assert Sharing(f"middle_{scheme}", 4, 1).layer_path == (0, 1, 2, 3)


@pytest.mark.parametrize(("scheme", "layers", "repeats", "message"), [
  ("cycle", 8, 3, "model.num_layers=8 is not 3 x J for method.sharing='cycle'; nearest: 6 and 9"),
  ("sequence", 10, 4, "model.num_layers=10 is not 4 x J for method.sharing='sequence'; nearest: 8 and 12"),
  ("cycle", 2, 3, "nearest: 3"),
  ("middle_cycle", 9, 3, "model.num_layers=9 is not 1 + 3 x J + 1 for method.sharing='middle_cycle'; nearest: 8 "
   "and 11"),
  ("middle_sequence", 30, 3, "nearest: 29 and 32"),
  ("middle_cycle", 2, 3, "nearest: 5"),
  ("middle_cycle", 1, 3, "nearest: 5"),
  ("cycle", 4, 0, "method.num_recursions=0 must be at least 1"),
])  # fmt: skip
def test_a_depth_that_does_not_divide_is_refused_with_the_nearest(scheme, layers, repeats, message):
  with pytest.raises(ConfigError) as error:
    Sharing(scheme, layers, repeats)
  assert str(error.value).endswith(message)
  for near in [int(word) for word in message.partition("nearest:")[2].split() if word.isdecimal()]:
    Sharing(scheme, near, repeats)


@pytest.mark.parametrize(("scheme", "layers", "how", "expected"), [
  ("cycle", 9, "average", ((0, 3, 6), (1, 4, 7), (2, 5, 8))),
  ("sequence", 9, "average", ((0, 1, 2), (3, 4, 5), (6, 7, 8))),
  ("middle_cycle", 11, "average", ((0,), (1, 4, 7), (2, 5, 8), (3, 6, 9), (10,))),
  ("middle_sequence", 11, "average", ((0,), (1, 2, 3), (4, 5, 6), (7, 8, 9), (10,))),
  ("cycle", 9, "stepwise", ((0,), (4,), (8,))),
  ("middle_cycle", 11, "stepwise", ((0,), (1,), (5,), (9,), (10,))),
  ("cycle", 9, "lower", ((0,), (1,), (2,))),
  ("middle_cycle", 11, "lower", ((0,), (1,), (2,), (3,), (10,))),
  ("cycle", 9, "upper", ((6,), (7,), (8,))),
  ("middle_cycle", 11, "upper", ((0,), (7,), (8,), (9,), (10,))),
  ("middle_sequence", 11, "upper", ((0,), (7,), (8,), (9,), (10,))),
])  # fmt: skip
def test_sources_of_each_initialisation(scheme, layers, how, expected):
  assert recursion.sources(Sharing(scheme, layers, 3), how) == expected


def test_stepwise_spreads_over_the_inner_layers():
  """32 layers as the paper's 360M: 1 + 3 x 10 + 1, round(linspace(1, 30, 10))."""
  picked = recursion.sources(Sharing("middle_cycle", 32, 3), "stepwise")
  assert [layer for (layer,) in picked] == [0, 1, 4, 7, 11, 14, 17, 20, 24, 27, 30, 31]


@pytest.mark.parametrize(("scheme", "layers", "inner"), [("cycle", 9, range(9)), ("middle_cycle", 11, range(1, 10))])
def test_random_sources_are_distinct_sorted_layers_decided_by_the_seed(scheme, layers, inner):
  sharing, drawn = Sharing(scheme, layers, 3), set()
  for seed in range(20):
    picked = [layer for (layer,) in recursion.sources(sharing, "random", seed)]
    assert recursion.sources(sharing, "random", seed) == tuple((layer,) for layer in picked)
    if sharing.middle:
      assert (picked[0], picked[-1]) == (0, layers - 1)
      picked = picked[1:-1]
    assert picked == sorted(set(picked))
    assert len(picked) == 3
    drawn |= set(picked)
  assert drawn == set(inner)


def test_tie_takes_or_averages_whole_layers():
  layers = {"w": jnp.arange(11.0)[:, None] * jnp.array([[1.0, 10.0]]), "b": {"scale": jnp.arange(11.0) ** 2}}
  sharing = Sharing("middle_cycle", 11, 3)
  tied = recursion.tie(sharing, layers, "average")
  np.testing.assert_allclose(tied["w"], [[0, 0], [4, 40], [5, 50], [6, 60], [10, 100]])
  np.testing.assert_allclose(tied["b"]["scale"], [0, (1 + 16 + 49) / 3, (4 + 25 + 64) / 3, (9 + 36 + 81) / 3, 100])
  np.testing.assert_allclose(recursion.tie(sharing, layers, "upper")["w"][:, 0], [0, 7, 8, 9, 10])
  assert recursion.tie(sharing, {"w": layers["w"].astype(jnp.bfloat16)}, "average")["w"].dtype == jnp.bfloat16


def test_split_cuts_the_stack_at_the_ends_of_the_block():
  stack = {"w": jnp.arange(5)}
  parts = lambda scheme, layers: [part["w"].tolist() for part in recursion.split(Sharing(scheme, layers, 3), stack)]
  assert parts("middle_cycle", 11) == [[0], [1, 2, 3], [4]]
  assert parts("cycle", 15) == [[], [0, 1, 2, 3, 4], []]


@pytest.mark.parametrize("scheme", ["cycle", "middle_sequence"])
def test_the_block_repeated_is_the_plain_model_with_its_layers_repeated(scheme):
  sharing = Sharing(scheme, 6, 2)
  config = tiny.model_config(num_layers=6)
  unique, batch = tiny.random_params(tiny.model_config(num_layers=sharing.unique)), tiny.packed_batch(config)
  x, context = Transformer(config).apply({"params": unique}, batch, method="embed")

  def run(layers, repeats):
    before, block, after = recursion.split(sharing, layers)
    y, _ = recursion.run_layers(config, before, x, context)
    y = recursion.run_repeated(sharing, config, block, y, context, repeats)
    return recursion.run_layers(config, after, y, context)[0]

  path = np.array(sharing.layer_path)
  repeated = jax.tree.map(lambda leaf: leaf[path], unique["layers"])
  plain = jax.jit(lambda layers: recursion.run_layers(config, layers, x, context)[0])
  once, twice = plain(unique["layers"]), plain(repeated)
  assert np.abs(once - twice).max() > 0.1
  traced = jax.jit(run)
  np.testing.assert_allclose(traced(unique["layers"], 1), once, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(traced(unique["layers"], 2), twice, rtol=1e-4, atol=1e-4)
  static = jax.jit(run, static_argnums=1)
  np.testing.assert_allclose(static(unique["layers"], 2), twice, rtol=1e-4, atol=1e-4)

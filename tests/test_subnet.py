import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from adaptive import subnet as subnets
from adaptive.subnet import Subnet

CONFIG = tiny.model_config(qkv_bias=True)


def numbered():
  """Parameters in which every value occurs once, so that a value says where it was taken from."""
  start = itertools.count()
  shapes = nn.unbox(tiny.shapes(CONFIG))
  return jax.tree.map(lambda leaf: np.array([next(start) for _ in range(leaf.size)]).reshape(leaf.shape), shapes)


PARAMS = numbered()
SUBNETS = [Subnet(path, q, f) for path in ((0,), (0, 1), (0, 2), (0, 1, 2, 3)) for q in (1, 3) for f in (8, 24)]


def values(subnet):
  return set(np.concatenate([np.ravel(x) for x in jax.tree.leaves(subnets.extract(CONFIG, PARAMS, subnet))]).tolist())


def test_one_query_head_per_group_is_head_0_of_every_group():
  attention = subnets.extract(CONFIG, PARAMS, Subnet((0, 1, 2, 3), 1, 24))["layers"]["attention"]
  whole = PARAMS["layers"]["attention"]
  for group in range(CONFIG.num_kv_heads):
    np.testing.assert_array_equal(attention["query"][:, :, group, 0], whole["query"][:, :, group, 0])
    np.testing.assert_array_equal(attention["query_bias"][:, group, 0], whole["query_bias"][:, group, 0])
    np.testing.assert_array_equal(attention["out"][:, group, 0], whole["out"][:, group, 0])
  for name in ("key", "value", "key_bias", "value_bias"):
    np.testing.assert_array_equal(attention[name], whole[name])


def test_feed_forward_channels_are_a_prefix_of_every_group():
  mlp = subnets.extract(CONFIG, PARAMS, Subnet((0, 1, 2, 3), 3, 8))["layers"]["mlp"]
  whole = PARAMS["layers"]["mlp"]
  for group in range(CONFIG.ff_groups):
    np.testing.assert_array_equal(mlp["gate"][:, :, group], whole["gate"][:, :, group, :4])
    np.testing.assert_array_equal(mlp["up"][:, :, group], whole["up"][:, :, group, :4])
    np.testing.assert_array_equal(mlp["down"][:, group], whole["down"][:, group, :4])


@pytest.mark.parametrize("subnet", [*SUBNETS, Subnet((3, 1, 1), 2, 16)], ids=str)
def test_an_extracted_tree_is_that_of_a_plain_model(subnet):
  small = subnets.config_of(CONFIG, subnet)
  extracted = subnets.extract(CONFIG, PARAMS, subnet)
  assert jax.tree.map(np.shape, extracted) == jax.tree.map(np.shape, nn.unbox(tiny.shapes(small)))
  for field in ("head_size", "num_kv_heads", "ff_groups", "d_model"):
    assert getattr(small, field) == getattr(CONFIG, field)
  assert small.q_per_kv == subnet.q_per_kv


@pytest.mark.parametrize("subnet", SUBNETS, ids=str)
def test_a_sub_network_holds_exactly_the_parameters_worked_out_by_hand(subnet):
  inside = tiny.inside(CONFIG, PARAMS, subnet)
  expected = [leaf[keep] for leaf, keep in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(inside))]
  assert values(subnet) == set(np.concatenate(expected).tolist())


def contains(large, small):
  return set(small.layer_path) <= set(large.layer_path) and all(a <= b for a, b in zip(small.widths, large.widths))


def test_a_smaller_sub_network_is_part_of_every_larger_one():
  held = {subnet: values(subnet) for subnet in SUBNETS}
  for large, small in itertools.product(SUBNETS, repeat=2):
    assert (held[small] <= held[large]) == contains(large, small)


def test_extracting_from_an_extracted_network_is_extracting_at_once():
  for large, small in itertools.product(SUBNETS, repeat=2):
    if not contains(large, small):
      continue
    middle_config, middle = subnets.config_of(CONFIG, large), subnets.extract(CONFIG, PARAMS, large)
    within = Subnet(tuple(large.layer_path.index(layer) for layer in small.layer_path), *small.widths)
    again = subnets.extract(middle_config, middle, within)
    tiny.assert_trees_equal(again, subnets.extract(CONFIG, PARAMS, small))
    assert subnets.config_of(middle_config, within) == subnets.config_of(CONFIG, small)


def test_the_full_sub_network_is_the_model():
  full = subnets.prefix(CONFIG)
  tiny.assert_trees_equal(subnets.extract(CONFIG, PARAMS, full), PARAMS)
  assert subnets.config_of(CONFIG, full) == CONFIG


def test_a_head_size_left_to_d_model_stays_when_heads_go():
  config = tiny.model_config(d_model=24, head_dim=0)
  assert subnets.config_of(config, subnets.prefix(config, q_per_kv=1)).head_size == 4

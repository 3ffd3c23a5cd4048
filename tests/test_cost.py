import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from adaptive import cost
from adaptive import subnet as subnets
from adaptive.backbone import decoding
from adaptive.backbone.transformer import Transformer
from adaptive.subnet import Subnet

CONFIGS = {
  "plain": tiny.model_config(),
  "untied": tiny.model_config(tied_embeddings=False),
  "qwen": tiny.model_config(qk_norm=True, qkv_bias=True),
  "untied_qwen": tiny.model_config(qk_norm=True, qkv_bias=True, tied_embeddings=False, num_layers=1),
  "multi_query": tiny.model_config(num_kv_heads=1),
  "multi_head": tiny.model_config(num_heads=4, num_kv_heads=4, head_dim=0, ff_groups=1),
  "half": tiny.model_config(dtype="bfloat16"),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@every_config
def test_parameters_are_those_of_the_model(config):
  params, found = nn.unbox(tiny.shapes(config)), cost.dense_cost(config, 8)
  assert found.params_total == size(params)
  assert found.params_non_embedding == size(params["layers"]) + size(params["final_norm"])
  assert cost.layer_params(config) * config.num_layers == size(params["layers"])


@every_config
def test_active_parameters_leave_out_the_table_that_is_only_looked_up(config):
  params, found = nn.unbox(tiny.shapes(config)), cost.dense_cost(config, 8)
  idle = 0 if config.tied_embeddings else size(params["embedding"]["table"])
  assert found.params_active == size(params) - idle


@every_config
@pytest.mark.parametrize("widths", [(1, 24), (1, 8)])
def test_parameters_of_a_sub_network_are_those_of_its_extracted_tree(config, widths):
  subnet = Subnet(tuple(range(0, config.num_layers, 2)), *widths)
  params = jax.eval_shape(lambda p: subnets.extract(config, p, subnet), nn.unbox(tiny.shapes(config)))
  assert cost.dense_cost(subnets.config_of(config, subnet), 8).params_total == size(params)


@every_config
def test_cache_bytes_are_those_of_a_slot(config):
  one = decoding.empty_layer(config, 1, 7)
  assert cost.dense_cost(config, 8).kv_bytes_per_token == config.num_layers * sum(x.nbytes for x in one) // 7


def xla_flops(config, rows, length):
  params, batch = nn.unbox(tiny.shapes(config)), tiny.one_document(config, rows, length)
  return jax.jit(Transformer(config).apply).lower({"params": params}, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("subnet", [Subnet((0, 1, 2), 4, 512), Subnet((0, 1), 1, 128)], ids=["full", "small"])
def test_flops_agree_with_those_that_xla_counts_in_an_unrolled_model(subnet):
  config = tiny.model_config(
    vocab_size=512, num_layers=3, d_model=256, d_ff=512, num_heads=8, head_dim=64, scan_unroll=3, tied_embeddings=False
  )
  small = dataclasses.replace(subnets.config_of(config, subnet), scan_unroll=len(subnet.layer_path))
  rows, length = 2, 64
  # XLA computes the whole square of scores, so as many keys as positions are attended to: seq_len = 2 * length - 1.
  counted = cost.dense_cost(small, 2 * length - 1).flops_per_token * rows * length
  assert xla_flops(small, rows, length) == pytest.approx(counted, rel=0.02)


def test_attention_is_counted_over_the_mean_length_of_a_causal_mask():
  config, lengths = tiny.model_config(), np.arange(1, 33)
  attended = cost.dense_cost(config, 32).flops_per_token - cost.dense_cost(config, 1).flops_per_token
  per_key = 4 * config.num_heads * config.head_size * config.num_layers
  assert attended == pytest.approx(per_key * (lengths.mean() - 1))

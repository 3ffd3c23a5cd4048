"""What a model costs per token, counted analytically: XLA's own count sees the body of a scanned layer once."""

import dataclasses

from adaptive.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one sub-model, standing alone.

  Attributes:
    params_total: all its parameters; the full model's are all that the run has. params_non_embedding: without the
      embedding table (and an untied head).
    params_active: parameters that take part in computing one token: all but the rows of the embedding table that are
      only looked up. A tied table counts once, as the head.
    flops_per_token: forward pass, a multiply-add counted as two, output head included, attention over the mean length.
    kv_bytes_per_token: key/value cache written per token.
  """

  params_total: int
  params_non_embedding: int
  params_active: int
  flops_per_token: float
  kv_bytes_per_token: int


def with_params(cost: Cost, more: int) -> Cost:
  """The cost of a model with so many parameters more, or fewer, none of them an embedding's."""
  return dataclasses.replace(
    cost,
    params_total=cost.params_total + more,
    params_non_embedding=cost.params_non_embedding + more,
    params_active=cost.params_active + more,
  )


def layer_params(config: ModelConfig) -> int:
  """Parameters of one layer."""
  c, h = config, config.head_size
  attention = 2 * c.d_model * c.num_heads * h + 2 * c.d_model * c.num_kv_heads * h
  bias = (c.num_heads + 2 * c.num_kv_heads) * h if c.qkv_bias else 0
  qk_norm = 2 * h if c.qk_norm else 0
  return attention + bias + qk_norm + 3 * c.d_model * c.d_ff + 2 * c.d_model


def layer_flops(config: ModelConfig, attended: float) -> float:
  """Forward FLOPs of one layer for one token that attends to `attended` keys.

  2 [2 d n h + 2 d k h + 3 d f] for the matrices, 4 t n h for scores and weighted values; norms and rotations, a few
  thousandths of this, are left out.
  """
  c, h = config, config.head_size
  matrices = 2 * c.d_model * c.num_heads * h + 2 * c.d_model * c.num_kv_heads * h + 3 * c.d_model * c.d_ff
  return 2 * matrices + 4 * attended * c.num_heads * h


def key_value_flops(config: ModelConfig) -> float:
  """The part of `layer_flops` that makes a token's keys and values."""
  return 4.0 * config.d_model * config.num_kv_heads * config.head_size


def head_flops(config: ModelConfig) -> float:
  """Forward FLOPs of the output head for one token."""
  return 2.0 * config.vocab_size * config.d_model


def update_flops(forward_flops: float) -> float:
  """FLOPs of forward and backward pass: the backward pass of a matrix product is two products of its size.

  What is computed a second time to save memory (rematerialisation) is not counted, nor is the optimizer.
  """
  return 3.0 * forward_flops


def dense_cost(config: ModelConfig, seq_len: int) -> Cost:
  """Cost of a dense model on sequences of `seq_len` tokens under a causal mask (mean attended length (t + 1) / 2)."""
  c = config
  table = c.vocab_size * c.d_model
  non_embedding = c.num_layers * layer_params(c) + c.d_model
  bytes_per_value = 2 if c.dtype == "bfloat16" else 4
  return Cost(
    params_total=non_embedding + table * (1 if c.tied_embeddings else 2),
    params_non_embedding=non_embedding,
    params_active=non_embedding + table,
    flops_per_token=c.num_layers * layer_flops(c, (seq_len + 1) / 2) + head_flops(c),
    kv_bytes_per_token=2 * c.num_layers * c.num_kv_heads * c.head_size * bytes_per_value,
  )

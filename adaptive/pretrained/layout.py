"""Where each published tensor goes, and how its axes are ours.

A published matrix is [out, in] with heads or channels flattened into one axis; ours keeps them apart and the input
first. Letters as in the backbone: v vocabulary, d d_model, k key/value heads, g query heads of one, h head size, m
feed-forward groups, f channels of one.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from adaptive.config import ModelConfig

Index = tuple[slice, ...]


class Leaf(NamedTuple):
  """One of our parameters.

  Attributes:
    path: in the tree of parameters. name: the published tensor's; with `{}` for the layer where ours is stacked.
    pattern: published axes -> ours, such as `(k h) d -> d k h`.
  """

  path: tuple[str, ...]
  name: str
  pattern: str

  @property
  def stacked(self) -> bool:
    return "{}" in self.name


_WEIGHTS = (
  ("attention_norm.scale", "input_layernorm.weight", "d -> d"),
  ("attention.query", "self_attn.q_proj.weight", "(k g h) d -> d k g h"),
  ("attention.key", "self_attn.k_proj.weight", "(k h) d -> d k h"),
  ("attention.value", "self_attn.v_proj.weight", "(k h) d -> d k h"),
  ("attention.out", "self_attn.o_proj.weight", "d (k g h) -> k g h d"),
  ("mlp_norm.scale", "post_attention_layernorm.weight", "d -> d"),
  ("mlp.gate", "mlp.gate_proj.weight", "(m f) d -> d m f"),
  ("mlp.up", "mlp.up_proj.weight", "(m f) d -> d m f"),
  ("mlp.down", "mlp.down_proj.weight", "d (m f) -> m f d"),
)
_BIASES = (
  ("attention.query_bias", "self_attn.q_proj.bias", "(k g h) -> k g h"),
  ("attention.key_bias", "self_attn.k_proj.bias", "(k h) -> k h"),
  ("attention.value_bias", "self_attn.v_proj.bias", "(k h) -> k h"),
)
_HEAD_NORMS = (
  ("attention.query_norm.scale", "self_attn.q_norm.weight", "h -> h"),
  ("attention.key_norm.scale", "self_attn.k_norm.weight", "h -> h"),
)


def leaves(config: ModelConfig) -> list[Leaf]:
  """Every parameter of a dense model."""
  rows = (*_WEIGHTS, *(_BIASES if config.qkv_bias else ()), *(_HEAD_NORMS if config.qk_norm else ()))
  layers = [Leaf(("layers", *path.split(".")), f"model.layers.{{}}.{name}", form) for path, name, form in rows]
  table = Leaf(("embedding", "table"), "model.embed_tokens.weight", "v d -> v d")
  head = Leaf(("embedding", "head"), "lm_head.weight", "v d -> d v")
  norm = Leaf(("final_norm", "scale"), "model.norm.weight", "d -> d")
  return [table, *([] if config.tied_embeddings else [head]), norm, *layers]


def sizes(config: ModelConfig) -> dict[str, int]:
  """Of every letter."""
  c = config
  heads = dict(k=c.num_kv_heads, g=c.q_per_kv, h=c.head_size)
  return dict(v=c.vocab_size, d=c.d_model, **heads, m=c.ff_groups, f=c.d_ff // c.ff_groups)


class Layout:
  """How one published tensor's axes are ours."""

  def __init__(self, pattern: str, size: dict[str, int]):
    raw, _, ours = pattern.partition(" -> ")
    self._groups = [re.findall(r"\w", group) for group in re.findall(r"\([^)]*\)|\w", raw)]
    self._letters, self._size = [letter for group in self._groups for letter in group], size
    self._ours = ours.split()
    self._order = [self._letters.index(letter) for letter in self._ours]

  @property
  def raw_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self._size[letter] for letter in group) for group in self._groups)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self._size[letter] for letter in self._ours)

  def raw_index(self, index: Index) -> Index:
    """Of the published tensor, the part that holds a part of ours.

    Only the first axis of a group may be cut, as the sharding rules do: the others stay whole, so that the part is one
    range of the published axis.
    """
    at = dict(zip(self._ours, index))
    found = []
    for first, *rest in self._groups:
      whole = all(at[letter].indices(self._size[letter])[:2] == (0, self._size[letter]) for letter in rest)
      assert whole, f"{rest} of {self._groups} must not be cut"
      inner = math.prod(self._size[letter] for letter in rest)
      start, stop, _ = at[first].indices(self._size[first])
      found.append(slice(start * inner, stop * inner))
    return tuple(found)

  def to_ours(self, raw: np.ndarray) -> np.ndarray:
    """A part of the published tensor that `raw_index` names, as that part of ours."""
    split = []
    for size, (_, *rest) in zip(raw.shape, self._groups):
      inner = [self._size[letter] for letter in rest]
      split += [size // math.prod(inner), *inner]
    return raw.reshape(split).transpose(self._order)

  def to_raw(self, ours: np.ndarray) -> np.ndarray:
    """Our whole parameter, of one layer, as published."""
    return ours.transpose(np.argsort(self._order)).reshape(self.raw_shape)


def raw_names(config: ModelConfig) -> Iterator[tuple[Leaf, int | None, str]]:
  """Every published tensor with the parameter that it is, or is a layer of, in the order of a published file."""
  every = leaves(config)
  yield from ((leaf, None, leaf.name) for leaf in every if not leaf.stacked)
  for i in range(config.num_layers):
    yield from ((leaf, i, leaf.name.format(i)) for leaf in every if leaf.stacked)

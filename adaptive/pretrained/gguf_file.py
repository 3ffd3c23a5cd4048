"""A GGUF file: its tensors under the names of a Hugging Face file, and its metadata as a `config.json`."""

import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from adaptive.config import ConfigError, require
from adaptive.pretrained.layout import Index

_TENSORS = {
  "token_embd": "model.embed_tokens",
  "output": "lm_head",
  "output_norm": "model.norm",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
# Architectures whose files hold the rows of queries and keys with the two halves of a head interleaved.
_INTERLEAVED = ("llama",)


class GGUFFile:
  """Tensors dequantised to float32, one at a time, and what the metadata says.

  Raises:
    ConfigError: not a GGUF file, the `gguf` package is missing, or the file holds tensors of unknown names.
  """

  def __init__(self, path: pathlib.Path):
    try:
      import gguf
    except ImportError as error:
      raise ConfigError(f"{path} needs the gguf package: pip install -e '.[pretrained]'") from error
    self._path = path
    try:
      self._reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
      raise ConfigError(f"{path} is not a readable GGUF file: {error}") from error
    self._tensors = {self._name(tensor.name): tensor for tensor in self._reader.tensors}
    self._dequantised = functools.lru_cache(maxsize=1)(self._dequantise)

  def _name(self, name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *block, kind, suffix = name.split(".")
    require(kind in _TENSORS, f"{self._path}: what the tensor {name} is for is not known here")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{_TENSORS[kind]}.{suffix}"

  def field(self, name: str, default: Any = None) -> Any:
    """Of the metadata."""
    found = self._reader.fields.get(name)
    return default if found is None else found.contents()

  def _of_model(self, name: str, default: Any = None) -> Any:
    return self.field(f"{self.field('general.architecture')}.{name}", default)

  def config(self) -> dict[str, Any]:
    """As a `config.json` would say it."""
    heads, width = self._of_model("attention.head_count"), self._of_model("embedding_length")
    scaling = self._of_model("rope.scaling.type", "none")
    require(scaling in ("none", "linear"), f"{self._path}: rotary scaling {scaling!r} is not supported in GGUF files")
    linear = {"rope_type": "linear", "factor": self._of_model("rope.scaling.factor")}
    return {
      "model_type": self.field("general.architecture"),
      "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
      "num_hidden_layers": self._of_model("block_count"),
      "hidden_size": width,
      "intermediate_size": self._of_model("feed_forward_length"),
      "num_attention_heads": heads,
      "num_key_value_heads": self._of_model("attention.head_count_kv", heads),
      "head_dim": self._of_model("attention.key_length") or (width // heads if heads and width else None),
      "rope_theta": _decimal(self._of_model("rope.freq_base", 10000.0)),
      "rope_scaling": linear if scaling == "linear" else None,
      "rms_norm_eps": _decimal(self._of_model("attention.layer_norm_rms_epsilon", 1e-5)),
      "tie_word_embeddings": "lm_head.weight" not in self._tensors,
      "max_position_embeddings": self._of_model("context_length"),
      "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
    }

  def names(self) -> Iterable[str]:
    return self._tensors.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(self._tensors[name].shape))

  def read(self, name: str, index: Index) -> np.ndarray:
    return self._dequantised(name)[index]

  def _dequantise(self, name: str) -> np.ndarray:
    from gguf import quants

    tensor = self._tensors[name]
    values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
    heads = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
    if heads is None or self.field("general.architecture") not in _INTERLEAVED:
      return values
    number = self._of_model(f"attention.{heads}", self._of_model("attention.head_count"))
    # [heads, half, 2, ...] -> [heads, 2, half, ...]
    pairs = values.reshape(number, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _decimal(value: float) -> float:
  """The number that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))

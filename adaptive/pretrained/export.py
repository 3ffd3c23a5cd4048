"""A dense model as a Hugging Face folder, which `transformers` loads without any code of ours."""

import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from adaptive.backbone.transformer import Params
from adaptive.config import ConfigError, DataConfig, ModelConfig
from adaptive.data.tokenizers import Tokenizer, read_tokenizer
from adaptive.pretrained import families
from adaptive.pretrained.layout import Layout, raw_names, sizes
from adaptive.pretrained.safetensors_folder import INDEX, SINGLE

_SHARD = 4 * 2**30  # bytes of one file, and of what is on the host at a time
_BOUNDARY = "<|endoftext|>"


def write(
  folder: pathlib.Path,
  config: ModelConfig,
  params: Params,
  data: DataConfig,
  tokenizer: Tokenizer,
  begins: bool = True,
  stop_tokens: Sequence[int] = (),
  chat_template: str | None = None,
  shard_bytes: int = _SHARD,
) -> None:
  """Writes config, weights and tokenizer.

  Args:
    params: of a dense model, on the devices of this process.
    data: how the model's text was read. tokenizer: made from it.
    begins: whether every text begins with the tokenizer's `bos`, as it does in training here.
    stop_tokens: that end what is generated; the tokenizer's `eos` by default.

  Raises:
    ConfigError: no published family computes what the config does, or the safetensors package is missing.
  """
  ends = list(stop_tokens) or [tokenizer.eos]
  found = families.to_hugging_face(config, data.seq_len, tokenizer.bos, ends[0])
  _dump(folder / "config.json", found)
  _dump(folder / "generation_config.json", {"bos_token_id": tokenizer.bos, "eos_token_id": ends})
  _write_weights(folder, config, params, shard_bytes)
  made = _byte_tokenizer() if data.tokenizer == "bytes" else read_tokenizer(data.tokenizer)
  bos, eos = (made.id_to_token(i) for i in (tokenizer.bos, tokenizer.eos))
  if begins:
    made.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.bos)])
  made.save(str(folder / "tokenizer.json"))
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
  settings |= {"model_max_length": data.seq_len, "clean_up_tokenization_spaces": False}
  _dump(folder / "tokenizer_config.json", settings | ({"chat_template": chat_template} if chat_template else {}))


def _dump(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
  """Every published tensor, brought to the host when it is asked for."""
  size = sizes(config)
  for leaf, layer, name in raw_names(config):
    value = functools.reduce(lambda tree, key: tree[key], leaf.path, params)
    ours = np.asarray(jax.device_get(value if layer is None else value[layer]))
    yield name, np.ascontiguousarray(Layout(leaf.pattern, size).to_raw(ours))


def _write_weights(folder: pathlib.Path, config: ModelConfig, params: Params, shard_bytes: int) -> None:
  """One file, or several of at most so many bytes and an index of them."""
  try:
    from safetensors.numpy import save_file
  except ImportError as error:
    raise ConfigError("Hugging Face folders need the safetensors package: pip install -e '.[pretrained]'") from error
  parts = _parts(config, params, shard_bytes)
  names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
  tensors = _tensors(config, params)
  for part, name in zip(parts, names if len(parts) > 1 else [SINGLE]):
    save_file(dict(itertools.islice(tensors, len(part))), folder / name, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / name)  # the library lets nobody else read it
  if len(parts) > 1:
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    where = {tensor: name for part, name in zip(parts, names) for tensor in part}
    _dump(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _parts(config: ModelConfig, params: Params, shard_bytes: int) -> list[list[str]]:
  """Names of the tensors that lie together in one file, in their order."""
  parts, filled = [[]], 0
  for leaf, layer, name in raw_names(config):
    value = functools.reduce(lambda tree, key: tree[key], leaf.path, params)
    size = value.size * value.dtype.itemsize // (1 if layer is None else config.num_layers)
    if parts[-1] and filled + size > shard_bytes:
      parts.append([])
      filled = 0
    parts[-1].append(name)
    filled += size
  return parts


def _byte_tokenizer() -> tokenizers.Tokenizer:
  """That of `data.tokenizer='bytes'`: a token is a byte, and one more is the boundary of documents."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table of bytes that stand for themselves
  others = iter(range(256, 512))
  letters = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
  made = tokenizers.Tokenizer(models.BPE(letters, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([AddedToken(_BOUNDARY, special=True)])
  return made

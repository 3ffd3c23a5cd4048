"""The tokenizer that a GGUF file carries in its metadata."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from adaptive.config import ConfigError, require

_SPECIAL = (3, 4)  # kinds of token that no text is split into: control, and the user's own
# How text is cut before pairs are merged, by the name under which files tell it: what matches is a piece.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
_DIGITS = ("smollm",)  # cut into single digits
_PLAIN = ("gpt-2", "default")


def read(path: str) -> Tokenizer:
  """The tokenizer of a file.

  Raises:
    ConfigError: not a GGUF file, the `gguf` package is missing, or its kind of tokenizer is not known here.
  """
  try:
    import gguf
  except ImportError as error:
    raise ConfigError(f"data.tokenizer={path!r} needs the gguf package: pip install -e '.[pretrained]'") from error
  try:
    fields = gguf.GGUFReader(path).fields
  except (ValueError, OSError, IndexError, KeyError) as error:
    raise ConfigError(f"data.tokenizer={path!r} is not a readable GGUF file: {error}") from error
  get = lambda name: fields[f"tokenizer.ggml.{name}"].contents() if f"tokenizer.ggml.{name}" in fields else None
  kind, before = get("model"), get("pre") or "default"
  known = (*_SPLITS, *_DIGITS, *_PLAIN)
  require(
    kind == "gpt2" and before in known,
    f"data.tokenizer={path!r}: a tokenizer of kind {kind!r}, {before!r} is not read from GGUF files; put the model's "
    "tokenizer.json beside the file",
  )
  tokens, merges = get("tokens"), [tuple(pair.split(" ", 1)) for pair in get("merges")]
  tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
  tokenizer.pre_tokenizer = _pre_tokenizer(before)
  tokenizer.decoder = decoders.ByteLevel()
  special = [token for token, kind in zip(tokens, get("token_type") or ()) if kind in _SPECIAL]
  tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
  return tokenizer


def _pre_tokenizer(kind: str) -> Any:
  if kind in _PLAIN:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if kind in _DIGITS:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
  pieces = pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated")
  return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

"""Text to token ids and back: bytes, any Hugging Face `tokenizer.json`, or what a GGUF file carries."""

import codecs
import os
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import tokenizers

from adaptive.config import ConfigError, DataConfig, require
from adaptive.data import gguf_tokenizer

# Names under which published tokenizers keep their document boundaries, the first that exists wins. `<|endoftext|>`
# stands before `<|im_end|>`: in chat models that have both, the former separated documents in pre-training.
_BOS_NAMES = (
  "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<|endoftext|>", "<|im_start|>", "[CLS]",
)  # fmt: skip
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "<|im_end|>", "[SEP]")


class TextStream(Protocol):
  """Text of tokens that come one at a time: what `feed` and finally `end` return, joined, is what `decode` says."""

  def feed(self, token: int) -> str: ...

  def end(self) -> str: ...


class Tokenizer(Protocol):
  """What the data pipeline needs of a tokenizer.

  `vocab_size` is one more than the largest id; `bos` and `eos` stand at the two ends of every document (and may be
  one id). `prefix` is what the tokenizer's own template puts before a text. `encode` adds none of them and returns
  int32 [t]; `decode` leaves bos and eos out. `stream` is for the tokens that follow those given, whose text it does not
  repeat.
  """

  vocab_size: int
  bos: int
  eos: int
  prefix: tuple[int, ...]

  def encode(self, text: str) -> np.ndarray: ...

  def decode(self, ids: Iterable[int]) -> str: ...

  def stream(self, after: Iterable[int] = ()) -> TextStream: ...


class ByteTokenizer:
  """Ids 0..255 are the bytes of UTF-8; 256 is the boundary between documents."""

  vocab_size = 257
  bos = 256
  eos = 256
  prefix = ()

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

  def stream(self, after: Iterable[int] = ()) -> TextStream:
    return _ByteStream()


class _ByteStream:
  """Gives a character out with its last byte, and what cannot become one at once."""

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def feed(self, token: int) -> str:
    return self._decoder.decode(bytes([token])) if 0 <= token < 256 else ""

  def end(self) -> str:
    return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer:
  """A tokenizer of the `tokenizers` library, from a `tokenizer.json` or a GGUF file, used for plain text.

  Whatever the file says about truncation, padding and templates is switched off, and a text that spells out a special
  token is encoded as ordinary text: a document cannot forge a boundary.

  Raises:
    ConfigError: the file is missing or invalid, or none of its tokens has a usual name for a document boundary.
  """

  def __init__(self, path: str):
    require(os.path.isfile(path), f"data.tokenizer={path!r}: no such file (it is 'bytes' or a tokenizer.json)")
    self._tokenizer = read_tokenizer(path)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.prefix = tuple(self._tokenizer.encode("").ids)  # what the file's template puts before a text
    self._tokenizer.encode_special_tokens = True
    # Ids may have gaps, so the number of tokens is not a bound on them.
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    bos, eos = self._find(_BOS_NAMES), self._find(_EOS_NAMES)
    if bos is None and eos is None:
      raise ConfigError(f"data.tokenizer={path!r} has no token that marks a document, such as {', '.join(_EOS_NAMES)}")
    self.bos = eos if bos is None else bos
    self.eos = bos if eos is None else eos

  def _find(self, names: tuple[str, ...]) -> int | None:
    found = (self._tokenizer.token_to_id(name) for name in names)
    return next((i for i in found if i is not None), None)

  def encode(self, text: str) -> np.ndarray:
    return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  @property
  def special(self) -> dict[str, str]:
    """The tokens that stand at the two ends of a document, by the names that chat templates have for them."""
    return {"bos_token": self._tokenizer.id_to_token(self.bos), "eos_token": self._tokenizer.id_to_token(self.eos)}

  def encode_marked(self, text: str) -> np.ndarray:
    """Ids of a text in which special tokens are spelled out, as a chat template writes them: int32 [t]."""
    self._tokenizer.encode_special_tokens = False
    try:
      return self.encode(text)
    finally:
      self._tokenizer.encode_special_tokens = True

  def decode(self, ids: Iterable[int]) -> str:
    boundaries = (self.bos, self.eos)
    return self._tokenizer.decode([i for i in map(int, ids) if i not in boundaries], skip_special_tokens=True)

  def stream(self, after: Iterable[int] = ()) -> TextStream:
    return _PieceStream(self.decode, after)


def read_tokenizer(path: str) -> tokenizers.Tokenizer:
  """The library's own object; ConfigError when the file is no tokenizer."""
  if path.endswith(".gguf"):
    return gguf_tokenizer.read(path)
  try:
    return tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # The library raises bare `Exception`.
    reason = " ".join(str(error).split())
    raise ConfigError(f"data.tokenizer={path!r} is not a valid tokenizer.json: {reason}") from error


class _PieceStream:
  """Decodes a few tokens at a time, with and without the newest: what they add is their text.

  The tokens before must be there because many a tokenizer writes a word's blank only where a word precedes it; and a
  token may end within a character, which then waits for its other tokens. It is of four bytes at most, so what is no
  character after four tokens never will be.
  """

  _LONGEST = 4

  def __init__(self, decode: Callable[[Iterable[int]], str], after: Iterable[int]):
    self._decode, self._before, self._new = decode, list(after), []

  def feed(self, token: int) -> str:
    self._new.append(token)
    text = self._added()
    if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._new) < self._LONGEST:
      return ""
    # Without text of their own (boundaries), tokens cannot stand for those before them.
    self._before, self._new = (self._new if text else self._before + self._new), []
    return text

  def end(self) -> str:
    text, self._new = self._added(), []
    return text

  def _added(self) -> str:
    before, both = self._decode(self._before), self._decode(self._before + self._new)
    return both[len(before) :] if both.startswith(before) else self._decode(self._new)


def make_tokenizer(config: DataConfig) -> Tokenizer:
  """The tokenizer that `config.tokenizer` names."""
  return ByteTokenizer() if config.tokenizer == "bytes" else HuggingFaceTokenizer(os.path.expanduser(config.tokenizer))


def prefix_of(tokenizer: Tokenizer, config: DataConfig) -> tuple[int, ...]:
  """Tokens that stand before every question, and before every text that is scored or continued."""
  return (tokenizer.bos,) if config.prefix == "bos" else tokenizer.prefix


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Raises ConfigError when some token would have no row in the model's embedding table."""
  require(
    vocab_size >= tokenizer.vocab_size,
    f"model.vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}",
  )

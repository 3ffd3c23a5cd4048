"""A published model on disk: what kind it is, what its config says, and how its tensors are read."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from adaptive.config import ConfigError, ModelConfig, require
from adaptive.pretrained import families
from adaptive.pretrained.gguf_file import GGUFFile
from adaptive.pretrained.load import Source, check
from adaptive.pretrained.safetensors_folder import SafetensorsFolder

_CONFIG, _TOKENIZER, _GGUF = "config.json", "tokenizer.json", ".gguf"


def is_published(path: str) -> bool:
  """Whether this is a GGUF file or a Hugging Face folder, rather than a run of ours."""
  where = pathlib.Path(path)
  if where.is_file():
    return where.suffix == _GGUF
  return "model_type" in _json(where / _CONFIG)


def require_published(path: pathlib.Path) -> None:
  """ConfigError for anything else; of a folder that holds a GGUF file, with that file's name."""
  inside = sorted(path.glob(f"*{_GGUF}")) if path.is_dir() else []
  hint = f": name the file in it, {inside[0]}" if inside else ""
  require(is_published(str(path)), f"{path} is neither a Hugging Face folder ({_CONFIG}) nor a GGUF file{hint}")


def _json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file's object; empty where there is none."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class Published:
  """A Hugging Face folder or a GGUF file.

  Raises:
    ConfigError: it is neither, or holds a model that the backbone does not compute.
  """

  path: pathlib.Path

  def __post_init__(self):
    require_published(self.path)

  @functools.cached_property
  def _gguf(self) -> GGUFFile | None:
    return GGUFFile(self.path) if self.path.is_file() else None

  @functools.cached_property
  def _config(self) -> dict[str, Any]:
    return self._gguf.config() if self._gguf else _json(self.path / _CONFIG)

  @functools.cached_property
  def config(self) -> ModelConfig:
    return families.to_model_config(self._config, str(self.path))

  @property
  def max_len(self) -> int:
    """Tokens of the longest row; 0 where nothing says so."""
    return families.max_len(self._config)

  @functools.cached_property
  def tokenizer(self) -> str:
    """The file with the tokenizer."""
    beside = (self.path if self.path.is_dir() else self.path.parent) / _TOKENIZER
    if self._gguf is None:
      require(beside.is_file(), f"{self.path} holds no {_TOKENIZER}")
    return str(beside if beside.is_file() else self.path)

  @functools.cached_property
  def chat_template(self) -> str | None:
    """A Jinja template that writes a conversation as the model was trained on them."""
    if self._gguf:
      return self._gguf.field("tokenizer.chat_template")
    file = self.path / "chat_template.jinja"
    if file.is_file():
      return file.read_text(encoding="utf-8")
    found = _json(self.path / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
      found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found

  @functools.cached_property
  def stop_tokens(self) -> tuple[int, ...]:
    """With which the model ends its answer."""
    generation = {} if self._gguf else _json(self.path / "generation_config.json")
    found = generation.get("eos_token_id", self._config.get("eos_token_id"))
    every = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(int(token) for token in every)

  def source(self) -> Source:
    """Its tensors, all there and in the shapes that the config wants."""
    try:
      source = self._gguf or SafetensorsFolder(self.path)
    except ImportError as error:
      raise ConfigError(f"{self.path} needs the safetensors package: pip install -e '.[pretrained]'") from error
    check(source, self.config, str(self.path))
    return source

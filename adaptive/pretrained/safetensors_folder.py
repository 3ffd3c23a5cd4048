"""Tensors of a Hugging Face folder, read in parts."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np

from adaptive.config import ConfigError, require
from adaptive.pretrained.layout import Index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
  """The tensors of `model.safetensors`, or of the files that its index names.

  Raises:
    ConfigError: there is neither, or a file that the index names is missing or damaged.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder, self._files = folder, {}
    self._where = self._find()

  def _find(self) -> dict[str, str]:
    """The file of every tensor."""
    if (self._folder / INDEX).is_file():
      where = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
      missing = sorted({name for name in where.values() if not (self._folder / name).is_file()})
      require(not missing, f"{self._folder} lacks {', '.join(missing)}, which its {INDEX} names")
      return where
    if (self._folder / SINGLE).is_file():
      return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
    other = sorted(path.name for path in self._folder.glob("*.bin"))
    hint = f"; {other[0]} is a pickle, save the model with safe_serialization=True" if other else ""
    raise ConfigError(f"{self._folder} holds neither {SINGLE} nor {INDEX}{hint}")

  def _open(self, name: str):
    if name not in self._files:
      from safetensors import SafetensorError, safe_open

      try:
        self._files[name] = safe_open(self._folder / name, framework="np")
      except (SafetensorError, OSError) as error:
        raise ConfigError(f"{self._folder / name} is damaged: {error}") from error
    return self._files[name]

  def names(self) -> Iterable[str]:
    return self._where.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._open(self._where[name]).get_slice(name).get_shape())

  def read(self, name: str, index: Index) -> np.ndarray:
    """A part of a tensor; no other bytes of the file are read."""
    return self._open(self._where[name]).get_slice(name)[index]

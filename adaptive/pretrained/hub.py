"""From a name to files on disk: a local folder or file, or what the Hugging Face hub has under that name."""

import pathlib
import re

from adaptive.config import ConfigError, require
from adaptive.pretrained.published import require_published

_FILES = ("*.json", "*.safetensors", "*.jinja")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str) -> str:
  """The path of a published model.

  Args:
    name: of a folder or file; or of a repository of the hub, which is downloaded into the hub's own cache.

  Raises:
    ConfigError: nothing is there, it is no published model, or the hub cannot be reached.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    require_published(path)
    return str(path)
  require(bool(_HUB_NAME.fullmatch(name)), f"there is no folder or file {name}")
  by_hand = f"download its {', '.join(_FILES)} into a folder yourself, and name that"
  try:
    import huggingface_hub
  except ImportError as error:
    raise ConfigError(f"there is no folder {name}, and huggingface_hub is not installed: {by_hand}") from error
  try:
    return huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES))
  except Exception as error:  # the library raises those of its HTTP client, which changes
    reason = " ".join(str(error).split())[:120]
    raise ConfigError(f"there is no folder {name}, and the hub gives no such model ({reason}): {by_hand}") from error

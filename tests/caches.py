"""A persistent compilation cache that a test has to itself."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def cache_in(folder: pathlib.Path) -> Iterator[None]:
  """Programs compiled meanwhile, however quickly, are kept in the folder and taken from it; the settings come back."""
  settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
  before = {name: jax.config.values[name] for name in settings}
  for chosen in (settings, before):
    for name, value in chosen.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if chosen is settings:
      yield

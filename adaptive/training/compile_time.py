"""How long a process waited for the compiler, apart from how long its steps take."""

import threading
from collections.abc import Mapping

import jax

# Both names are the same in every version of jax that this project runs on. The first is told for programs that come
# from the persistent cache too, after the second was told by the same thread.
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FROM_CACHE = "/jax/compilation_cache/cache_hits"


class CompileTime:
  """Counts compiled programs while it is open; a context manager, and several may be open at once.

  Attributes:
    compiled: (name, seconds) of every program that XLA compiled.
    cached: names of those that the persistent cache had.
  """

  def __init__(self):
    self.compiled: list[tuple[str, float]] = []
    self.cached: list[str] = []
    self._thread = threading.local()

  def __enter__(self) -> "CompileTime":
    jax.monitoring.register_event_listener(self._event)
    jax.monitoring.register_event_duration_secs_listener(self._duration)
    return self

  def __exit__(self, *error) -> None:
    jax.monitoring.unregister_event_listener(self._event)
    jax.monitoring.unregister_event_duration_listener(self._duration)

  @property
  def seconds(self) -> float:
    """Spent compiling, over all threads."""
    return sum(seconds for _, seconds in self.compiled)

  def slow(self, seconds: float) -> list[str]:
    """Names of the programs that took at least so long to compile."""
    return [name for name, taken in self.compiled if taken >= seconds]

  def metrics(self) -> Mapping[str, float]:
    """`compile_seconds`, `programs_compiled` and `programs_from_cache` so far."""
    return {
      "compile_seconds": self.seconds,
      "programs_compiled": len(self.compiled),
      "programs_from_cache": len(self.cached),
    }

  def __str__(self) -> str:
    """Such as `compiled 3 programs in 12.3 s, 41 more came from the cache`."""
    compiled, cached = len(self.compiled), len(self.cached)
    return f"compiled {compiled} programs in {self.seconds:.1f} s, {cached} more came from the cache"

  def _event(self, event: str, **_) -> None:
    if event == _FROM_CACHE:
      self._thread.hit = True

  def _duration(self, event: str, seconds: float, fun_name: str = "", **_) -> None:
    if event != _COMPILED:
      return
    if getattr(self._thread, "hit", False):
      self.cached.append(fun_name)
    else:
      self.compiled.append((fun_name, seconds))
    self._thread.hit = False

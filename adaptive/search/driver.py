"""Many searches side by side: what all of them ask for is evaluated in one batch."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from adaptive.config import require
from adaptive.search.memory import Found, Search
from adaptive.search.visits import Visits

Key = TypeVar("Key", bound=Hashable)


class Progress(NamedTuple):
  """After a batch.

  Attributes:
    ended: searches. running: that wait for rewards. batches: so far. evaluations: so far, of all searches.
  """

  ended: int
  running: int
  batches: int
  evaluations: int


def search_many(
  searches: Iterable[tuple[Key, Callable[[], Search]]],
  evaluate: Callable[[list[tuple[Key, Visits]]], list[float]],
  width: int,
  report: Callable[[Progress], None] | None = None,
) -> Iterator[tuple[Key, Found]]:
  """What each search found, in the order in which they end.

  A search gets what it asked for and knows of no other: as long as `evaluate` gives a plan of a question the same
  reward in whatever company, what is found of a question depends neither on `width` nor on its neighbours. Its rng
  must be its own.

  Args:
    searches: keys, no two the same, and what makes each search; taken and begun as places become free.
    evaluate: rewards of (key, plan), in the same order.
    width: searches that run side by side at most. A batch holds all that they ask for.
    report: called after every batch, before those that ended are handed out.

  Raises:
    ConfigError: a key that came before, or not one reward for each plan.
  """
  require(width >= 1, f"width={width} must be at least 1")
  begin = _begin(searches)
  running: dict[Key, tuple[Search, list[Visits]]] = {}
  ended = batches = evaluations = 0
  while True:
    while len(running) < width and (first := next(begin, None)):
      key, search = first
      running[key] = (search, next(search))  # whatever it is, a search first asks for the model as it is
    if not running:
      return
    asked = [(key, visits) for key, (_, wanted) in running.items() for visits in wanted]
    rewards = evaluate(asked)
    require(len(rewards) == len(asked), f"{len(asked)} plans were asked for, and {len(rewards)} rewards came back")
    found = _hand_out(running, rewards)
    ended, batches, evaluations = ended + len(found), batches + 1, evaluations + len(asked)
    if report is not None:
      report(Progress(ended, len(running), batches, evaluations))
    yield from found


def _begin(searches: Iterable[tuple[Key, Callable[[], Search]]]) -> Iterator[tuple[Key, Search]]:
  seen = set()
  for key, make in searches:
    require(key not in seen, f"two searches have the key {key!r}")
    seen.add(key)
    yield key, make()


def _hand_out(running: dict[Key, tuple[Search, list[Visits]]], rewards: list[float]) -> list[tuple[Key, Found]]:
  """Sends every search its rewards and notes what it asks for next; takes out those that end, and returns them."""
  found, start = [], 0
  for key, (search, wanted) in list(running.items()):
    stop = start + len(wanted)
    try:
      running[key] = (search, search.send(list(rewards[start:stop])))
    except StopIteration as end:
      found.append((key, end.value))
      del running[key]
    start = stop
  return found

"""Tests that take long, by measurement: `slow.txt` beside this file. conftest.py gives them the marker `slow`.

  pytest -n auto -m 'not faults' --durations=0 --durations-min=0.5 > durations.txt
  python tests/slow_list.py durations.txt

writes the list anew, from one such log or several: of each test the longest time counts.
"""

import pathlib
import re
import sys

FILE = pathlib.Path(__file__).with_name("slow.txt")
SECONDS = 6.0
_LINE = re.compile(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*)")


def names() -> frozenset[str]:
  """Ids of the listed tests."""
  return frozenset(FILE.read_text(encoding="utf-8").splitlines())


def slow(log: str) -> set[str]:
  """Ids of the tests of a log that took longer than `SECONDS`, with what was set up for them."""
  seconds: dict[str, float] = {}
  for found in filter(None, map(_LINE.fullmatch, log.splitlines())):
    seconds[found[2].strip()] = seconds.get(found[2].strip(), 0.0) + float(found[1])
  return {name for name, total in seconds.items() if total > SECONDS}


def there(name: str) -> bool:
  """Whether the test of an id still stands in its file."""
  file, _, test = name.partition("::")
  path, function = FILE.parent.parent / file, test.partition("[")[0]
  return path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8")


if __name__ == "__main__":
  logs = [pathlib.Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
  found = sorted(filter(there, set().union(*map(slow, logs))))
  FILE.write_text("".join(f"{name}\n" for name in found), encoding="utf-8")

"""The list of slow tests: what makes it, what it does, and that it is about tests that there are."""

import slow_list

LOG = """
7.00s call     tests/a.py::test_long[('x', 2)]
4.00s setup    tests/a.py::test_both
2.50s call     tests/a.py::test_both
5.99s call     tests/a.py::test_short
(3 durations < 0.5s hidden.  Use -vv to show these durations.)
"""


def test_setup_and_call_count_together():
  assert slow_list.slow(LOG) == {"tests/a.py::test_long[('x', 2)]", "tests/a.py::test_both"}


def test_every_listed_test_is_there():
  assert slow_list.names()
  assert not [name for name in slow_list.names() if not slow_list.there(name)]
  assert not slow_list.there("tests/test_slow_list.py::test_that_nobody_wrote[1]")


def test_no_listed_test_runs_without_the_marker(request):
  listed = [item for item in request.session.items if item.nodeid in slow_list.names()]
  assert all(item.get_closest_marker("slow") for item in listed)

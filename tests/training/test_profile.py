import gzip
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from adaptive.config import ConfigError
from adaptive.training import profile
from adaptive.training.profile import Profiler, parse_window


def test_a_window_is_two_numbers_of_updates():
  assert parse_window("10:13", 13) == (10, 13)
  assert parse_window("0:1", 300) == (0, 1)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("10", "--profile=10 is not START:STOP, two numbers of updates such as 10:13"),
    ("a:b", "--profile=a:b is not START:STOP, two numbers of updates such as 10:13"),
    ("10:", "--profile=10: is not START:STOP, two numbers of updates such as 10:13"),
    ("-1:3", "--profile=-1:3 is not START:STOP, two numbers of updates such as 10:13"),
    ("1:2:3", "--profile=1:2:3 is not START:STOP, two numbers of updates such as 10:13"),
    ("13:10", "--profile=13:10 is empty: STOP must be larger than START"),
    ("5:5", "--profile=5:5 is empty: STOP must be larger than START"),
    ("5:21", "--profile=5:21 ends after the run's last update, training.steps=20"),
  ],
)
def test_a_window_that_cannot_be_is_told_in_one_line(text, message):
  with pytest.raises(ConfigError) as caught:
    parse_window(text, 20)
  assert str(caught.value) == message


class Died(Exception):  # noqa: N818 - stands for any error of a step
  pass


def train(profiler, first, steps, dies=False):
  """A loop of the shape of the training loop's: the lines that the profiler had for the user."""
  update, state, told = jax.jit(lambda x: jnp.tanh(x @ x)), jnp.eye(64), []
  for step in range(first, steps):
    with profiler.step(step, state):
      state = update(state)
    told.append(profiler.done(step + 1, state))
  if dies:
    raise Died
  return told


def annotations(folder):
  """step_num of each annotation of the one trace below a folder, in order of time, as Perfetto would show them."""
  (file,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  found = sorted((e["ts"], e["args"]["step_num"]) for e in events if e.get("name") == profile.ANNOTATION)
  return [int(step) for _, step in found], events


def test_a_trace_holds_the_updates_of_its_window_and_what_ran_in_them(tmp_path):
  with Profiler((2, 5), tmp_path) as profiler:
    told = train(profiler, 0, 8)
  assert told == [None] * 4 + [f"wrote a trace of updates 3 to 5 to {tmp_path / 'profile'}"] + [None] * 3
  (xplane,) = tmp_path.rglob("*.xplane.pb")
  assert xplane.stat().st_size > 0
  assert re.fullmatch(r"profile/plugins/profile/[^/]+/[^/]+\.xplane\.pb", str(xplane.relative_to(tmp_path)))
  steps, events = annotations(tmp_path)
  assert steps == [3, 4, 5]
  ran = [e["name"] for e in events if "tanh" in e.get("name", "") and not e["name"].startswith("end")]
  assert len(ran) == 3, "what the device ran, and nothing of the updates before"


def test_a_run_that_resumes_inside_the_window_traces_the_rest_of_it(tmp_path):
  with Profiler((2, 5), tmp_path) as profiler:
    train(profiler, 4, 8)
  assert annotations(tmp_path)[0] == [5]


def test_a_run_that_dies_inside_the_window_leaves_what_there_is_and_its_own_error(tmp_path):
  with pytest.raises(Died), Profiler((0, 5), tmp_path) as profiler:
    train(profiler, 0, 2, dies=True)
  assert annotations(tmp_path)[0] == [1, 2]
  with Profiler((0, 1), tmp_path / "another") as profiler:  # the tracer is free again
    train(profiler, 0, 1)
  assert annotations(tmp_path / "another")[0] == [1]


@pytest.mark.parametrize("window", [None, (8, 9)])
def test_outside_a_window_nothing_is_written(tmp_path, window):
  with Profiler(window, tmp_path) as profiler:
    assert train(profiler, 0, 4) == [None] * 4
  assert not list(tmp_path.iterdir())


def test_other_processes_trace_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(profile.jax, "process_index", lambda: 1)
  with Profiler((0, 2), tmp_path) as profiler:
    assert train(profiler, 0, 3) == [None] * 3
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "profile").write_text("")
  message = r"^cannot write .*profile: File exists"
  with Profiler((0, 1), tmp_path) as profiler, pytest.raises(ConfigError, match=message):
    train(profiler, 0, 1)

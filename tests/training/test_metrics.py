import io
import json
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptive.config import ConfigError, TrainingConfig
from adaptive.training import metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_mean_is_exact_over_uneven_parts():
  micro_batches = [{"loss": (jnp.float32(6.0), jnp.int32(3))}, {"loss": (jnp.float32(10.0), jnp.int32(1))}]
  whole = jax.tree.map(jnp.add, *micro_batches)
  assert metrics.mean(whole) == {"loss": 4.0}  # the mean of the two means would be 6
  assert math.isnan(metrics.mean({"loss": (jnp.float32(0.0), jnp.int32(0))})["loss"])


def test_delayed_is_one_step_behind():
  delayed = metrics.Delayed()
  item = {"loss": (jnp.float32(1.0), jnp.float32(1.0))}
  assert delayed.flush() is None
  assert [delayed.push(step, item) for step in (1, 2, 3)] == [None, (1, item), (2, item)]
  assert delayed.flush() == (3, item)
  assert delayed.flush() is None


def test_json_lines_are_flushed_and_always_valid(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = metrics.JsonLines(path, None)
  writer.write(1, {"loss": 2.5, "worst": math.inf, "bad": math.nan, "rows": 7, "array": jnp.float32(0.5)})
  (line,) = lines(path)  # before close
  assert line.pop("time") >= 0
  assert line == {"step": 1, "loss": 2.5, "worst": None, "bad": None, "rows": 7, "array": 0.5}
  assert "NaN" not in path.read_text()
  writer.close()


def test_resume_counts_time_on(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 3, "time": 100.0}\n{"step": 4, "time": 200.0}\n')
  writer = metrics.JsonLines(path, 3)
  writer.write(4, {})
  writer.close()
  assert [line["step"] for line in lines(path)] == [3, 4]
  assert 100.0 <= lines(path)[1]["time"] < 150.0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), last=st.integers(1, 12), every=st.integers(1, 3))
def test_killed_and_resumed_file_reads_as_one_that_never_stopped(tmp_path, data, last, every):
  """Kills a run at any byte after the lines of its checkpoint and resumes it."""

  def run(path, resumed):
    writer = metrics.JsonLines(path, resumed)
    for step in range((resumed or 0) + 1, last + 1):
      if step % every == 0:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()

  def without_time(path):
    return [{k: v for k, v in line.items() if k != "time"} for line in lines(path)]

  straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
  for path in (straight, killed):
    path.unlink(missing_ok=True)
    run(path, None)
  checkpoint = data.draw(st.none() | st.integers(0, last))
  whole = killed.read_bytes()
  least = sum(len(line) for line in whole.splitlines(keepends=True) if json.loads(line)["step"] <= (checkpoint or 0))
  permille = data.draw(st.integers(0, 1000))  # not the byte itself: the length of the times varies between runs
  torn = data.draw(st.sampled_from([b"", b"\xff{"]))
  killed.write_bytes(whole[: least + (len(whole) - least) * permille // 1000] + torn)
  run(killed, checkpoint)
  assert without_time(killed) == without_time(straight)


def test_unwritable_file_is_one_line(tmp_path):
  with pytest.raises(ConfigError, match=r"^cannot write .*nowhere/metrics\.jsonl: No such file or directory$"):
    metrics.JsonLines(tmp_path / "nowhere" / "metrics.jsonl", None)


def _crc32c(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path):
  """Events of a TensorBoard file: records of length, its masked CRC-32C, data, its masked CRC-32C."""
  from tensorboardX.proto import event_pb2

  data, at = path.read_bytes(), 0
  while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    body = data[at + 12 : at + 12 + length]
    assert struct.unpack_from("<I", data, at + 8)[0] == _crc32c(data[at : at + 8])
    assert struct.unpack_from("<I", data, at + 12 + length)[0] == _crc32c(body)
    yield event_pb2.Event.FromString(body)
    at += 16 + length


def test_tensorboard_file_reads_back(tmp_path):
  pytest.importorskip("tensorboardX")
  with metrics.open_writers(tmp_path, TrainingConfig(tensorboard=True), 4, {}) as writers:
    writers.write(5, {"loss": 2.5, "full/accuracy": 0.25})
    writers.write(6, {"loss": math.nan})
  (file,) = (tmp_path / "tensorboard").iterdir()
  events = list(read_events(file))
  found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert found[:2] == [(5, "loss", 2.5), (5, "full/accuracy", 0.25)]
  assert found[2][:2] == (6, "loss")
  assert math.isnan(found[2][2])
  assert [e.step for e in events if e.HasField("session_log")] == [5]  # hides what a killed run wrote from step 5 on
  assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [5, 6]
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
  ("module", "training", "message"),
  [
    ("tensorboardX", {"tensorboard": True}, "tensorboard needs tensorboardX: pip install -e '.[tensorboard]'"),
    ("wandb", {"wandb": "project"}, "wandb needs wandb: pip install -e '.[wandb]'"),
  ],
)
def test_missing_package_says_what_to_install_and_cuts_nothing(tmp_path, monkeypatch, module, training, message):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ConfigError) as caught:
    metrics.open_writers(tmp_path, TrainingConfig(**training), None, {})
  assert str(caught.value) == "training." + message
  assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
  started, logged = [], []
  run = types.SimpleNamespace(log=lambda scalars, step: logged.append((step, scalars)), finish=lambda: None)
  fake = types.SimpleNamespace(init=lambda **arguments: started.append(arguments) or run)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for resumed in (None, 1):
    with metrics.open_writers(tmp_path, TrainingConfig(wandb="project"), resumed, {"seed": 0}) as writers:
      writers.write((resumed or 0) + 1, {"loss": 1.5})
  assert logged == [(1, {"loss": 1.5}), (2, {"loss": 1.5})]
  assert started[0]["id"] == started[1]["id"]
  assert started[0]["project"] == "project"
  assert started[0]["config"] == {"seed": 0}


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  with metrics.open_writers(tmp_path, TrainingConfig(tensorboard=True), None, {}) as writers:
    writers.write(1, {"loss": 1.0})
  assert not list(tmp_path.iterdir())
  stream = io.StringIO()
  with metrics.Progress(1, stream=stream) as progress:
    progress.update(1, 10, 1.0)
    progress.waits("for others")
    progress.message("hello")
  assert stream.getvalue() == ""


class Clock:
  seconds = 0.0

  def __call__(self):
    return self.seconds


def run_progress(stream, steps=30, compile_seconds=60.0):
  clock = Clock()
  with metrics.Progress(steps, stream=stream, clock=clock) as progress:
    for step in range(1, steps + 1):
      clock.seconds += compile_seconds if step == 1 else 2.0
      progress.update(step, tokens=1000, loss=1.0 / step)
  return progress


def test_progress_without_terminal_prints_a_line_every_ten_seconds():
  stream = io.StringIO()
  run_progress(stream)
  shown = stream.getvalue().splitlines()
  assert [line.split()[1] for line in shown] == ["1/30", "6/30", "11/30", "16/30", "21/30", "26/30", "30/30"]
  assert shown[0] == "step 1/30  loss 1.0000"
  assert shown[1] == "step 6/30  loss 0.1667  500 tokens/s  00:48 left"  # a minute of compiling is not in the rate
  assert shown[-1] == "step 30/30  loss 0.0333  500 tokens/s  00:00 left"


def test_progress_prints_the_last_line_once():
  stream = io.StringIO()
  run_progress(stream, steps=6)
  assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/6", "6/6"]


def test_what_is_waited_for_is_shown_when_nothing_else_was():
  stream, clock = io.StringIO(), Clock()
  with metrics.Progress(2, stream=stream, clock=clock) as progress:
    for step in (1, 2):
      progress.update(step, tokens=1000, loss=0.5)
    for done in range(4):
      progress.waits(f"{done} done")
      clock.seconds += 6.0
  shown = [line.split("  ")[0] for line in stream.getvalue().splitlines()]
  assert shown == ["step 1/2", "2 done", "step 2/2"]  # what the steps said last is still said


def test_rate_is_recent_and_can_forget_an_evaluation():
  clock = Clock()
  progress = metrics.Progress(1000, stream=io.StringIO(), clock=clock)
  for step in range(1, 201):
    clock.seconds += 10.0 if step <= 100 else 1.0
    progress.update(step, 100, 0.0)
  assert progress.tokens_per_second == pytest.approx(100.0)
  clock.seconds += 500.0
  progress.restart_rate()
  assert math.isnan(progress.tokens_per_second)
  for step in (201, 202):
    clock.seconds += 1.0
    progress.update(step, 100, 0.0)
  assert progress.tokens_per_second == pytest.approx(100.0)


def test_progress_on_a_terminal_is_a_bar():
  stream = io.StringIO()
  stream.isatty = lambda: True
  run_progress(stream)
  last = stream.getvalue().split("\r")[-1]
  assert last.startswith("30/30 |")
  assert "loss 0.0333  500 tokens/s  00:00 left" in last


def test_a_bar_says_what_is_waited_for_and_then_what_it_said_before():
  stream, clock = io.StringIO(), Clock()
  stream.isatty = lambda: True
  with metrics.Progress(1, stream=stream, clock=clock) as progress:
    progress.update(1, tokens=1000, loss=0.5)
    progress.waits("validation")
    assert "validation" in stream.getvalue().split("\r")[-1]
    progress.restart_rate()
  last = stream.getvalue().split("\r")[-1]
  assert "loss 0.5000" in last
  assert "validation" not in last

import io
import math

import pytest
import tiny_run

from adaptive.training import metrics
from adaptive.training.peak import Peak
from adaptive.training.throughput import Throughput

PEAK = Peak(1e9, "a chip in float32")


class Clock:
  seconds = 0.0

  def __call__(self):
    return self.seconds


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_run.corpus(tmp_path_factory.mktemp("data") / "corpus")


def watched(throughput, choices, stream, compile_seconds=60.0):
  """Progress after an update of two seconds for each choice, the first of which waits for the compiler."""
  clock = Clock()
  progress = metrics.Progress(len(choices), peak=throughput.peak, stream=stream, interval=0.0, clock=clock)
  for step, choice in enumerate(choices, start=1):
    clock.seconds += compile_seconds if step == 1 else 2.0
    progress.update(step, throughput.tokens, 1.0, throughput.flops(choice))
  return progress


def test_flops_of_the_window_s_own_sub_models_over_its_seconds(data):
  run = tiny_run.assemble(data, **{"method.num_sampled": 1, "method.accum_data": "shared"})
  throughput, stream = Throughput(run, PEAK), io.StringIO()
  choices = [(3,), (0,), (0,), (3,)]
  found = throughput.metrics(watched(throughput, choices, stream))
  tokens = 16 * 32
  forward = [run.method.cost(run.model, s, 32, {}).flops_per_token for s in run.method.submodels(run.model)]
  flops = 3 * tokens * (2 * forward[0] + forward[3])  # the first update is before the window
  assert found == {
    "tokens_per_second": pytest.approx(tokens / 2),
    "flops_per_second": pytest.approx(flops / 6),
    "mfu": pytest.approx(flops / 6 / 1e9),
  }
  share = f"{100 * flops / 6 / 1e9:.0f} %"
  assert f"256 tokens/s  {flops / 6 / 1e6:.3g} MFLOP/s  MFU {share}  00:00 left" in stream.getvalue().splitlines()[-1]


def test_nothing_is_told_before_there_is_a_window(data):
  throughput = Throughput(tiny_run.assemble(data, "dense"), PEAK)
  progress = watched(throughput, [(0,)], io.StringIO())
  assert math.isnan(progress.flops_per_second)
  assert throughput.metrics(progress) == {}


def test_an_evaluation_restarts_flops_and_tokens_alike(data):
  throughput = Throughput(tiny_run.assemble(data, "dense"), PEAK)
  progress = watched(throughput, [(0,)] * 4, io.StringIO())
  before = throughput.metrics(progress)
  progress.restart_rate()
  assert throughput.metrics(progress) == {}
  for step in (5, 6):
    progress._clock.seconds += 2.0
    progress.update(step, throughput.tokens, 1.0, throughput.flops((0,)))
  assert throughput.metrics(progress) == pytest.approx(before)


def test_a_run_on_this_machine_is_measured_against_a_matrix_product(data):
  throughput = Throughput(tiny_run.assemble(data, "dense"))
  found = throughput.metrics(watched(throughput, [(0,)] * 3, io.StringIO()))
  assert set(found) == {"tokens_per_second", "flops_per_second", "measured_matmul_peak_share"}
  assert 0 < found["measured_matmul_peak_share"] < 1

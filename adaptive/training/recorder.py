"""What the host does with the metrics of a step: judges, shows and writes them, one step late."""

from collections.abc import Mapping

import jax
import numpy as np

from adaptive.methods.contract import Metrics
from adaptive.training import guard as guards
from adaptive.training import metrics as metric_tools
from adaptive.training.guard import BadUpdate
from adaptive.training.run import Run
from adaptive.training.throughput import Throughput


class Recorder:
  """Takes the metrics of every step, in order.

  Args:
    run: names the sub-models, and says how often to write.
    writers, progress: where the numbers go. throughput: counts the FLOPs.
  """

  def __init__(self, run: Run, writers: metric_tools.Writers, progress: metric_tools.Progress, throughput: Throughput):
    self._run, self._writers, self._progress, self._throughput = run, writers, progress, throughput
    self._delayed = metric_tools.Delayed()
    self._names = [submodel.name for submodel in run.method.submodels(run.model)]

  def push(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of the update just started, which makes `step` of them; deals with those of the one before.

    Raises:
      BadUpdate: that one was bad, and the config wants more than to go on without it.
    """
    self._deal(self._delayed.push(step, metrics))

  def flush(self) -> None:
    """Deals with what is held: due before an evaluation, a checkpoint, and the end. Raises as `push` does."""
    self._deal(self._delayed.flush())

  def _deal(self, held: tuple[int, Metrics] | None) -> None:
    if held is None:
      return
    step, training = held[0], self._run.experiment.training
    choice = self._run.method.sample(self._run.model, self._run.experiment.seed, step - 1)
    values = metric_tools.mean(_by_name(held[1], self._names, choice))
    made, done = self._judge(step, values), self._throughput
    self._progress.update(step, done.tokens, values["loss"], done.flops(choice), int(values["skipped_updates"]))
    if step % training.log_every == 0 or step in (1, training.steps) or not made:
      self._writers.write(step, values | done.metrics(self._progress))

  def _judge(self, step: int, values: dict[str, float]) -> bool:
    """Whether the update was made; takes the guard's words out of the metrics."""
    verdict, in_a_row = int(values.pop("verdict")), int(values.pop("skipped_in_a_row"))
    if verdict == guards.FINE:
      return True
    config = self._run.experiment.training.guard
    action = config.nonfinite if verdict == guards.NOT_FINITE else config.spike
    if action != "skip" or in_a_row > config.limit:
      raise BadUpdate(step, verdict, values["loss"], values["grad_norm"])
    self._progress.message(f"skipped: {BadUpdate(step, verdict, values['loss'], values['grad_norm'])}")
    return False


def _by_name(values: Metrics, names: list[str], choice: tuple[int, ...]) -> Mapping[str, tuple[float, float]]:
  """Replaces metrics that have one value per sub-model of the choice by one metric for each of those sub-models."""
  flat = {}
  for key, (total, count) in jax.device_get(values).items():
    if not np.ndim(total):
      flat[key] = (total, count)
      continue
    for index, *pair in zip(choice, total, count):  # a sub-model drawn twice adds up
      name = f"{key}/{names[index]}"
      flat[name] = tuple(a + b for a, b in zip(flat.get(name, (0.0, 0.0)), pair))
  return flat

"""What a run achieves: tokens per second, FLOP/s, and their share of what the devices could do.

    FLOPs of an update = tokens of the batch x method.update_flops(model, choice, seq_len)
    update_flops       = 3 x forward FLOPs of the sampled sub-models (1 forward, 2 backward)
    MFU                = FLOPs of the window's updates / (seconds of the window x peak of all devices)

The forward pass is counted as in `adaptive.cost`: matrices, the output head, and causal attention over its mean length
(t + 1) / 2; nothing that rematerialisation computes again, no optimizer. Tokens are all positions of the batch, the few
that are padding included. Sub-models differ from step to step, so FLOPs are summed over the same updates that the
tokens are; `adaptive.training.peak` says what the devices could do.
"""

import math

from adaptive.training.metrics import Progress
from adaptive.training.peak import Peak, peak_of
from adaptive.training.run import Run


class Throughput:
  """Counts the FLOPs of a run's updates and names what came of them.

  Args:
    run: what is trained. peak: of its devices; None looks them up, and may time a matrix product.
  """

  def __init__(self, run: Run, peak: Peak | None = None):
    self._run = run
    self.peak = peak or peak_of(list(run.mesh.devices.flat), run.experiment.model.dtype)
    self.tokens = run.experiment.data.batch_size * run.experiment.data.seq_len
    """Positions in a batch."""

  def flops(self, choice: tuple[int, ...]) -> float:
    """Analytic FLOPs of one update of the whole batch with these sub-models."""
    return self.tokens * self._run.method.update_flops(self._run.model, choice, self._run.experiment.data.seq_len)

  def metrics(self, progress: Progress) -> dict[str, float]:
    """Over the recent window: `tokens_per_second`, `flops_per_second` and `mfu`; nothing before there is a window.

    Where the chip is not known, `measured_matmul_peak_share` stands in the place of `mfu`.
    """
    if math.isnan(progress.tokens_per_second):
      return {}
    return {
      "tokens_per_second": progress.tokens_per_second,
      "flops_per_second": progress.flops_per_second,
      self.peak.metric: progress.flops_per_second / self.peak.flops_per_second,
    }

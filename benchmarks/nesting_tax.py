"""What nesting costs and brings: a nested run against dense runs of the same tokens, on the same held-out rows.

  python benchmarks/nesting_tax.py --nested=runs/sorted_net_160 --dense=runs/dense_full --small=runs/dense_small

Prints loss and accuracy of the nested run's full and smallest sub-models, of the dense models of those sizes, and of
the smallest sub-model's part of the full dense model's parameters (what one gets without nested training).
"""

from absl import flags

from adaptive import cli
from adaptive.config import require
from adaptive.data import validation_batches
from adaptive.evaluation import quality
from adaptive.training.run import load_params, load_run

_NESTED = flags.DEFINE_string("nested", "runs/sorted_net_160", "Run of a nested method.")
_DENSE = flags.DEFINE_string("dense", "runs/dense_full", "Dense run of the full size.")
_SMALL = flags.DEFINE_string("small", "runs/dense_small", "Dense run of the smallest size.")


def main(argv: list[str]) -> None:
  cli.use_compilation_cache(_NESTED.value)
  nested, dense, small = (load_run(workdir) for workdir in (_NESTED.value, _DENSE.value, _SMALL.value))
  require(nested.dataset.fingerprint == dense.dataset.fingerprint == small.dataset.fingerprint, "the runs' data differ")
  settings, ends = nested.experiment.evaluation, (0, len(nested.method.submodels(nested.model)) - 1)
  batches = list(validation_batches(nested.dataset.validation, settings.rows, settings.batch_size, nested.mesh))

  def measure(run, params, indices):
    return quality.measure(run.method, run.model, params, batches, run.mesh, indices)

  steps, params = zip(*(load_params(run, workdir) for run, workdir in (
    (nested, _NESTED.value), (dense, _DENSE.value), (small, _SMALL.value))))  # fmt: skip
  require(len(set(steps)) == 1, f"the runs were trained for different numbers of steps: {steps}")
  own = measure(nested, params[0], ends)
  cut = measure(nested, params[1], ends)  # a dense run's parameters fit the nested model: it adds none
  alone = measure(small, params[2], (0,))
  names = [nested.method.submodels(nested.model)[i].name for i in ends]
  rows = [
    (f"nested, {names[1]} (full)", own, 1),
    ("dense of that size", cut, 1),
    (f"nested, {names[0]}", own, 0),
    ("dense of that size", alone, 0),
    ("that part of the full dense model", cut, 0),
  ]
  print(f"{'after ' + str(steps[0]) + ' steps':44} {'loss':>8} {'top-1':>8}")
  for name, found, i in rows:
    print(f"{name:44} {found.loss(i):8.4f} {found.accuracy(i):8.2%}")
  print(f"nesting tax: full {own.loss(1) - cut.loss(1):+.4f} nats, smallest {own.loss(0) - alone.loss(0):+.4f} nats")


if __name__ == "__main__":
  cli.run(main)

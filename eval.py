"""Evaluates every sub-model of a trained run, or draws several runs in one plot.

python eval.py --workdir=runs/demo
python eval.py --compare runs/a runs/b
python eval.py --workdir=runs/demo --extract=depth=3,d_ff=128 --output=runs/small
python eval.py --workdir=runs/demo --extract=depth=3,d_ff=128 --output=models/small --hugging_face
"""

import pathlib

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
_ROWS = flags.DEFINE_integer("rows", None, "Held-out rows; evaluation.rows of the run's config by default.")
_LATENCY = flags.DEFINE_bool("latency", None, "Time the sub-models; evaluation.latency by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change that is not trained, such as method.exit.signal=margin.")
_COMPARE = flags.DEFINE_bool("compare", False, "Draw the runs named after the flags in one plot.")
_EXTRACT = flags.DEFINE_string("extract", None, "Write this sub-model as an ordinary dense run into --output.")
_HUGGING_FACE = flags.DEFINE_bool(
  "hugging_face", False, "With --extract: write a Hugging Face folder instead of a run."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Where results go: by default the workdir, with --set a folder in it, with --compare beside the runs."
)


def main(argv: list[str]) -> None:
  runs = argv[1:]
  if _COMPARE.value and not runs:
    cli.fail("--compare needs runs, such as --compare runs/a runs/b")
  for flag in (_WORKDIR, _STEP, _EXTRACT, _SET):
    if _COMPARE.value and flag.value:
      cli.fail(f"--{flag.name} does not go with --compare, which takes the newest checkpoints of the runs named")
  if _EXTRACT.value is not None and _SET.value:
    cli.fail("--set does not go with --extract")
  if not _COMPARE.value and (runs or not _WORKDIR.value):
    cli.fail(f"unexpected argument {runs[0]!r}" if runs else "--workdir is missing, such as --workdir=runs/demo")

  if _HUGGING_FACE.value and _EXTRACT.value is None:
    cli.fail("--hugging_face goes with --extract")

  from adaptive.training import extraction, reports

  cli.use_compilation_cache(_WORKDIR.value or runs[0])
  settings = {"rows": _ROWS.value, "latency": _LATENCY.value}
  settings = {name: value for name, value in settings.items() if value is not None}
  if _COMPARE.value:
    reports.compare(runs, _OUTPUT.value or str(pathlib.Path(runs[0]).parent / "compare"), **settings)
  elif _EXTRACT.value is not None:
    extraction.extract(_WORKDIR.value, _STEP.value, _EXTRACT.value, _OUTPUT.value, _HUGGING_FACE.value)
  else:
    output = _OUTPUT.value or reports.folder(_WORKDIR.value, _SET.value)
    reports.evaluate(_WORKDIR.value, _STEP.value, output, _SET.value, **settings)


if __name__ == "__main__":
  cli.run(main)

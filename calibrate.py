"""Finds thresholds for the early exits of a trained run, on held-out rows that an evaluation does not use.

python calibrate.py --workdir=runs/early_exit --budget=0.4 --budget=0.6
python calibrate.py --workdir=runs/early_exit --agreement=0.99 --confidence=0.9
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change, such as method.exit.signal=margin.")
_BUDGET = flags.DEFINE_multi_float("budget", [], "Mean FLOPs of a token, as a share of the full model's.")
_AGREEMENT = flags.DEFINE_multi_float("agreement", [], "Share of the tokens that have to be the full model's.")
_CONFIDENCE = flags.DEFINE_float("confidence", 0.9, "With which --agreement has to hold on other text like it.")
_ROWS = flags.DEFINE_integer("rows", None, "Rows to calibrate on; evaluation.rows of the run by default.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if not _WORKDIR.value:
    cli.fail("--workdir is missing, such as --workdir=runs/early_exit")
  if not (_BUDGET.value or _AGREEMENT.value):
    cli.fail("nothing to find: give --budget=0.5 or --agreement=0.99")

  from adaptive.training import calibrate

  cli.use_compilation_cache(_WORKDIR.value)
  goals = calibrate.Goals(tuple(_BUDGET.value), tuple(_AGREEMENT.value), _CONFIDENCE.value)
  calibrate.calibrate(_WORKDIR.value, _STEP.value, goals, _SET.value, _ROWS.value)


if __name__ == "__main__":
  cli.run(main)

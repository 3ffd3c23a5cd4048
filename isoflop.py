"""Trains variants for the same number of FLOPs and draws their losses; the same command again goes on.

python isoflop.py --study=configs/isoflop_demo.py --workdir=runs/isoflop --budgets=3e12,8e12 --seeds=0,1
"""

from absl import flags

from adaptive import cli

_CONFIG = flags.DEFINE_string("study", None, "File with VARIANTS and get_config(variant).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
_BUDGETS = flags.DEFINE_list("budgets", None, "Training FLOPs, such as 3e12,8e12.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds of every variant.")
_VARIANTS = flags.DEFINE_multi_string("variant", [], "Only this variant of the file; may be given several times")
_ACCOUNTING = flags.DEFINE_enum(
  "accounting", "update", ["update", "paper"], "Forward and backward pass with the head, or forward without it."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  for flag in (_CONFIG, _WORKDIR, _BUDGETS):
    if not flag.value:
      cli.fail(f"--{flag.name} is missing")

  from adaptive.training import isoflop

  cli.use_compilation_cache(_WORKDIR.value + "/runs")
  budgets = isoflop.parse_numbers(_BUDGETS.value, "budgets", float)
  seeds = isoflop.parse_numbers(_SEEDS.value, "seeds", int)
  isoflop.compare(
    isoflop.Study(_CONFIG.value, _WORKDIR.value, budgets, seeds, tuple(_VARIANTS.value), _ACCOUNTING.value)
  )


if __name__ == "__main__":
  cli.run(main, saves_on_sigterm=True)

"""Trains the model that a config file describes; the same command again resumes.

python train.py --config=configs/sorted_net_demo.py --workdir=runs/demo --config.training.steps=500
"""

from absl import flags
from ml_collections import config_flags

from adaptive import cli
from adaptive.methods import parse_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; flags override its fields.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, checkpoints.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print parameters, sub-models, mesh and memory; train nothing.")
_CHANGE = flags.DEFINE_bool("change_config", False, "Go on although the workdir holds another config; says how.")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP: trace updates START + 1 to STOP into the workdir.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if _CONFIG.value is None:
    cli.fail("--config is missing, such as --config=configs/sorted_net_demo.py")
  if not _WORKDIR.value and not _DRY_RUN.value:
    cli.fail("--workdir is missing, such as --workdir=runs/demo")
  method, experiment = parse_config(_CONFIG.value)

  # Orbax and the data libraries take seconds to import, a misspelt field should not.
  from adaptive.training import dry_run, loop
  from adaptive.training.profile import parse_window
  from adaptive.training.run import assemble
  from adaptive.training.warm_start import check_source

  window = parse_window(_PROFILE.value, experiment.training.steps) if _PROFILE.value is not None else None
  if _WORKDIR.value:
    cli.use_compilation_cache(_WORKDIR.value, experiment.training.compilation_cache)
  run = assemble(method, experiment)
  if _DRY_RUN.value:
    if experiment.training.init_from:
      check_source(run)
    print(dry_run.describe(run))
  else:
    loop.train(run, _WORKDIR.value, window, _CHANGE.value)


if __name__ == "__main__":
  cli.run(main, saves_on_sigterm=True)

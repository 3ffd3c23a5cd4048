"""Compiles the training step of a config for a TPU topology, without a TPU: memory, collectives, and whether it fits.

  python tpu/compile.py --config=configs/dense_lm.py:1.7b --topology=v5e:16x16
  python tpu/compile.py --config=configs/dense_lm.py:360m --topology=v5e:4x4 --config.training.grad_accum=16

Reads no data, so the config may name files that are not here. Needs libtpu (`pip install -e '.[tpu]'`), which runs on
any Linux machine. Exits with 1 when the step does not fit. What a topology may be called: docs/ahead_of_time.md.
"""

import dataclasses
import json
import sys

from absl import flags
from ml_collections import config_flags

from adaptive import cli
from adaptive.methods import parse_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; flags override its fields.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips of one slice, such as v5e:16x16, v5p:2x2x4 or v6e:8x8.")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices; the mesh's data axis lies across them.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the report to, too.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if _CONFIG.value is None:
    cli.fail("--config is missing, such as --config=configs/dense_lm.py:135m")
  if not _TOPOLOGY.value:
    cli.fail("--topology is missing, such as --topology=v5e:4x4")
  method, experiment = parse_config(_CONFIG.value)

  # Seconds of imports, which a misspelt field should not wait for.
  from adaptive.training import ahead_of_time
  from adaptive.training.run import plan

  devices = ahead_of_time.topology_devices(_TOPOLOGY.value, _NUM_SLICES.value)
  try:
    report = ahead_of_time.compile_plan(plan(method, experiment, devices=devices))
  except ahead_of_time.DoesNotFitError as error:
    print(f"does not fit: {error}", file=sys.stderr)
    sys.exit(1)
  print(ahead_of_time.describe(report))
  if _JSON.value:
    with open(_JSON.value, "w", encoding="utf-8") as file:
      json.dump(_record(report), file, indent=2)


def _record(report) -> dict:
  fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
  found = [{**vars(key), **vars(total)} for key, total in report.collectives.totals.items()]
  return {**fields, "total": report.total, "collectives": found, "unknown_loops": report.collectives.unknown_loops}


if __name__ == "__main__":
  cli.run(main)

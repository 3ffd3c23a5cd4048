"""Compiles several configs for several topologies and writes what came out into docs/ahead_of_time.md.

  nice python tpu/table.py --folder=runs/ahead_of_time

A report that the folder already holds is not made again, so an interrupted table goes on; remove the folder to start
anew. Compilations run one after the other.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "ahead_of_time.md"
BEGIN, END = "<!-- table -->\n", "<!-- end table -->"

# A step has as many rows everywhere. Where the chips are fewer, the rows go through them in more micro-batches.
ROWS, GRAD_ACCUM = 512, {"v5e:16x16": 1, "v6e:8x8": 2, "v5p:2x2x4": 8}
SIZES = ("1.7b", "360m", "135m")
VARIANTS = {
  "dense_lm": SIZES,
  "sorted_net_lm": SIZES,
  "mixture_of_recursions_lm": ("1.7b,3", "730m,3", "360m,3", "135m,3"),
}
CELLS = [
  (config, variant, topology)
  for config, variants in VARIANTS.items()
  for variant in variants
  for topology in GRAD_ACCUM
]

_FOLDER = flags.DEFINE_string("folder", "runs/ahead_of_time", "Where the reports lie.")
_COMPILE = flags.DEFINE_bool("compile", True, "Whether to make the reports that are missing.")


def main(argv: list[str]) -> None:
  folder = pathlib.Path(_FOLDER.value)
  folder.mkdir(parents=True, exist_ok=True)
  for cell in CELLS:
    if _COMPILE.value and not (folder / _name(*cell)).exists():
      compile_cell(folder, *cell)
      write(folder)
  write(folder)


def compile_cell(folder: pathlib.Path, config: str, variant: str, topology: str) -> None:
  """Makes one report; a step that does not fit leaves a report that says so."""
  path = folder / _name(config, variant, topology)
  command = [
    sys.executable, str(HERE / "compile.py"), f"--config={HERE.parent / 'configs' / config}.py:{variant}",
    f"--topology={topology}", f"--config.training.grad_accum={GRAD_ACCUM[topology]}",
    f"--config.data.batch_size={ROWS}", f"--json={path}.part",
  ]  # fmt: skip
  done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  if done.returncode == 1 and "does not fit" in done.stderr:
    path.write_text(json.dumps({"does_not_fit": done.stderr.strip()}))
  elif done.returncode:
    sys.exit(f"error: {' '.join(command)}\n{done.stderr}")
  else:
    pathlib.Path(f"{path}.part").rename(path)


def write(folder: pathlib.Path) -> None:
  """Replaces the table in the page by one of the reports that there are."""
  before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
  _, _, after = rest.partition(END)
  PAGE.write_text(before + BEGIN + markdown(folder) + END + after, encoding="utf-8")


def markdown(folder: pathlib.Path) -> str:
  """The table of a folder's reports."""
  lines = [
    "| config | chips | micro-batches | state | temporaries | total | of the chip | TFLOP a chip | all-gather "
    "| reduce-scatter | all-reduce | other | replicated |",
    "|---|---|" + "--:|" * 11,
  ]
  for config, variant, topology in CELLS:
    path = folder / _name(config, variant, topology)
    if path.exists():
      lines.append(row(f"`{config}.py:{variant}` | {topology} | {GRAD_ACCUM[topology]}", json.loads(path.read_text())))
  return "\n".join(lines) + "\n"


def row(head: str, report: dict) -> str:
  """One line; memory in GiB and collectives in GB of one device, with a + where loops were counted once."""
  if "does_not_fit" in report:
    return f"| {head} | {report['does_not_fit']} |" + " |" * 9
  memory = [f"{report[name] / 2**30:.2f}" for name in ("state", "temporaries", "total")]
  sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "other"), 0)
  for entry in report["collectives"]:
    sent[entry["kind"] if entry["kind"] in sent else "other"] += entry["bytes"]
  cells = [
    *memory, f"{report['total'] / report['hbm']:.0%}", f"{report['flops'] / report['devices'] / 1e12:.1f}",
    *(f"{size / 1e9:.2f}" for size in sent.values()), str(len(report["complaints"])),
  ]  # fmt: skip
  cells[8] += "+" if report["unknown_loops"] else ""
  return f"| {head} | " + " | ".join(cells) + " |"


def _name(config: str, variant: str, topology: str) -> str:
  return f"{config}-{variant.replace(',', '-')}-{topology.replace(':', '-')}.json"


if __name__ == "__main__":
  app.run(main)

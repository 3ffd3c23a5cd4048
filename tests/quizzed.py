"""Question files and workdirs for the tests of search.py and quiz.py, without any training."""

import json
import pathlib
import subprocess
import sys

import tiny
import tiny_run

from adaptive.config_dict import to_json
from adaptive.methods import parse_config
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS
from adaptive.training.workdir import open_workdir

TASKS = pathlib.Path(__file__).parents[1] / "tasks"
DEPTH = {"model.num_layers": 4, "data.seq_len": 64, "data.source": "questions"}


def graded(folder: pathlib.Path, train: int = 12, held_out: int = 12) -> tuple[str, str]:
  """Files of arrows to follow, 1 to 3 of them: to learn from, and held out."""
  command = [sys.executable, TASKS / "make_graded.py", "--kind=pointers", "--levels=1,2,3", "--size=4"]
  command += [f"--train={train}", f"--held_out={held_out}", f"--folder={folder}"]
  subprocess.run(command, check=True, capture_output=True)
  return tuple(str(folder / f"pointers_{split}.jsonl") for split in ("train", "held_out"))


def with_options(path: str, every: int = 1) -> str:
  """The same questions as multiple choice, the right one in its turn; of `every` > 1 only each of so many."""
  lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
  for number, line in enumerate(lines):
    if number % every == 0:
      right, wrong = line["answer"], [digit for digit in "0123" if digit != line["answer"]][: 1 + number % 3]
      place = number // 2 % (len(wrong) + 1)
      long = ((" it is", ""), ("", " it is"), ("", ""))[number % 3]  # the right one, the wrong ones, or neither
      wrong = [digit + long[1] for digit in wrong]
      line["options"], line["answer"] = [*wrong[:place], right + long[0], *wrong[place:]], place
  chosen = pathlib.Path(path).with_suffix(f".options{every}.jsonl")
  chosen.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(chosen)


def made(folder: pathlib.Path, method: str = "dense", change=lambda params: params, **fields) -> str:
  """A workdir with random parameters, in which every layer matters; `change` may lay a hand on them."""
  module, experiment = parse_config(tiny_run.config("/gone", method, **{**DEPTH, **fields}))
  params = change(tiny.random_params(module.build(experiment.model, experiment.method)))
  opened = open_workdir(folder, to_json(experiment, method))
  with Checkpointer(opened / CHECKPOINTS, keep=1) as checkpointer:
    checkpointer.save(8, {"params": params}, {"step": 8})
  return str(folder)

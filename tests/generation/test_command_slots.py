"""generate.py --slots: prompts through slots say what they say step by step."""

import re

import pytest
import tiny
import tiny_run

from adaptive.config import ConfigError
from adaptive.config_dict import to_json
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.generation.sampling import Sampling
from adaptive.methods import parse_config
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.completion import Request, complete
from adaptive.training.run import CHECKPOINTS
from adaptive.training.workdir import open_workdir

PROMPTS = ("the ", "quick", "", "fo")


def made(folder, method):
  """A workdir of a run with random parameters."""
  built, experiment = parse_config(tiny_run.config("/gone", method, **{"data.seq_len": 64}))
  params = tiny.random_params(built.build(experiment.model, experiment.method))
  params["embedding"]["table"] = params["embedding"]["table"].at[ByteTokenizer().eos].multiply(4)  # documents that end
  with Checkpointer(open_workdir(folder, to_json(experiment, method)) / CHECKPOINTS, keep=1) as checkpointer:
    checkpointer.save(1, {"params": params}, {"step": 1})
  return str(folder)


def test_text_is_that_of_batches(tmp_path, capsys):
  workdir, shown = made(tmp_path / "run", "mixture_of_recursions"), {}
  for slots in (0, 3):
    complete(workdir, Request(PROMPTS, Sampling(), max_new_tokens=12, seed=4, stop="z", slots=slots))
    shown[slots] = capsys.readouterr()
  assert shown[3].out == shown[0].out
  assert shown[3].out.startswith("--- 1\nthe ")
  summary = r"(\d+) tokens of 4 prompts, [\d.]+ tokens/s with prompts; \d+ ticks with \d+% of the slots at work\n"
  number = int(re.fullmatch(summary, shown[3].err)[1])
  assert 4 < number < 4 * 12, "some end with their document, some do not"
  assert shown[0].err.startswith(f"{number} tokens: ")


def test_a_method_whose_tokens_all_take_one_path_has_no_slots(tmp_path):
  workdir = made(tmp_path / "run", "dense")
  with pytest.raises(ConfigError, match="has no depth-wise batching: leave out --slots"):
    complete(workdir, Request(PROMPTS, Sampling(), max_new_tokens=12, slots=2))
  with pytest.raises(ConfigError, match="slots=-1 must be at least 1"):
    complete(workdir, Request(PROMPTS, Sampling(), slots=-1))

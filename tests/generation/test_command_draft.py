"""generate.py --draft: the same text from a part of the model and the rest, and what cannot be in one line."""

import re

import jax
import pytest
import tiny
import tiny_run

from adaptive.config import ConfigError
from adaptive.config_dict import to_json
from adaptive.generation.sampling import Sampling
from adaptive.methods import parse_config
from adaptive.training import completion
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS
from adaptive.training.workdir import open_workdir


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """A run of each of two methods with random parameters, by name."""
  made = {}
  for name in ("early_exit", "dense"):
    method, experiment = parse_config(tiny_run.config("/gone", name, **{"data.seq_len": 64}))
    params = tiny.random_params(method.build(experiment.model, experiment.method))
    made[name] = str(tmp_path_factory.mktemp(name))
    folder = open_workdir(made[name], to_json(experiment, name))
    with Checkpointer(folder / CHECKPOINTS, keep=1) as checkpointer:
      checkpointer.save(1, {"params": jax.tree.map(lambda x: x, params)}, {"step": 1})
  return made


def text(capsys, workdir, *prompts, **settings):
  settings = {"max_new_tokens": 20, "sampling": Sampling(temperature=0), **settings}
  completion.complete(workdir, completion.Request(prompts=prompts, **settings))
  return capsys.readouterr()


@pytest.mark.parametrize("draft", ["depth=1", "auto"])
@pytest.mark.parametrize("prompts", [("the ",), ("the ", "é€", "")])
def test_a_draft_changes_no_text(workdirs, capsys, draft, prompts):
  want = text(capsys, workdirs["early_exit"], *prompts)
  found = text(capsys, workdirs["early_exit"], *prompts, draft=draft, draft_tokens=3)
  assert found.out == want.out
  assert "tokens_per_round" in found.err
  assert "tokens_per_round" not in want.err


def test_auto_says_what_it_took_and_nothing_where_there_was_no_round(workdirs, capsys):
  greedy = text(capsys, workdirs["early_exit"], "the ", draft="auto").err
  assert re.search(r"tokens_per_round.*; \d+ rounds to time the drafts", greedy)
  said = r"tokens_per_round.*; \d+ of \d+ rounds?: (\d+ tokens? drafted by 1 layer;?|no draft)"
  assert re.search(said, text(capsys, workdirs["early_exit"], "the ", draft="auto", sampling=Sampling()).err)
  assert "rounds" not in text(capsys, workdirs["early_exit"], "the ", draft="auto", max_new_tokens=1).err


def test_a_stop_text_and_a_setting_that_is_not_trained_go_with_it(workdirs, capsys):
  plain = text(capsys, workdirs["early_exit"], "the ").out
  stop = plain[10:12]
  settings = dict(stop=stop, changes=("method.exit.thresholds=(0.25,)",))
  want = text(capsys, workdirs["early_exit"], "the ", **settings).out
  assert text(capsys, workdirs["early_exit"], "the ", draft="depth=1", **settings).out == want
  assert text(capsys, workdirs["early_exit"], "the ", submodel="threshold=0.25", **settings).out


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("early_exit", dict(draft="depth=2"), "is the full model itself"),
    ("early_exit", dict(draft="threshold=0.5"), "only a fixed depth can draft"),
    ("early_exit", dict(draft="deepth=1"), "did you mean depth=1"),
    ("early_exit", dict(draft="depth=1", draft_tokens=0), "draft_tokens=0 must lie in 1 .. 32"),
    ("early_exit", dict(draft="depth=1", submodel="depth=1"), "leave out --submodel"),
    ("early_exit", dict(draft="depth=1", slots=2), "choose one"),
    ("dense", dict(draft="auto"), "no sub-model of this run can draft"),
  ],
)
def test_what_cannot_be_is_one_line(workdirs, capsys, name, settings, message):
  with pytest.raises(ConfigError, match=message):
    text(capsys, workdirs[name], "the ", **settings)

"""generate.py from end to end, on a run with random parameters whose training data are gone."""

import re
import signal

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from places import Place, wait_until

from adaptive.config_dict import to_json
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.methods import parse_config
from adaptive.training.checkpoint import Checkpointer
from adaptive.training.run import CHECKPOINTS
from adaptive.training.workdir import open_workdir

TOKENIZER, NEW = ByteTokenizer(), 20
PROMPTS = ["the ", "é€", ""]
SMALL = "depth=1,d_ff=16"
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return Place(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def made(place):
  """A workdir, and what continues prompts with its sub-model of a number, in this process."""
  method, experiment = parse_config(tiny_run.config("/gone", **{"data.seq_len": 64}))
  params = tiny.random_params(experiment.model)
  workdir = place.folder / "runs" / "made"
  folder = open_workdir(workdir, to_json(experiment, "sorted_net"))
  with Checkpointer(folder / CHECKPOINTS, keep=2) as checkpointer:
    for step, scale in ((4, 0.5), (8, 1.0)):
      checkpointer.save(step, {"params": jax.tree.map(lambda x, s=scale: s * x, params)}, {"step": step})
  model = method.build(experiment.model, experiment.method)

  def expected(prompts, index=-1, sampling=GREEDY, scale=1.0):
    scaled = jax.tree.map(lambda x: scale * x, params)
    decoder = method.decoder(model, scaled, method.submodels(model)[index])
    generator = Generator(decoder, TOKENIZER.vocab_size, sampling, stop_tokens=(TOKENIZER.eos,))
    tokens = generator([[TOKENIZER.bos, *prompt.encode()] for prompt in prompts], NEW, seed=5).tokens
    return [prompt + TOKENIZER.decode(row) for prompt, row in zip(prompts, tokens)]

  return workdir, expected


@pytest.fixture(scope="module")
def told(place, made):
  command = ["generate.py", f"--workdir={made[0]}", f"--max_new_tokens={NEW}", "--seed=5", f"--prompt={PROMPTS[0]}"]
  more = [f"--prompt={prompt}" for prompt in PROMPTS[1:]]
  stop = made[1](PROMPTS[:1])[0][9:11]
  return place.run_many({
    "one": [*command, "--temperature=0"],
    "stop": [*command, "--temperature=0", f"--stop={stop}"],
    "step": [*command, "--temperature=0", "--step=4", "--max_new_tokens=61", "--max_len=66"],
    "several": [*command, *more, "--top_k=50", "--top_p=0.9", f"--submodel={SMALL}"],
    "no step": [*command, "--step=5"],
  })  # fmt: skip


@pytest.mark.slow
def test_one_prompt_and_its_continuation(made, told):
  (expected,) = made[1](PROMPTS[:1])
  assert told["one"]["code"] == 0, told["one"]["err"]
  assert told["one"]["out"] == expected + "\n"
  assert len(expected) > len(PROMPTS[0]) + 5
  number = r"\d+(\.\d)?"
  assert re.fullmatch(rf"\d+ tokens: prompt in {number} ms, {number} tokens/s after the first\n", told["one"]["err"])


@pytest.mark.slow
def test_the_text_ends_before_the_stop_text(made, told):
  (whole,) = made[1](PROMPTS[:1])
  assert told["stop"]["out"] == whole[: whole.index(whole[9:11], len(PROMPTS[0]))] + "\n"
  assert len(told["stop"]["out"]) < len(whole)


@pytest.mark.slow
def test_an_earlier_checkpoint_and_more_than_the_trained_length(made, told):
  assert told["step"]["code"] == 0, told["step"]["err"]
  expected = made[1](PROMPTS[:1], scale=0.5)[0]
  assert told["step"]["out"].startswith(expected.rstrip("\N{REPLACEMENT CHARACTER}"))
  assert not told["step"]["out"].startswith(told["one"]["out"].rstrip("\n"))
  assert told["step"]["err"].startswith("61 tokens: ")
  assert told["no step"]["code"] == 2
  assert "no checkpoint of step 5 in" in told["no step"]["err"]


@pytest.mark.slow
def test_several_prompts_and_a_sub_model(made, told):
  texts = made[1](PROMPTS, 0, Sampling(top_k=50, top_p=0.9))
  assert told["several"]["code"] == 0, told["several"]["err"]
  assert told["several"]["out"] == "".join(f"--- {i}\n{text}\n" for i, text in enumerate(texts, 1))
  assert re.match(r"\d+ tokens: 3 prompts in ", told["several"]["err"])
  assert np.unique([len(text) for text in texts]).size > 1


@pytest.mark.slow
def test_text_comes_while_the_program_runs_and_ctrl_c_ends_it(place, made):
  endless = ["generate.py", f"--workdir={made[0]}", "--prompt=x", "--max_new_tokens=100000", "--max_len=200000"]
  with place.started(*endless) as process:
    first = process.stdout.read(20)
    wait_until(lambda: first.startswith("x"), process, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert err == "interrupted\n"
  assert len(first) == 20
  assert out.endswith("\n")


def test_who_reads_no_further_ends_it_quietly(place, made):
  with place.started("generate.py", f"--workdir={made[0]}", "--max_new_tokens=40", "--prompt=the ") as process:
    assert process.stdout.read(1) == "t"
    process.stdout.close()
    assert process.wait(timeout=200) == 141
    assert "Traceback" not in process.stderr.read()

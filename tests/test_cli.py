"""The command line from end to end: real processes for the whole path, forks of one process for every bad input."""

import json
import os
import pathlib

import pytest
import tiny_run
from places import Place

from adaptive import methods
from adaptive.config_dict import to_json


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return Place(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(place):
  workdir = place.folder / "runs" / "demo"
  return workdir, place.run(*place.train, f"--workdir={workdir}")


@pytest.fixture(scope="module")
def evaluated(place, trained):
  return place.run("eval.py", f"--workdir={trained[0]}")


def results(folder: pathlib.Path) -> dict[str, dict]:
  (family,) = json.loads((folder / "pareto.json").read_text())["families"]
  return {result["name"]: result for result in family["results"]}


@pytest.mark.slow
def test_train_leaves_a_workdir(trained):
  workdir, done = trained
  assert {"checkpoints", "config.json", "metrics.jsonl", "versions.json"} <= set(os.listdir(workdir))
  assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == 8
  assert json.loads((workdir / "versions.json").read_text())["jax"]
  assert "step 8: validation loss" in done.stderr
  assert done.stdout == ""
  assert not [line for line in done.stderr.splitlines() if line.startswith(("I1", "W1", "WARNING"))]


@pytest.mark.slow
def test_eval_finds_config_and_checkpoint(trained, evaluated):
  rows = results(trained[0])
  assert list(rows) == [f"depth={d},d_ff={f}" for d in (1, 2) for f in (16, 32)]
  assert all(name in evaluated.stdout for name in rows)
  assert rows["depth=2,d_ff=32"]["agreement"] == 1
  last = tiny_run.lines(trained[0])[-1]
  for name in ("depth=1,d_ff=16", "depth=2,d_ff=32"):
    assert rows[name]["loss"] == pytest.approx(last[f"validation/loss/{name}"], rel=1e-5)
  assert {"pareto.csv", "pareto.html", "pareto.png"} <= set(os.listdir(trained[0]))


@pytest.mark.slow
def test_extracted_sub_model_is_a_dense_run_with_the_same_loss(place, trained, evaluated):
  workdir, small, name = trained[0], place.folder / "runs" / "small", "depth=1,d_ff=16"
  told = place.run("eval.py", f"--workdir={workdir}", f"--extract={name}", f"--output={small}").stdout
  assert f"python eval.py --workdir={small}" in told
  config = json.loads((small / "config.json").read_text())
  assert config["method"] == {"name": "dense"}
  assert (config["model"]["num_layers"], config["model"]["d_ff"]) == (1, 16)

  again = [f"--config={place.config}", f"--workdir={small}"]
  told = place.run_many({
    "extract": ["eval.py", f"--workdir={workdir}", f"--extract={name}", f"--output={small}"],
    "train": ["train.py", *again],
  })  # fmt: skip
  assert told["extract"]["err"] == f"error: {small} holds an extracted model already; choose another --output\n"
  assert "small holds another config: " in told["train"]["err"]
  assert [result["code"] for result in told.values()] == [2, 2]

  place.run("eval.py", f"--workdir={small}", "--nolatency")
  (alone,) = results(small).values()
  within = results(workdir)[name]
  assert alone["loss"] == pytest.approx(within["loss"], rel=1e-6)
  for field in ("accuracy", "params_total", "flops_per_token", "kv_bytes_per_token"):
    assert alone[field] == within[field]

  done = place.run("eval.py", "--compare", workdir, small)
  compared = json.loads((place.folder / "runs" / "compare" / "pareto.json").read_text())["families"]
  assert [family["label"] for family in compared] == ["demo", "small"]
  assert "warning" not in done.stderr
  assert (place.folder / "runs" / "compare" / "pareto.png").stat().st_size > 10_000


@pytest.mark.slow
def test_dry_run_tells_and_trains_nothing(place):
  workdir = place.folder / "runs" / "dry"
  out = place.run(*place.train, f"--workdir={workdir}", "--dry_run").stdout
  assert "embedding/table" in out
  assert "8,912 parameters in float32" in out
  assert all(f"depth={d},d_ff={f}" in out for d in (1, 2) for f in (16, 32))
  assert "mesh {'data': 1, 'fsdp': 1, 'tensor': 1} on 1 x cpu" in out
  assert "memory of one device: state 0.1 MiB" in out
  assert not workdir.exists()


BAD = {  # name: (arguments after the config and the workdir, or the whole command; what the message says)
  "no config": (["train.py"], "--config is missing, such as --config=configs/sorted_net_demo.py"),
  "no workdir": (["train.py", "--config={config}"], "--workdir is missing"),
  "empty workdir": (["train.py", "--config={config}", "--workdir="], "--workdir is missing"),
  "argument": ("foo", "unexpected argument 'foo'"),
  "flag": ("--workdirr=x", "Unknown command line flag 'workdirr'. Did you mean: workdir ?"),
  "field": ("--config.sed=1", "unknown config field config.sed; did you mean config.seed?"),
  "section": ("--config.trainin.steps=1", "unknown config field config.trainin; did you mean config.training?"),
  "processes": (
    ["train.py", "--config={config}", "--workdir=w", "--nodistributed", "--process_id=1"],
    "--nodistributed does not go with --coordinator_address",
  ),
  "nested field": (
    "--config.training.optimizer.learnin_rate=1",
    "field config.training.optimizer.learnin_rate; did you mean config.training.optimizer.learning_rate?",
  ),
  "field of a leaf": ("--config.seed.x=1", "unknown config field config.seed.x; config.seed has no fields"),
  "method's field": ("--config.method.depth=(1,2)", "config.method.depth; did you mean config.method.depths?"),
  "float for int": ("--config.training.steps=2.5", "flag --config.training.steps=2.5: invalid literal for int()"),
  "word for int": ("--config.training.steps=abc", "flag --config.training.steps=abc: invalid literal for int()"),
  "nothing for int": ("--config.training.steps=", "invalid literal for int()"),
  "word for bool": ("--config.training.tensorboard=maybe", "flag --config.training.tensorboard=maybe"),
  "value for section": ("--config.training=3", "flag --config.training=3"),
  "unknown choice": ("--config.model.dtype=float16", "model.dtype='float16' is not one of 'float32', 'bfloat16'"),
  "float in tuple": ("--config.method.depths=(1,2.5)", "method.depths=2.5 must be of type int"),
  "other depths": ("--config.method.depths=(1,3)", "method.depths=(1, 3) must be positive, increasing and end with"),
  "method": ("--config.method.name=nope", "unknown method 'nope'; the methods are dense, "),
  "config: no file": (["train.py", "--config=no.py", "--workdir=w"], "config file no.py: No such file or directory"),
  "config: syntax": (["train.py", "--config={syntax}", "--workdir=w"], "syntax.py, line 1: invalid syntax"),
  "config: field": (
    ["train.py", "--config={field}", "--workdir=w"], "field.py, line 4: unknown config field stepz; did you mean steps?"
  ),
  "config: error": (["train.py", "--config={error}", "--workdir=w"], "error.py, line 2: ValueError: invalid literal"),
  "config: nothing": (["train.py", "--config={nothing}", "--workdir=w"], "nothing.py has no function get_config"),
  "heads": ("--config.model.num_heads=3", "model.d_model=16 is not divisible by model.num_heads=3"),
  "kv heads": ("--config.model.num_kv_heads=3", "model.num_heads=4 is not divisible by model.num_kv_heads=3"),
  "groups": ("--config.model.ff_groups=3", "model.d_ff=32 is not divisible by model.ff_groups=3"),
  "sub-model's groups": ("--config.method.d_ff=(15,32)", "d_ff=15 must be at most 32 and a multiple of"),
  "mesh": ("--config.mesh.fsdp=3", "mesh {'data': -1, 'fsdp': 3, 'tensor': 1} does not divide 1 devices"),
  "batch": ("--config.data.batch_size=7", "data.batch_size=7 must be a multiple of 2"),
  "accumulation": ("--config.training.grad_accum=3", "data.batch_size=8 must be a multiple of 6"),
  "batch too large": ("--config.data.batch_size=2000", "data.batch_size=2000 is more than the 76 training rows"),
  "seed": ("--config.seed=-1", "seed=-1 must lie in 0 .. 4294967295"),
  "large seed": ("--config.seed=99999999999999999999", "seed=99999999999999999999 must lie in 0 .. 4294967295"),
  "learning rate": ("--config.training.optimizer.learning_rate=nan", "learning_rate=nan must be more than 0"),
  "warm-up": ("--config.training.optimizer.warmup_steps=8", "warmup_steps=8 must be less than training.steps=8"),
  "too many sampled": ("--config.method.num_sampled=5", "method.num_sampled=5 is more than 'uniform' can draw from 4"),
  "no data": ("--config.data.path=/nope", "data.path='/nope': no such folder, and no file matches it as a glob"),
  "empty data": ("--config.data.path={empty}", "the folder holds no files"),
  "undecodable": ("--config.data.path={binary}", "x.txt' is not UTF-8: byte 0xff at offset 3"),
  "empty files": ("--config.data.path={hollow}", "no text, all 1 files are empty or were skipped"),
  "tiny file": ("--config.data.path={letter}", "too little text to hold any of it out"),
  "vocabulary": ("--config.model.vocab_size=256", "model.vocab_size=256 is smaller than the tokenizer's 257"),
  "tokenizer": ("--config.data.tokenizer=/no.json", "data.tokenizer='/no.json': no such file"),
  "workdir: file": (["train.py", "--config={config}", "--workdir={config}"], "tiny.py as workdir: File exists"),
  "workdir: below file": (["train.py", "--config={config}", "--workdir={config}/x"], "x as workdir: Not a directory"),
  "workdir: forbidden": (["train.py", "--config={config}", "--workdir=/proc/x"], "cannot use /proc/x as workdir"),
  "workdir: foreign": (["train.py", "--config={config}", "--workdir={corpus}"], "not empty and holds no config.json"),
  "workdir: other config": (
    ["train.py", "--config={config}", "--workdir={made}", "--config.seed=1"], "holds another config: seed: 0 -> 1;",
  ),
  "eval: no workdir": (["eval.py"], "--workdir is missing, such as --workdir=runs/demo"),
  "eval: no folder": (["eval.py", "--workdir=/nope"], "/nope is not a workdir: it holds no config.json"),
  "eval: foreign": (["eval.py", "--workdir={corpus}"], "corpus is not a workdir: it holds no config.json"),
  "eval: no checkpoint": (["eval.py", "--workdir={made}"], "made holds no finished checkpoint yet"),
  "eval: broken config": (["eval.py", "--workdir={broken}"], "config.json is not valid JSON (line 1)"),
  "eval: argument": (["eval.py", "--workdir={made}", "foo"], "unexpected argument 'foo'"),
  "eval: rows": (["eval.py", "--workdir={made}", "--rows=0"], "evaluation.rows=0 must be at least 1"),
  "eval: word for step": (["eval.py", "--workdir={made}", "--step=abc"], "flag --step=abc: invalid literal for int()"),
  "eval: output": (["eval.py", "--workdir={made}", "--output={config}"], "cannot write results to"),
  "extract: name": (
    ["eval.py", "--workdir={made}", "--extract=depth=2,d_ff=3", "--output=x"],
    "no sub-model 'depth=2,d_ff=3'; did you mean depth=2,d_ff=32?",
  ),
  "extract: a part of a name": (
    ["eval.py", "--workdir={made}", "--extract=depth=2", "--output=x"],
    "no sub-model 'depth=2'; with it there are depth=2,d_ff=16, depth=2,d_ff=32",
  ),
  "extract: no output": (["eval.py", "--workdir={made}", "--extract=depth=1,d_ff=16"], "--extract needs --output"),
  "extract: no name": (["eval.py", "--workdir={made}", "--extract="], "--extract needs --output"),
  "generate: no workdir": (["generate.py", "--prompt=a"], "name one of --workdir, such as --workdir=runs/demo"),
  "generate: both": (["generate.py", "--workdir={made}", "--model=m", "--prompt=a"], "name one of --workdir"),
  "generate: no model": (["generate.py", "--model=/no/where/at/all", "--prompt=a"], "there is no folder or file /no/"),
  "generate: no chat": (["generate.py", "--workdir={made}", "--prompt=a", "--chat"], "this model has no chat template"),
  "perplexity: no model": (["perplexity.py", "--text=README.md"], "name one of --workdir, such as --workdir=runs/demo"),
  "perplexity: no text": (["perplexity.py", "--workdir={made}"], "--text is missing, such as --text=README.md"),
  "perplexity: no file": (["perplexity.py", "--workdir={made}", "--text=/no/*.md"], "--text=/no/*.md matches no file"),
  "perplexity: window": (["perplexity.py", "--workdir={made}", "--text=README.md", "--window=1"], "window=1 and rows"),
  "harness: no tasks": (["harness.py", "--workdir={made}"], "--tasks is missing"),
  "eval: form alone": (["eval.py", "--workdir={made}", "--hugging_face"], "--hugging_face goes with --extract"),
  "generate: no prompt": (["generate.py", "--workdir={made}"], "--prompt is missing, such as --prompt='import '"),
  "generate: argument": (["generate.py", "--workdir={made}", "--prompt=a", "b"], "unexpected argument 'b'"),
  "generate: foreign": (["generate.py", "--workdir={corpus}", "--prompt=a"], "corpus is not a workdir: it holds no"),
  "generate: no checkpoint": (["generate.py", "--workdir={made}", "--prompt=a", "--max_new_tokens=9"], "no finished"),
  "generate: sub-model": (
    ["generate.py", "--workdir={made}", "--prompt=a", "--submodel=depth=2,d_ff=3"], "did you mean depth=2,d_ff=32?"
  ),
  "generate: too long": (
    ["generate.py", "--workdir={made}", "--prompt=a", "--prompt=abcd", "--max_new_tokens=28"],
    "prompt 2 of 5 tokens and max_new_tokens=28 make 33, more than max_len=32",
  ),
  "generate: no tokens": (["generate.py", "--workdir={made}", "--prompt=a", "--max_new_tokens=0"], "at least 1"),
  "generate: temperature": (
    ["generate.py", "--workdir={made}", "--prompt=a", "--temperature=-1"], "temperature=-1.0 must be at least 0"
  ),
  "generate: top_k": (["generate.py", "--workdir={made}", "--prompt=a", "--top_k=-1"], "top_k=-1 must be at least 0"),
  "generate: top_p": (["generate.py", "--workdir={made}", "--prompt=a", "--top_p=0"], "top_p=0.0 must be more than 0"),
  "generate: seed": (["generate.py", "--workdir={made}", "--prompt=a", "--max_new_tokens=9", "--seed=-1"], "seed=-1"),
  "generate: not UTF-8": (["generate.py", "--workdir={made}", "--prompt=a\udcff"], "the prompt 'a\\udcff' is not"),
  "compare: nothing": (["eval.py", "--compare"], "--compare needs runs, such as --compare runs/a runs/b"),
  "compare: twice": (["eval.py", "--compare", "{made}", "{made}/"], "--compare names"),
  "compare: foreign": (["eval.py", "--compare", "{corpus}"], "corpus is not a workdir: it holds no config.json"),
  "compare: workdir": (["eval.py", "--workdir={made}", "--compare", "{made}"], "--workdir does not go with --compare"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(place):
  """What every command of BAD said; {config} and the like in them are paths that are made here."""
  paths = {
    "config": place.config,
    "corpus": str(place.folder / "corpus"),
    "syntax": place.write("syntax.py", "def get_config(:\n"),
    "field": place.write("field.py", CONFIG_START + "  config.training.update(stepz=3)\n  return config\n"),
    "error": place.write("error.py", "def get_config():\n  return int('x')\n"),
    "nothing": place.write("nothing.py", "x = 1\n"),
    "binary": os.path.dirname(place.write("binary/x.txt", b"abc\xff")),
    "hollow": os.path.dirname(place.write("hollow/x.txt", b"")),
    "letter": os.path.dirname(place.write("letter/x.txt", b"a")),
    "broken": os.path.dirname(place.write("broken/config.json", '{"method": ')),
    "empty": str(place.folder / "nothing_in_here"),
    "made": str(place.folder / "made"),
  }
  os.mkdir(paths["empty"])
  place.write("made/config.json", to_json(methods.parse_config(load(place.config))[1], "sorted_net"))
  commands = {}
  for name, (arguments, _) in BAD.items():
    if isinstance(arguments, str):
      arguments = [*place.train, f"--workdir={place.folder / 'bad' / name.replace(' ', '_')}", arguments]
    commands[name] = [argument.format(**paths) for argument in arguments]
  return place.run_many(commands)


CONFIG_START = """from adaptive import methods
def get_config():
  config = methods.default_config("dense")
"""


def load(path: str):
  namespace = {}
  exec(pathlib.Path(path).read_text(), namespace)
  return namespace["get_config"]()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_compiles_nothing(name, bad, place):
  result = bad[name]
  lines = result["err"].splitlines()
  assert len(lines) == 1, result["err"]
  assert lines[0].startswith("error: ")
  assert BAD[name][1] in lines[0]
  assert result["code"] == 2
  assert result["out"] == ""
  assert not result["compiled"]
  assert not (place.folder / "bad" / name.replace(" ", "_")).exists(), "a refused command left a workdir"


def test_variants_and_tuples_reach_the_config(place):
  overrides = ["--config.method.depths=(2,)", "--config.method.d_ff=32", "--config.method.num_sampled=1"]
  told = place.run_many({"dry": ["train.py", f"--config={place.config}:small", "--dry_run", *overrides]})["dry"]
  assert told["code"] == 0, told["err"]
  assert [line.split()[0] for line in told["out"].splitlines() if line.startswith("depth=")] == ["depth=2,d_ff=32"]


@pytest.mark.slow
def test_unknown_step_of_a_run(place, trained):
  told = place.run_many({"step": ["eval.py", f"--workdir={trained[0]}", "--step=99"]})["step"]
  assert told["code"] == 2
  assert told["err"] == f"error: no checkpoint of step 99 in {trained[0]}/checkpoints; it holds 8\n"

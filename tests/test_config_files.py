"""Every file in configs/ describes a run that can be: shapes that fit, batches that divide, settings that agree."""

import pathlib
import runpy

import jax
import pytest

from adaptive.methods import parse_config
from adaptive.training.run import plan

FILES = sorted(pathlib.Path(__file__).parent.parent.glob("configs/*.py"))
VARIANTS = lambda name: runpy.run_path(str(FILES[0].parent / name))["VARIANTS"]
ARGUMENTS = {
  "dense_demo": ["full", "small"],
  "dense_lm": ["135m", "1.7b"],
  "dynamic_depth": [*VARIANTS("dynamic_depth.py"), "dense,8", "deep"],
  "isoflop_demo": VARIANTS("isoflop_demo.py"),
  "mixture_of_recursions_demo": ["mor", "recursive", "dense"],
  "mixture_of_recursions_lm": ["135m,2", "360m,4", "1.7b,3"],
  "sorted_net_lm": ["360m"],
}


CASES = [(file, argument) for file in FILES for argument in ARGUMENTS.get(file.stem, [None])]


@pytest.mark.parametrize(("file", "argument"), CASES, ids=lambda x: getattr(x, "stem", x))
def test_a_config_file_can_be_trained(file, argument):
  get_config = runpy.run_path(str(file))["get_config"]
  method, experiment = parse_config(get_config() if argument is None else get_config(argument))
  one = plan(method, experiment, devices=jax.devices()[:1] * max(experiment.mesh.fsdp, 1))
  assert one.model.config == experiment.model
  docstring = runpy.run_path(str(file))["__doc__"]
  assert f"configs/{file.stem}.py" in docstring, "the command to paste"

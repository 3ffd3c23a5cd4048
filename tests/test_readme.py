"""The README's example of a method: what it shows is all that is needed, and it works."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHORT = ("--config.training.steps=2", "--config.training.optimizer.warmup_steps=1", "--config.data.seq_len=64")
SMALL = ("--config.data.batch_size=4", "--config.evaluation.rows=4", "--config.model.d_model=16")


def blocks() -> dict[str, str]:
  """Text of every file that the README shows, by the path that stands before it."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  return dict(re.findall(r"`((?:adaptive|configs|tests)/[\w/.]+\.py)`[^\n]*:\n\n```python\n(.*?)```", text, re.DOTALL))


@pytest.mark.slow
def test_the_example_of_a_method_needs_five_places_and_no_more(tmp_path):
  found = blocks()
  table = found.pop("adaptive/methods/__init__.py")
  assert set(found) == {"adaptive/methods/depth/spread.py", "configs/spread_demo.py", "tests/methods/test_spread.py"}
  for name in ("adaptive", "configs", "tests"):
    shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("train.py", "eval.py", "generate.py", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path / name)
  for name, text in found.items():
    (tmp_path / name).write_text(text, encoding="utf-8")
  row = '  "spread": spread,\n'
  assert row in table
  methods = tmp_path / "adaptive" / "methods" / "__init__.py"
  text, heading = methods.read_text(encoding="utf-8"), "METHODS: dict[str, Method] = {\n"
  assert heading in text
  methods.write_text(text.replace(heading, f"from adaptive.methods.depth import spread\n\n{heading}{row}"))

  def run(*arguments: str) -> str:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment = {**os.environ, **cache, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=500, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  run("-m", "pytest", "-p", "no:cacheprovider", "tests/methods/test_spread.py")
  run("train.py", "--config=configs/spread_demo.py", "--workdir=runs/spread", *SHORT, *SMALL)
  assert "depth=3" in run("eval.py", "--workdir=runs/spread", "--nolatency")
  assert run("generate.py", "--workdir=runs/spread", "--prompt=x", "--max_new_tokens=3").startswith("x")

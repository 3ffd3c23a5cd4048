"""Question files (see `adaptive/data/questions.py`) of two splits, written by the scripts beside this one."""

import json
import pathlib
from collections.abc import Sequence


def write(folder: str, kind: str, **splits: Sequence[dict]) -> None:
  """Writes `<folder>/<kind>_<split>.jsonl` of each split, questions without their ids."""
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  for split, questions in splits.items():
    path = pathlib.Path(folder) / f"{kind}_{split}.jsonl"
    lines = (json.dumps({"id": f"{kind}/{split}/{i}", **question}) + "\n" for i, question in enumerate(questions))
    path.write_text("".join(lines), encoding="utf-8")
    print(f"wrote {len(questions)} questions to {path}")

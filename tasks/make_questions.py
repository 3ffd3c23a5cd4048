"""Makes question files to learn from and to hold out, of multiple choice as PIQA and Social IQa are given here.

  python tasks/make_questions.py --kind=piqa --source=validation.jsonl --train=1000 --held_out=400 --folder=data

writes data/piqa_train.jsonl and data/piqa_held_out.jsonl, with the prompts of tasks/piqa_jsonl.yaml (siqa_jsonl.yaml).
The source is JSONL as tasks/choices.py reads it. Of questions with the same prompt the first is kept, so that none is
in both files; those without a right answer are left out.
"""

import argparse
import json
import random

import choices
import splits

PROMPTS = {"piqa": "Question: {question}\nAnswer:", "siqa": "Q: {passage} {question}\nA:"}


def question(doc: dict, kind: str, number: int) -> dict:
  """A line of a question file. Its id says where in the source it stands, from 0."""
  texts = [f" {text}" for text in choices.options(doc)]
  return {
    "id": f"{kind}/{number}",
    "prompt": PROMPTS[kind].format(**doc),
    "options": texts,
    "answer": choices.gold(doc),
  }


def read(path: str, kind: str) -> list[dict]:
  """Questions with a right answer, all of whose prompts differ, if only in more than blanks."""
  found: dict[str, dict] = {}
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file):
      doc = json.loads(line)
      if choices.is_answered(doc) and all(choices.options(doc)):
        one = question(doc, kind, number)
        found.setdefault(" ".join(one["prompt"].split()), one)
  return list(found.values())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kind", choices=sorted(PROMPTS), required=True)
  parser.add_argument("--source", required=True)
  parser.add_argument("--train", type=int, required=True)
  parser.add_argument("--held_out", type=int, required=True)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", default="data")
  a = parser.parse_args()
  found = read(a.source, a.kind)
  if a.train < 1 or a.held_out < 1 or a.train + a.held_out > len(found):
    parser.error(f"{a.source} has {len(found)} questions, too few for --train={a.train} and --held_out={a.held_out}")
  random.Random(a.seed).shuffle(found)
  splits.write(a.folder, a.kind, train=found[: a.train], held_out=found[a.train : a.train + a.held_out])


if __name__ == "__main__":
  main()

"""Makes question files to learn from and to hold out, of multiple choice such as PIQA and Social IQa.

  python tasks/make_questions.py --kind=piqa --source=piqa.jsonl --train=300 --held_out=800 --folder=data

writes data/piqa_train.jsonl and data/piqa_held_out.jsonl, with the prompts of tasks/piqa_jsonl.yaml (siqa_jsonl.yaml).
The source is JSONL with the fields of the published data, `goal`, `sol1`, `sol2`, `label` (PIQA, from 0) or `context`,
`question`, `answerA`, `answerB`, `answerC`, `label` (Social IQa, from 1), or as tasks/choices.py reads it. Of questions
with the same prompt the first is kept, so that none is in both files; those without a right answer are left out.
"""

import argparse
import json
import random

import choices
import splits

PROMPTS = {"piqa": "Question: {question}\nAnswer:", "siqa": "Q: {passage} {question}\nA:"}
LETTERS = "ABC"


def piqa(doc: dict) -> tuple[dict, list[str], int]:
  """What the prompt says, the options, and which of them is right; -1: none."""
  return {"question": doc["goal"]}, [doc["sol1"], doc["sol2"]], int(doc["label"])


def siqa(doc: dict) -> tuple[dict, list[str], int]:
  said = {"passage": doc["context"], "question": doc["question"]}
  return said, [doc[f"answer{letter}"] for letter in LETTERS], int(doc["label"]) - 1


def listed(doc: dict) -> tuple[dict, list[str], int]:
  return doc, choices.options(doc), choices.gold(doc) if choices.is_answered(doc) else -1


def question(doc: dict, kind: str, number: int) -> dict | None:
  """A line of a question file, None without a right answer. Its id says where in the source it stands, from 0."""
  read = piqa if "goal" in doc else siqa if "answerA" in doc else listed
  said, texts, right = read(doc)
  if not 0 <= right < len(texts) or not all(text.strip() for text in texts):
    return None
  options = [f" {text.strip()}" for text in texts]
  return {"id": f"{kind}/{number}", "prompt": PROMPTS[kind].format(**said), "options": options, "answer": right}


def read(path: str, kind: str) -> list[dict]:
  """Questions with a right answer, all of whose prompts differ, if only in more than blanks.

  Raises:
    ValueError: what is wrong with which line.
  """
  found: dict[str, dict] = {}
  with open(path, encoding="utf-8-sig") as file:
    for number, line in enumerate(file):
      try:
        one = question(json.loads(line), kind, number)
      except json.JSONDecodeError as error:
        raise ValueError(f"line {number + 1} is not JSON: {error}") from error
      except KeyError as error:
        raise ValueError(f"line {number + 1} has no field {error}: --help says which there must be") from error
      except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"line {number + 1} is not such a question: {error}") from error
      if one is not None:
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
  try:
    found = read(a.source, a.kind)
  except (OSError, ValueError) as error:
    parser.error(f"cannot read {a.source}: {getattr(error, 'strerror', None) or error}")
  if a.train < 1 or a.held_out < 1 or a.train + a.held_out > len(found):
    parser.error(f"{a.source} has {len(found)} questions, too few for --train={a.train} and --held_out={a.held_out}")
  random.Random(a.seed).shuffle(found)
  splits.write(a.folder, a.kind, train=found[: a.train], held_out=found[a.train : a.train + a.held_out])


if __name__ == "__main__":
  main()

"""Makes question files to learn from and to hold out, whose difficulty is a number of steps; every level alike.

  python tasks/make_graded.py --kind=pointers --levels=1,2,3,4 --train=4000 --held_out=400 --folder=data

writes data/pointers_train.jsonl and data/pointers_held_out.jsonl; no prompt is in both, or twice in one.

`pointers`: a permutation of digits is written out, and so many of its arrows are to be followed from a start:
"0>3 1>0 2>1 3>2; steps 2: 0>" asks for 2. The level is the number of steps; neither the prompt's length nor the share
of any answer tells it. The answer is one character.

`arithmetic`: nested sums and differences modulo 10, as in tasks/nested_arithmetic.yaml; the level is their depth.
"""

import argparse
import random
from collections.abc import Callable

import make_arithmetic
import splits

_ATTEMPTS = 10_000  # for a question that is not there yet, or a permutation with a long cycle


def walk(arrows: list[int], start: int, steps: int) -> int:
  """Where so many arrows lead."""
  for _ in range(steps):
    start = arrows[start]
  return start


def cycle(arrows: list[int], start: int) -> int:
  """After how many steps the start comes again."""
  steps, place = 1, arrows[start]
  while place != start:
    steps, place = steps + 1, arrows[place]
  return steps


def pointers(level: int, draw: random.Random, size: int, longest: int) -> dict:
  """A permutation of `size` digits, a start, and `level` steps.

  The start comes again after 2 * longest steps at the earliest (size at most): otherwise fewer steps, or steps
  backwards, would lead there too. That is so at every level, so that a permutation does not tell the level.
  """
  need = min(2 * longest, size)
  for _ in range(_ATTEMPTS):
    arrows, start = draw.sample(range(size), size), draw.randrange(size)
    if cycle(arrows, start) >= need:
      break
  else:
    raise RuntimeError(f"no permutation of {size} digits has a cycle of {need}")
  table = " ".join(f"{a}>{b}" for a, b in enumerate(arrows))
  answer = str(walk(arrows, start, level))
  return {"prompt": f"{table}; steps {level}: {start}>", "answer": answer, "level": level}


def arithmetic(level: int, draw: random.Random) -> dict:
  text, value = make_arithmetic.expression(level, draw)
  return {"prompt": f"{text} =", "answer": f" {value}", "level": level}


def different(make: Callable[[int], dict], levels: list[int], number: int, seen: set[str]) -> list[dict]:
  """So many questions of every level, with prompts that are not in `seen`, to which they are added."""
  found = []
  for level in levels:
    for _ in range(number):
      one = next((one for one in map(make, [level] * _ATTEMPTS) if one["prompt"] not in seen), None)
      if one is None:
        raise SystemExit(f"there are no more than {sum(q['level'] == level for q in found)} new ones of level {level}")
      seen.add(one["prompt"])
      found.append(one)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kind", choices=("pointers", "arithmetic"), required=True)
  parser.add_argument("--levels", default="1,2,3,4")
  parser.add_argument("--train", type=int, required=True, help="questions of all levels together")
  parser.add_argument("--held_out", type=int, required=True, help="the same")
  parser.add_argument("--size", type=int, default=10, help="digits of a permutation, 10 at most")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", default="data")
  a = parser.parse_args()
  levels = sorted({int(level) for level in a.levels.split(",")})
  if levels[0] < 1 or min(a.train, a.held_out) < 1 or a.train % len(levels) or a.held_out % len(levels):
    parser.error(f"levels begin at 1, and --train and --held_out are multiples of their number, {len(levels)}")
  if a.kind == "pointers" and not levels[-1] < a.size <= 10:
    parser.error(f"--size={a.size} must be more than the highest level, {levels[-1]}, and at most 10")
  draw = random.Random(a.seed)
  make = {
    "pointers": lambda level: pointers(level, draw, a.size, levels[-1]),
    "arithmetic": lambda level: arithmetic(level, draw),
  }[a.kind]
  seen: set[str] = set()
  # The smaller split first: of a level with few questions, it is the one that can have its share.
  made = {name: different(make, levels, getattr(a, name) // len(levels), seen) for name in ("held_out", "train")}
  for questions in made.values():
    draw.shuffle(questions)
  splits.write(a.folder, a.kind, train=made["train"], held_out=made["held_out"])


if __name__ == "__main__":
  main()

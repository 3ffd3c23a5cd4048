"""Makes tasks/data/arithmetic.jsonl: nested sums and differences modulo 10, as many of every depth.

python tasks/make_arithmetic.py --depths=1,2,3 --number=100
"""

import argparse
import json
import pathlib
import random

FOLDER = pathlib.Path(__file__).parent / "data"


def expression(depth: int, draw: random.Random) -> tuple[str, int]:
  """Text and value of a full binary tree; without products, which would make most values 0."""
  if depth == 0:
    digit = draw.randrange(10)
    return str(digit), digit
  (a, x), (b, y) = expression(depth - 1, draw), expression(depth - 1, draw)
  sign = draw.choice("+-")
  return f"({a}{sign}{b})", (x + y if sign == "+" else x - y) % 10


def rows(depths: list[int], number: int, seed: int, without: set[str]) -> list[dict]:
  """So many different expressions of every depth, none of which is in `without`."""
  draw, found = random.Random(seed), []
  for depth in depths:
    seen = set(without)
    while len(seen) < len(without) + number:
      text, value = expression(depth, draw)
      if text not in seen:
        seen.add(text)
        found.append({"expression": text, "answer": str(value), "depth": depth})
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--depths", default="1,2,3")
  parser.add_argument("--number", type=int, default=100, help="of every depth; there are 200 of depth 1")
  parser.add_argument("--seed", type=int, default=0)
  a = parser.parse_args()
  depths = [int(depth) for depth in a.depths.split(",")]
  FOLDER.mkdir(exist_ok=True)
  examples = rows(depths, 4, a.seed + 1, set())
  tests = rows(depths, a.number, a.seed, {row["expression"] for row in examples})
  for name, found in (("arithmetic_examples", examples), ("arithmetic", tests)):
    lines = "".join(json.dumps(row) + "\n" for row in found)
    (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"wrote {len(found)} expressions to {FOLDER / name}.jsonl")


if __name__ == "__main__":
  main()

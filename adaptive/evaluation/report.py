"""Reports on one or several families: a table for the terminal, CSV, JSON, a picture and a page.

The picture is drawn in `plots`, the page in `page`; this file writes what other programs read and holds the one call
(`write_all`) that the evaluation needs.
"""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive.evaluation import baselines, pareto
from adaptive.evaluation.page import plot_html
from adaptive.evaluation.plots import plot_png
from adaptive.evaluation.results import (
  DEFINITIONS,
  Family,
  Result,
  compact,
  number,
  plural,
  shared_hypervolumes,
  summarise,
  summary_lines,
  three_digits,
)

__all__ = [
  "Family",
  "Result",
  "comparison",
  "kept",
  "plot_html",
  "plot_png",
  "read_json",
  "summarise",
  "table",
  "write_all",
  "write_csv",
  "write_json",
]

FORMAT = 1
MAX_ROWS = 40
_MEASURES = tuple(f.name for f in dataclasses.fields(Result) if f.name not in ("name", "dial"))
_OPTIONAL = ("prefill_ms", "prefill_ms_p90", "step_ms", "step_ms_p90", "random_loss")
_DERIVED = ("retention", "on_front", "worse_and_dearer", "is_full")

Families = Family | Sequence[Family]


def write_csv(families: Families, path: str | pathlib.Path) -> None:
  """One line per sub-model: name, every dial, every measure; for several families a leading column `run`.

  A latency that was not measured and a dial that a family lacks are empty cells.

  Raises:
    ValueError: a dial has the name of another column.
  """
  families = _listed(families)
  dials = list(dict.fromkeys(key for f in families for r in f.results for key in r.dial))
  fixed = {"run", "name", *_MEASURES, *_DERIVED}
  if fixed & set(dials):
    raise ValueError(f"dials named like a column of the report: {', '.join(sorted(fixed & set(dials)))}")
  header = ["run"] * (len(families) > 1) + ["name", *dials, *_MEASURES, *_DERIVED]
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, header, restval="", extrasaction="ignore")
    writer.writeheader()
    for family in families:
      writer.writerows(_csv_rows(family))


def _csv_rows(family: Family) -> list[dict[str, Any]]:
  front, dearer = set(family.front().tolist()), family.worse_and_dearer()
  accuracy = family.results[family.full_index].accuracy
  return [
    {
      "run": family.label,
      "name": r.name,
      **r.dial,
      **{m: getattr(r, m) for m in _MEASURES},
      "retention": r.accuracy / accuracy if accuracy > 0 else math.nan,
      "on_front": int(i in front),
      "worse_and_dearer": int(dearer[i]),
      "is_full": int(r.name == family.full),
    }
    for i, r in enumerate(family.results)
  ]


def write_json(families: Families, path: str | pathlib.Path) -> None:
  """Results, summaries, and what the summaries mean. A value that is not finite is written as null."""
  families = _listed(families)
  summaries = [
    {**summarise(f), "hypervolume_shared": shared} for f, shared in zip(families, shared_hypervolumes(families))
  ]
  document = {
    "format": FORMAT,
    "definitions": DEFINITIONS,
    "families": [{**vars(f), "summary": summary} for f, summary in zip(families, summaries)],
  }
  text = json.dumps(_jsonable(document), indent=1, allow_nan=False, ensure_ascii=False)
  pathlib.Path(path).write_text(text + "\n", encoding="utf-8")


def read_json(path: str | pathlib.Path) -> list[Family]:
  """The families of a file of `write_json`, bit for bit; only inf comes back as nan, since JSON has neither.

  Raises:
    ValueError: the file is no such report, or of a format this version does not know.
  """
  document = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  if not isinstance(document, dict) or document.get("format") != FORMAT:
    raise ValueError(f"{path} is not an evaluation report of format {FORMAT}")
  try:
    return [_family(entry) for entry in document["families"]]
  except (KeyError, TypeError) as error:
    raise ValueError(f"{path} is a damaged evaluation report: {error}") from error


def _family(entry: dict[str, Any]) -> Family:
  results = []
  for fields in entry["results"]:
    lost = {m: math.nan for m in _MEASURES if m not in _OPTIONAL and fields[m] is None}
    results.append(Result(**{**fields, **lost}))
  known = {name: entry[name] for name in ("label", "full", "notes", "quality_reference")}
  return Family(**known, results=tuple(results), diagnosis=entry.get("diagnosis", {}))


def _jsonable(value: Any) -> Any:
  """Plain JSON values: results and numpy scalars unwrapped, nan and infinities as None."""
  if isinstance(value, Result):
    value = vars(value)
  if isinstance(value, Mapping):
    return {str(key): _jsonable(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(v) for v in value]
  if isinstance(value, np.generic):
    value = value.item()
  return None if isinstance(value, float) and not math.isfinite(value) else value


def table(family: Family, max_rows: int = MAX_ROWS) -> str:
  """Aligned text by rising FLOPs, at most 120 columns, with the summary below.

  A family of more than `max_rows` is cut to its front, its cheapest, its full and its worst-retaining sub-model.
  """
  shown = _shown(family, max_rows)
  plans = baselines.fixed(family)
  rows = [_table_row(family.results[i], mark, plans[i]) for i, mark in zip(shown, _marks(family, shown))]
  header = ["", "sub-model", "loss", "bits/B", "top-1", "agree", "active", "FLOPs/tok", "KV/tok"]
  header += ["prefill", "step", "fixed", "random"]
  measured = [k for k in range(len(header)) if k < 9 or any(row[k] != "-" for row in rows)]
  text = [f"{family.label}: {plural(len(family.results), 'sub-model')}"]
  text += _aligned([[row[k] for k in measured] for row in (header, *rows)], left=2)
  if len(shown) < len(family.results):
    text.append(f"{len(shown)} of {len(family.results)} sub-models shown; the CSV holds all")
  text.append("* on the front of loss over FLOPs   F full model   ! another one is clearly better at no more FLOPs")
  if any(map(baselines.decides, family.results)):
    text.append("baselines, losses: fixed plans of equal FLOPs (a mixture of two); the same decisions at random")
  return "\n".join([*text, *summary_lines(family)])


def _shown(family: Family, max_rows: int) -> list[int]:
  cost = family.column("flops_per_token")
  chosen = np.arange(len(cost))
  if len(cost) > max_rows:
    front = family.front()
    # A long front is thinned evenly; its two ends stay.
    keep = np.unique(np.linspace(0, len(front) - 1, min(len(front), max_rows - 3)).round().astype(int))
    worst = pareto.retention(family.column("accuracy"), family.full_index)[2]
    chosen = np.unique([*front[keep], int(cost.argmin()), family.full_index, worst])
  loss = np.nan_to_num(family.column("loss"), nan=np.inf)
  return sorted(chosen.tolist(), key=lambda i: (cost[i], -loss[i]))


def _marks(family: Family, shown: Sequence[int]) -> list[str]:
  front, dearer = set(family.front().tolist()), family.worse_and_dearer()
  return ["*" * (i in front) + "F" * (i == family.full_index) + "!" * bool(dearer[i]) for i in shown]


def _table_row(r: Result, mark: str, plan: float) -> list[str]:
  return [
    mark, _cut(r.name, 34), number(r.loss, ".4f"), number(r.bits_per_byte, ".4f"), number(r.accuracy, ".2%"),
    number(r.agreement, ".1%"), compact(r.params_active), compact(r.flops_per_token),
    compact(r.kv_bytes_per_token, "B"), _milliseconds(r.prefill_ms), _milliseconds(r.step_ms),
    number(plan, ".4f"), number(r.random_loss, ".4f"),
  ]  # fmt: skip


def comparison(families: Sequence[Family]) -> str:
  """One line per run, at most 120 columns: the full model, what the family keeps, and what ranks it.

  `own` and `shared` are the hypervolume in the family's own box and in the one box of all; only the latter ranks.
  """
  header = ["run", "sub-models", "full loss", "full top-1", "own", "shared", "worst kept", "mean kept", "violations"]
  rows = []
  for family, shared in zip(families, shared_hypervolumes(families)):
    s, full = summarise(family), family.results[family.full_index]
    rows.append([
      _cut(family.label, 34), str(s["sub_models"]), number(full.loss, ".4f"), number(full.accuracy, ".2%"),
      number(s["hypervolume"], ".3f"), number(shared, ".3f"), number(s["retention_worst"], ".1%"),
      number(s["retention_mean"], ".1%"), f"{s['nested_violations']}/{s['nested_pairs']}",
    ])  # fmt: skip
  return "\n".join(_aligned([header, *rows], left=1))


def kept(families: Sequence[Family], share: float = 0.99) -> list[str]:
  """Lines of a table: of each run of several sub-models the cheapest that keeps so much of its full model's accuracy.

  FLOPs and times are shares of the full model's; losses of baselines as in `adaptive.evaluation.baselines`.
  """
  header = ["run", "sub-model", "top-1 kept", "FLOPs", "step time", "loss", "fixed", "random", "dense"]
  rows = []
  for family in families:
    best, full = baselines.cheapest(family, share), family.results[family.full_index]
    if len(family.results) == 1:
      continue
    timed = best.step_ms is not None and full.step_ms is not None
    plan = baselines.fixed(family)[family.results.index(best)]
    rows.append([
      _cut(family.label, 34), _cut(best.name, 34), number(best.accuracy / full.accuracy, ".2%"),
      number(best.flops_per_token / full.flops_per_token, ".2f"),
      number(best.step_ms / full.step_ms if timed else None, ".2f"), number(best.loss, ".4f"), number(plan, ".4f"),
      number(best.random_loss, ".4f"), number(baselines.dense(families, best.flops_per_token), ".4f"),
    ])  # fmt: skip
  caption = f"the cheapest that keeps {share:.0%} of the accuracy; FLOPs and time as shares of the full model's, and "
  return [caption + "losses at equal FLOPs:", *_aligned([header, *rows], left=2)] if rows else []


def _milliseconds(value: float | None) -> str:
  return "-" if value is None or not math.isfinite(value) else three_digits(value) + "ms"


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1] + "…"


def _aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
  """Lines of cells in columns, the first `left` of them flush left, with a rule below the header."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  text = [
    "  ".join(cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths))).rstrip()
    for line in lines
  ]
  return [text[0], "-" * max(map(len, text)), *text[1:]]


def write_all(families: Families, folder: str | pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes pareto.csv, pareto.json, pareto.png and pareto.html into `folder`, over what is there.

  Returns:
    the four paths, by "csv", "json", "png" and "html".
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  writers = {"csv": write_csv, "json": write_json, "png": plot_png, "html": plot_html}
  paths = {kind: folder / f"pareto.{kind}" for kind in writers}
  for kind, write in writers.items():
    write(_listed(families), paths[kind])
  return paths


def _listed(families: Families) -> list[Family]:
  return [families] if isinstance(families, Family) else list(families)

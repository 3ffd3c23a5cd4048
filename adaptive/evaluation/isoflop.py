"""Runs of equal training FLOPs, side by side: a table, a CSV and a picture."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from adaptive.evaluation.plots import COLOURS, DPI, INK
from adaptive.evaluation.results import compact


@dataclasses.dataclass(frozen=True)
class Trained:
  """One run of an isoFLOP comparison.

  Attributes:
    variant, seed, budget: what was trained; the budget in FLOPs.
    steps, tokens: what the budget paid for.
    params: unique ones, without the embedding.
    flops_per_token: of the full model at inference.
    loss: nats per token on held-out rows, under the causal rule.
    top_k_loss: the same with routers that look ahead, as papers report it; None where there are none.
  """

  variant: str
  seed: int
  budget: float
  steps: int
  tokens: int
  params: int
  flops_per_token: float
  loss: float
  top_k_loss: float | None = None


def write_csv(runs: Sequence[Trained], path: str | pathlib.Path) -> None:
  """One line per run."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Trained)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(run) for run in runs)


def markdown(runs: Sequence[Trained]) -> str:
  """A table with one line per budget and variant: losses are means over seeds, with their range."""
  lines = [
    "| training FLOPs | variant | unique parameters | steps | tokens | loss | loss under top-k |",
    "|---|---|--:|--:|--:|--:|--:|",
  ]
  for budget, variant, group in _groups(runs):
    first, ahead = group[0], [run.top_k_loss for run in group if run.top_k_loss is not None]
    lines.append(
      f"| {compact(budget)} | {variant} | {compact(first.params)} | {first.steps:,} | {compact(first.tokens)} "
      f"| {_spread([run.loss for run in group])} | {_spread(ahead) if ahead else '-'} |"
    )
  return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
  mean = f"{np.mean(values):.4f}"
  return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _groups(runs: Sequence[Trained]) -> list[tuple[float, str, list[Trained]]]:
  """By rising budget, then in the order in which the variants appear."""
  variants, budgets = dict.fromkeys(run.variant for run in runs), sorted({run.budget for run in runs})
  groups = [(b, v, [r for r in runs if (r.budget, r.variant) == (b, v)]) for b in budgets for v in variants]
  return [group for group in groups if group[2]]


def plot_png(runs: Sequence[Trained], path: str | pathlib.Path) -> None:
  """Loss over unique parameters, one point per variant and budget, and over training FLOPs, one line per variant."""
  figure = Figure(figsize=(11, 4.8), dpi=DPI, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, sharey=True)
  groups = _groups(runs)
  variants = list(dict.fromkeys(variant for _, variant, _ in groups))
  for variant, colour in zip(variants, COLOURS * len(variants)):
    some = [g for g in groups if g[1] == variant]
    for axis, x in ((left, [g[2][0].params for g in some]), (right, [g[0] for g in some])):
      losses = np.array([[f([r.loss for r in g[2]]) for f in (np.mean, min, max)] for g in some]).T
      errors = np.abs(losses[1:] - losses[:1])
      line = "" if axis is left else "-"
      axis.errorbar(x, losses[0], errors, fmt=f"o{line}", color=colour, ms=5, capsize=3, lw=1.2, label=variant)
  for budget in dict.fromkeys(budget for budget, _, _ in groups):
    point = max((g[2][0].params, np.mean([r.loss for r in g[2]])) for g in groups if g[0] == budget)
    left.annotate(compact(budget, "FLOP"), point, (-8, -3), textcoords="offset points", ha="right", fontsize=8)
  left.set_xlabel("Unique parameters without the embedding")
  left.set_ylabel("Held-out loss, causal (nats per token)")
  right.set_xlabel("Training FLOPs")
  for axis, places in ((left, {g[2][0].params for g in groups}), (right, {g[0] for g in groups})):
    axis.set_xscale("log")
    ticks = []
    for place in sorted(places):
      if not ticks or place > 1.04 * ticks[-1]:  # else their labels would lie upon each other
        ticks.append(place)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axis.grid(alpha=0.25)
  right.legend(fontsize=8, frameon=False)
  figure.suptitle("Equal training FLOPs: mean and range over seeds", fontsize=11, color=INK)
  figure.savefig(path, metadata={"Software": None})

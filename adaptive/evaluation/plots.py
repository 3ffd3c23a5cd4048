"""The picture: loss and accuracy of every sub-model against what it costs, as a static PNG.

Drawn through matplotlib's object interface, so that no global state changes and no display is needed.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from adaptive.evaluation.results import Family, number, shared_hypervolumes, summarise

# Told apart by readers with any of the common colour deficiencies, also in grey; vermillion and blue first.
COLOURS = ("#0b6cb0", "#d1570b", "#0d8a66", "#a8437f", "#8a6d00", "#3d3d3d", "#4aa3d8", "#7a5bb5")
MARKERS, DASHES = ("o", "s", "^", "D"), ("-", (0, (4, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1, 1.5)))
INK, FAINT = "#2b2f36", "#8b929c"
DPI = 160
MOST = 6  # of more families only the fronts are drawn, joined by straight lines, and no point is named


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes: two fields of `Result` and what they are called, with units."""

  cost: str
  quality: str
  cost_label: str
  quality_label: str
  note: str

  @property
  def lower_is_better(self) -> bool:
    return self.quality != "accuracy"

  def points(self, family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Cost and quality, each [n]; nan where not measured. Accuracy in percent."""
    return family.column(self.cost), family.column(self.quality) * (100.0 if self.quality == "accuracy" else 1.0)


_LOSSES = {"loss": "Loss (nats per token)", "bits_per_byte": "Bits per byte"}


def plot_png(
  families: Family | Sequence[Family], path: str | pathlib.Path, loss: Literal["loss", "bits_per_byte"] = "loss"
) -> None:
  """Two panels (loss and accuracy over FLOPs per token), and a third over step latency where it was measured.

  Points that are not finite are left out. Families of different tokenizers compare in `bits_per_byte` only.
  """
  draw([families] if isinstance(families, Family) else families, loss).savefig(path, metadata={"Software": None})


def draw(families: Sequence[Family], loss: str = "loss") -> Figure:
  """The figure of `plot_png`, finished."""
  panels = _panels(families, loss)
  height = 5.4 if len(families) <= MOST else 6.6
  figure = Figure(figsize=(5.6 * len(panels), height), dpi=DPI, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05)
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, panel in zip(axes, panels):
    _draw_panel(axis, panel, families)
  _heading(figure, families)
  # Positions in pixels are known only once the layout is; the names must not move it again.
  figure.draw_without_rendering()
  figure.set_layout_engine("none")
  for axis, panel in zip(axes, panels):
    _name_ends(axis, panel, families)
  return figure


def _panels(families: Sequence[Family], loss: str) -> list[Panel]:
  flops, label = "flops_per_token", _LOSSES[loss]
  cost_label = "Forward {}FLOPs per token, output head included"
  panels = [
    Panel(flops, loss, cost_label, label, "lower is better"),
    Panel(flops, "accuracy", cost_label, "Top-1 next-token accuracy (%)", "higher is better"),
  ]
  if any(np.isfinite(family.column("step_ms")).any() for family in families):
    panels.append(Panel("step_ms", loss, "One-token step, median (ms; whisker: to p90)", label, "lower is better"))
  return panels


def _draw_panel(axis: Axes, panel: Panel, families: Sequence[Family]) -> None:
  _frame(axis, panel, families)
  for place, (family, colour) in enumerate(zip(families, colours(families))):
    x, y = panel.points(family)
    index, (marker, dash) = family.front(panel.cost, panel.quality), _cycle(place)
    crowded = len(families) > MOST
    off = np.setdiff1d(np.flatnonzero(np.isfinite(x) & np.isfinite(y)), index)
    if crowded:
      off = off[:0]
    elif panel.cost == "step_ms":
      _whiskers(axis, family, y, colour)
    axis.scatter(x[off], y[off], s=20, marker=marker, color=colour, alpha=0.32, linewidths=0, zorder=3)
    # The best quality within a budget stays what it was until the next better sub-model is affordable.
    drawstyle = "default" if crowded else "steps-post"
    line = dict(drawstyle=drawstyle, color=colour, linewidth=1.4 if crowded else 1.8, linestyle=dash, alpha=0.9)
    axis.plot(x[index], y[index], **line, zorder=4)
    axis.scatter(x[index], y[index], s=30, marker=marker, color=colour, edgecolors="white", linewidths=0.8, zorder=5)
    full = family.full_index
    if np.isfinite(x[full]) and np.isfinite(y[full]):
      if not crowded:
        axis.axhline(y[full], color=colour, linewidth=0.9, linestyle=(0, (1, 3)), alpha=0.8, zorder=2)
      # Full models of several runs often coincide: the later star is the smaller, so that each still shows.
      star = max(250 - 55 * place, 90)
      axis.scatter(x[full], y[full], s=star, marker="*", color=colour, edgecolors="white", linewidths=0.9, zorder=6)


def _whiskers(axis: Axes, family: Family, y: np.ndarray, colour: str) -> None:
  median, p90 = family.column("step_ms"), family.column("step_ms_p90")
  axis.hlines(y, median, np.fmax(p90, median), color=colour, linewidth=0.9, alpha=0.28, zorder=2)


def frame(axis: Axes, title: str, note: str, x_label: str) -> None:
  """What all pictures have in common: faint lines, a title at the left, a note at the right, names below."""
  axis.spines[["top", "right"]].set_visible(False)
  axis.spines[["left", "bottom"]].set_color(FAINT)
  axis.tick_params(colors=INK, length=3, color=FAINT, labelsize=9.5)
  axis.grid(True, color="#e6e8eb", linewidth=0.8)
  axis.set_axisbelow(True)
  axis.margins(x=0.09, y=0.13)
  axis.yaxis.set_major_locator(MaxNLocator(6))
  axis.set_xlabel(x_label, color=INK, fontsize=10.5, labelpad=6)
  axis.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=9)
  axis.set_title(note, loc="right", color=FAINT, fontsize=9.5, pad=9)


def _frame(axis: Axes, panel: Panel, families: Sequence[Family]) -> None:
  cost = np.concatenate([panel.points(family)[0] for family in families])
  cost = cost[np.isfinite(cost)]
  scale, prefix = _prefix(cost) if panel.cost != "step_ms" else (1.0, "")
  frame(axis, panel.quality_label, panel.note, panel.cost_label.format(prefix))
  _cost_axis(axis, cost, scale)


def _prefix(cost: np.ndarray) -> tuple[float, str]:
  """The SI prefix in which the largest cost has one to three digits before the point."""
  largest = cost.max(initial=1.0)
  steps = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")]
  return next(step for step in steps if largest >= step[0] or step[0] == 1.0)


def _cost_axis(axis: Axes, cost: np.ndarray, scale: float) -> None:
  """Logarithmic from a factor of 6 on, with round numbers as ticks."""
  axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))
  positive = cost[cost > 0]
  if len(positive) == 0 or len(positive) < len(cost) or positive.max() < 6 * positive.min():
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    return
  axis.set_xscale("log")
  decades = range(int(np.floor(np.log10(positive.min()))) - 1, int(np.ceil(np.log10(positive.max()))) + 1)
  # Within a decade or so every round number is marked, over many only the powers of ten.
  digits = (1, 2, 3, 5) if len(decades) <= 4 else (1, 2, 5) if len(decades) <= 6 else (1,)
  axis.xaxis.set_major_locator(FixedLocator([d * 10.0**k for k in decades for d in digits]))
  axis.xaxis.set_minor_locator(NullLocator())
  axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g}"))


def _heading(figure: Figure, families: Sequence[Family]) -> None:
  labels = [*_captions(families), "full model", *["off the front"] * (len(families) <= MOST)]
  handles = [_handle(family, colour, place) for place, (family, colour) in enumerate(zip(families, colours(families)))]
  handles += [
    Line2D([], [], linestyle="none", marker="*", markersize=12, color=FAINT, markeredgecolor="white"),
    Line2D([], [], linestyle="none", marker="o", markersize=5, color=FAINT, alpha=0.5),
  ][: len(labels) - len(families)]
  legend(figure, handles, labels)


def legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
  """Names above all panels."""
  # As many columns as there is room for: a character takes about 0.085 inches.
  columns = int(np.clip(figure.get_figwidth() // (0.085 * max(map(len, labels)) + 0.9), 1, len(labels)))
  written = figure.legend(
    handles, [" "] * len(handles), loc="outside upper left", ncols=columns, frameon=False, fontsize=10.5,
    labelcolor=INK, handletextpad=0.5, columnspacing=2.0,
  )  # fmt: skip
  # Set afterwards and as plain text: a run's name may begin with an underscore or hold dollar signs.
  for text, label in zip(written.get_texts(), labels):
    text.set(text=label, parse_math=False)


def _handle(family: Family, colour: str, place: int) -> Line2D:
  if len(family.results) == 1:
    return Line2D([], [], linestyle="none", marker="*", markersize=13, color=colour, markeredgecolor="white")
  marker, dash = _cycle(place)
  style = dict(linewidth=1.8, linestyle=dash, marker=marker, markersize=5.5, markeredgecolor="white")
  return Line2D([], [], color=colour, **style)


def _cycle(place: int) -> tuple[str, str | tuple]:
  """Marker and dash of a family: where colours begin again, other ones."""
  again = place // len(COLOURS)
  return MARKERS[again % len(MARKERS)], DASHES[again % len(DASHES)]


def _captions(families: Sequence[Family]) -> list[str]:
  """Label, number of sub-models and hypervolume: of several families in their shared box, so that it ranks them.

  Of many, their labels: what more there is to say stands in the table.
  """
  areas = shared_hypervolumes(families) if len(families) > 1 else [summarise(families[0])["hypervolume"]]
  captions = []
  for family, area in zip(families, areas):
    label = family.label if len(family.label) <= 48 else family.label[:47] + "…"
    single = len(family.results) == 1 or len(families) > MOST
    captions.append(
      label if single else f"{label} · {len(family.results)} sub-models · hypervolume {number(area, '.3f')}"
    )
  return captions


def colours(families: Sequence[Family]) -> list[str]:
  """One colour per family; they repeat after eight, with other markers and dashes."""
  return [COLOURS[i % len(COLOURS)] for i in range(len(families))]


def _name_ends(axis: Axes, panel: Panel, families: Sequence[Family]) -> None:
  """Names the full model and the cheapest on the front of every family, wherever there is room."""
  if len(families) > MOST:
    return
  points, obstacles = [], []
  for family, colour in zip(families, colours(families)):
    x, y = panel.points(family)
    index = family.front(panel.cost, panel.quality)
    obstacles.append(_pixels(axis, x, y))
    obstacles.append(_along(_pixels(axis, np.repeat(x[index], 2)[1:], np.repeat(y[index], 2)[:-1])))
    name = family.label if len(family.results) == 1 else "full" if len(families) > 1 else f"{family.full} (full)"
    points.append((x[family.full_index], y[family.full_index], name, colour))
    if len(index) and index[0] != family.full_index:
      points.append((x[index[0]], y[index[0]], family.results[index[0]].name, colour))
  obstacles = np.concatenate(obstacles)
  taken = []
  for x, y, name, colour in points:
    if np.isfinite(x) and np.isfinite(y):
      taken += _place(axis, (x, y), name, colour, obstacles, taken)


def _pixels(axis: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """[m, 2] positions on the canvas of the points that are finite."""
  finite = np.isfinite(x) & np.isfinite(y)
  return axis.transData.transform(np.stack([x[finite], y[finite]], axis=1)).reshape(-1, 2)


def _along(corners: np.ndarray, step: float = 6.0) -> np.ndarray:
  """[m, 2] positions every few pixels along a line, so that a label can see it."""
  pieces = [corners]
  for a, b in itertools.pairwise(corners):
    count = int(np.hypot(*(b - a)) // step) + 1
    pieces.append(a + (b - a) * np.linspace(0, 1, count)[:, None])
  return np.concatenate(pieces)


def _place(axis: Axes, xy: tuple, name: str, colour: str, obstacles: np.ndarray, taken: list[Bbox]) -> list[Bbox]:
  """Writes one name where it covers least, near its point; not at all if it would cover another name.

  Returns:
    the box of the name in pixels, as a list of none or one.
  """
  text = axis.annotate(
    name, xy, xytext=(0, 0), textcoords="offset points", fontsize=9, color=colour, zorder=8, annotation_clip=False,
    parse_math=False, path_effects=[withStroke(linewidth=2.5, foreground="white")],
  )  # fmt: skip
  best = None
  for offset, align in _candidates():
    text.set_position(offset)
    text.set(ha=align[0], va=align[1])
    box = text.get_window_extent().padded(4)
    if any(box.overlaps(other) for other in taken) or not _inside(axis.bbox, box):
      continue
    covered = np.sum(np.all((obstacles >= box.min) & (obstacles <= box.max), axis=1))
    score = covered + 0.02 * np.hypot(*offset)
    if best is None or score < best[0]:
      best = (score, offset, align, box)
  if best is None:
    text.remove()
    return []
  text.set_position(best[1])
  text.set(ha=best[2][0], va=best[2][1])
  return [best[3]]


def _candidates() -> Iterable[tuple[tuple[float, float], tuple[str, str]]]:
  """Offsets in points around the marker, with the alignment that keeps the text on that side of it."""
  for radius in (9.0, 14.0, 20.0, 28.0):
    for angle in np.arange(0, 360, 30):
      dx, dy = np.cos(np.radians(angle)), np.sin(np.radians(angle))
      horizontal = "left" if dx > 0.1 else "right" if dx < -0.1 else "center"
      vertical = "bottom" if dy > 0.1 else "top" if dy < -0.1 else "center"
      yield (radius * dx, radius * dy), (horizontal, vertical)


def _inside(frame: Bbox, box: Bbox) -> bool:
  # A little beyond the frame is fine at the right and the top, where no axis is drawn.
  return box.x0 >= frame.x0 and box.x1 <= frame.x1 + 12 and box.y0 >= frame.y0 and box.y1 <= frame.y1 + 12

"""The picture of a quiz: layers run and reward by level, or reward against layers run, as a static PNG.

Whiskers are 95 % intervals, of resampled questions. A twin that decides by chance has the colour of the sub-model whose
rates it has, and is dashed and hollow.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaptive.evaluation import plots
from adaptive.evaluation.quiz import CHANCE, Line, interval

_FULL = "full model"
_LONGEST = 48  # characters of a name


class _Style(NamedTuple):
  """How a contender is drawn; twins share a colour."""

  colour: str
  marker: str
  dash: str | tuple
  hollow: bool

  def of_marker(self, size: float) -> dict:
    face, edge = ("white", self.colour) if self.hollow else (self.colour, "white")
    width = 1.3 if self.hollow else 0.8
    return dict(marker=self.marker, markersize=size, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width)


_STAR = _Style(plots.INK, "*", (0, (1, 2.5)), False)


def plot_png(lines: Sequence[Line], levels: Sequence[int | None], path: str | pathlib.Path, reward: str) -> None:
  """Draws what contenders made of questions.

  Args:
    lines: the last one is the full model. levels: of the questions, None where one has none. reward: what it is called.
  """
  draw(lines, levels, reward).savefig(path, metadata={"Software": None})


def draw(lines: Sequence[Line], levels: Sequence[int | None], reward: str) -> Figure:
  """The figure of `plot_png`, finished: two panels where there are levels, otherwise one."""
  of = np.array([np.nan if level is None else level for level in levels], float)
  graded = np.isfinite(of).any()
  *others, full = lines
  others = [line for line in others if np.isfinite(line.layers).any()]
  others.sort(key=lambda line: line.name.startswith(CHANCE))  # twins after all that they are twins of
  if graded:  # those that run the same layers for every question have nothing to say, unless nobody has
    others = [line for line in others if np.nanmax(line.layers) > np.nanmin(line.layers)] or others
  styles = _styles([line.name for line in others])
  panels, names = 1 + bool(graded), [*(line.name for line in others), f"{full.name} ({_FULL})"]
  rows = 0.24 * len(names) / panels  # of names, above the panels
  figure = Figure(figsize=(6.4 * panels, 4.8 + rows), dpi=plots.DPI, facecolor="white", layout="constrained")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05)
  axes = figure.subplots(1, panels, squeeze=False)[0]
  if graded:
    _layers_by_level(axes[0], others, full, styles, of)
    _reward_by_level(axes[1], others, full, styles, of, reward)
  else:
    _reward_against_layers(axes[0], others, full, styles, reward)
  handles = [
    Line2D([], [], color=s.colour, linestyle=s.dash if graded else "none", linewidth=1.8, **s.of_marker(6))
    for s in styles
  ]
  full_line = _STAR.dash if graded else "none"
  handles.append(Line2D([], [], color=_STAR.colour, linestyle=full_line, linewidth=1.3, **_STAR.of_marker(12)))
  plots.legend(figure, handles, [name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…" for name in names])
  return figure


def _styles(names: Sequence[str]) -> list[_Style]:
  """Twins share colour and marker; where colours begin again, other markers."""
  roots = list(dict.fromkeys(name.removeprefix(CHANCE) for name in names))
  styles = []
  for name in names:
    place, twin = roots.index(name.removeprefix(CHANCE)), name.startswith(CHANCE)
    colour = plots.COLOURS[place % len(plots.COLOURS)]
    marker = plots.MARKERS[(place + place // len(plots.COLOURS)) % len(plots.MARKERS)]
    styles.append(_Style(colour, marker, plots.DASHES[1] if twin else "-", twin))
  return styles


def _layers_by_level(axis: Axes, lines, full: Line, styles, of: np.ndarray) -> None:
  plots.frame(axis, "Layers run", "mean of a question's tokens, 95 % interval", "Level")
  for offset, line, style in zip(_offsets(len(lines)), lines, styles):
    _curve(axis, [_mean(line.layers[of == level]) for level in _distinct(of)], style, of, offset)
  if np.isfinite(full.layers).any():
    _level_of_full(axis, [np.nanmean(full.layers)] * len(_distinct(of)), of)
  axis.set_xticks(_distinct(of))


def _reward_by_level(axis: Axes, lines, full: Line, styles, of: np.ndarray, reward: str) -> None:
  plots.frame(axis, reward, "95 % interval of the mean", "Level")
  for offset, line, style in zip(_offsets(len(lines)), lines, styles):
    _curve(axis, [_mean(line.rewards[of == level]) for level in _distinct(of)], style, of, offset)
  _level_of_full(axis, [full.rewards[of == level].mean() for level in _distinct(of)], of)
  axis.set_xticks(_distinct(of))


def _curve(axis: Axes, means: Iterable[tuple[float, float, float]], style: _Style, of: np.ndarray, offset) -> None:
  mean, low, high = np.array(list(means), float).T
  levels = _distinct(of)
  x = levels + offset * np.diff(levels).min(initial=1.0)  # beside each other, so that whiskers can be told apart
  axis.vlines(x, low, high, color=style.colour, linewidth=1.1, alpha=0.7, zorder=3)
  axis.plot(x, mean, color=style.colour, linestyle=style.dash, linewidth=1.6, **style.of_marker(6), zorder=4)


def _level_of_full(axis: Axes, values: Sequence[float], of: np.ndarray) -> None:
  star = _STAR.of_marker(12)
  axis.plot(_distinct(of), values, color=_STAR.colour, linestyle=_STAR.dash, linewidth=1.3, **star, zorder=5)


def _reward_against_layers(axis: Axes, lines, full: Line, styles, reward: str) -> None:
  plots.frame(axis, reward, "whiskers: 95 % interval of the difference to the full model", "Layers run, mean")
  here = full.rewards.mean()
  for line, style in zip(lines, styles):
    x, (_, low, high) = np.nanmean(line.layers), line.against
    axis.vlines([x], here + low, here + high, color=style.colour, linewidth=1.1, alpha=0.7, zorder=3)
    axis.plot([x], [line.rewards.mean()], color=style.colour, linestyle="none", **style.of_marker(8), zorder=4)
  axis.axhline(here, color=_STAR.colour, linewidth=0.9, linestyle=(0, (1, 3)), alpha=0.8, zorder=2)
  if np.isfinite(full.layers).any():
    layers = [np.nanmean(full.layers)]
    axis.plot(layers, [here], color=_STAR.colour, linestyle="none", **_STAR.of_marker(14), zorder=5)


def _mean(values: np.ndarray) -> tuple[float, float, float]:
  """Mean of a level's questions and its 95 % interval; nan where nothing was measured."""
  values = values[np.isfinite(values)]
  return interval(values, 0.0) if len(values) else (np.nan,) * 3


def _distinct(of: np.ndarray) -> np.ndarray:
  return np.unique(of[np.isfinite(of)])


def _offsets(number: int) -> np.ndarray:
  """Of contenders from their level, in distances between levels."""
  return (np.arange(number) - (number - 1) / 2) * min(0.05, 0.5 / max(number, 1))

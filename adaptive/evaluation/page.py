"""The page: one HTML file that opens without a network, with a plot whose points tell everything about themselves.

The plot has loss and accuracy side by side over a cost that the reader picks. Summaries and full tables stand below.
"""

import html
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from adaptive.evaluation import baselines
from adaptive.evaluation.plots import INK, colours
from adaptive.evaluation.results import Family, Result, compact, number, shared_hypervolumes, summary_lines

COSTS = {
  "flops_per_token": "FLOPs per token",
  "params_active": "Active parameters",
  "params_non_embedding": "Non-embedding parameters",
  "kv_bytes_per_token": "KV cache, bytes per token",
  "prefill_ms": "Prefill, ms (median)",
  "step_ms": "One-token step, ms (median)",
}
QUALITIES = {"loss": "Loss, nats per token (lower is better)", "accuracy": "Top-1 accuracy (higher is better)"}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2f36; margin: 24px auto; max-width: 1320px; padding: 0 20px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 6px; }
ul { margin: 6px 0 12px; padding-left: 20px; } .notes { color: #667; }
.scroll { max-height: 620px; overflow: auto; border: 1px solid #e3e6ea; border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #f4f6f8; }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(even) td { background: #fafbfc; }
tr.off td { color: #8b929c; } tr.full td { font-weight: 600; }
"""


def plot_html(families: Family | Sequence[Family], path: str | pathlib.Path) -> None:
  """Writes the page (UTF-8, about 5 MB: the plotting library is inside). Points that are not finite are left out."""
  families = [families] if isinstance(families, Family) else list(families)
  plot = _figure(families).to_html(
    full_html=False, include_plotlyjs=True, include_mathjax=False, div_id="pareto", default_height="560px",
    config={"displaylogo": False, "responsive": True},
  )  # fmt: skip
  title = html.escape("Quality against cost: " + ", ".join(f.label for f in families))
  body = "\n".join(_section(family, area) for family, area in zip(families, shared_hypervolumes(families)))
  page = (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    f"\n<body><h1>{title}</h1>\n{plot}\n{body}\n</body></html>\n"
  )
  pathlib.Path(path).write_text(page, encoding="utf-8")


def _figure(families: Sequence[Family]) -> go.Figure:
  costs = [c for c in COSTS if any(np.isfinite(f.column(c)).any() for f in families)]
  figure = make_subplots(1, 2, subplot_titles=list(QUALITIES.values()), horizontal_spacing=0.07)
  for place, quality in enumerate(QUALITIES, 1):
    for family, colour in zip(families, colours(families)):
      line, points = _traces(family, colour, quality, first=place == 1)
      figure.add_trace(line, 1, place)
      figure.add_trace(points, 1, place)
  figure.update_xaxes(title_text=COSTS[costs[0]], gridcolor="#e6e8eb", exponentformat="SI")
  figure.update_yaxes(gridcolor="#e6e8eb", zeroline=False)
  figure.update_yaxes(tickformat=".1%", col=2)
  figure.update_layout(
    updatemenus=[_cost_menu(families, costs), _scale_menu()], plot_bgcolor="white", font_color=INK, hovermode="closest",
    hoverlabel={"bgcolor": "white", "align": "left", "font_color": INK}, margin={"l": 60, "r": 20, "t": 110, "b": 90},
    legend={"orientation": "h", "y": -0.18, "x": 0}, height=560,
  )  # fmt: skip
  return figure


def _traces(family: Family, colour: str, quality: str, first: bool) -> tuple[go.Scatter, go.Scatter]:
  shape = _shape(family, quality, next(iter(COSTS)))
  shared = {"legendgroup": family.label, "name": html.escape(family.label, quote=False)}
  line = go.Scatter(
    x=shape["line_x"], y=shape["line_y"], mode="lines", line={"color": colour, "width": 2, "shape": "hv"},
    hoverinfo="skip", showlegend=False, **shared,
  )  # fmt: skip
  symbols = ["star" if r.name == family.full else "circle" for r in family.results]
  points = go.Scatter(
    x=shape["x"], y=shape["y"], mode="markers", text=[_hover(family, r) for r in family.results],
    hovertemplate="%{text}<extra></extra>", showlegend=first, **shared,
    marker={"color": colour, "symbol": symbols, "size": shape["size"], "opacity": shape["opacity"],
            "line": {"color": "white", "width": 1}},
  )  # fmt: skip
  return line, points


def _shape(family: Family, quality: str, cost: str) -> dict[str, list]:
  """What of a family's two traces depends on the cost axis: positions, the front, and the look of what is off it."""
  x, y = family.column(cost), family.column(quality)
  index = family.front(cost, quality)
  on_front = np.isin(np.arange(len(x)), index)
  full = np.arange(len(x)) == family.full_index
  return {
    "x": _values(x),
    "y": _values(y),
    "line_x": _values(x[index]),
    "line_y": _values(y[index]),
    "size": np.where(full, 16, np.where(on_front, 9, 7)).tolist(),
    "opacity": np.where(on_front | full, 1.0, 0.35).tolist(),
  }


def _values(array: np.ndarray) -> list[float | None]:
  return [float(v) if np.isfinite(v) else None for v in array]


def _cost_menu(families: Sequence[Family], costs: Sequence[str]) -> dict[str, Any]:
  """A dropdown that moves every trace to another cost; traces are in the order in which `_figure` adds them."""
  buttons = []
  for cost in costs:
    traces = []
    for quality in QUALITIES:
      for family in families:
        s = _shape(family, quality, cost)
        traces += [(s["line_x"], s["line_y"], 6, 1.0), (s["x"], s["y"], s["size"], s["opacity"])]
    data = dict(zip(("x", "y", "marker.size", "marker.opacity"), map(list, zip(*traces))))
    axes = {f"{axis}.{key}": v for axis in ("xaxis", "xaxis2") for key, v in _axis(cost).items()}
    buttons.append({"label": COSTS[cost], "method": "update", "args": [data, axes]})
  return {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.24, "yanchor": "top", "showactive": True}


def _axis(cost: str) -> dict[str, Any]:
  return {"title.text": COSTS[cost], "autorange": True}


def _scale_menu() -> dict[str, Any]:
  buttons = [
    {"label": f"{kind} cost axis", "method": "relayout", "args": [{"xaxis.type": kind, "xaxis2.type": kind}]}
    for kind in ("linear", "log")
  ]
  return {"buttons": buttons, "x": 0.24, "xanchor": "left", "y": 1.24, "yanchor": "top", "showactive": True}


def _hover(family: Family, r: Result) -> str:
  error = f" (±{number(r.loss_stderr, '.4f')} against the full model)" if r.name != family.full else ""
  rows = [
    *((key, str(value)) for key, value in r.dial.items()),
    ("loss", f"{number(r.loss, '.4f')} nats per token{error}"),
    ("bits per byte", number(r.bits_per_byte, ".4f")),
    ("accuracy", number(r.accuracy, ".2%")),
    ("agreement with the full model", number(r.agreement, ".1%")),
    ("FLOPs per token", compact(r.flops_per_token)),
    ("parameters", f"{compact(r.params_total)} total, {compact(r.params_non_embedding)} without embedding, "
                   f"{compact(r.params_active)} active"),
    ("KV cache", f"{compact(r.kv_bytes_per_token)}B per token"),
    ("prefill", _latency(r.prefill_ms, r.prefill_ms_p90)),
    ("one-token step", _latency(r.step_ms, r.step_ms_p90)),
  ]  # fmt: skip
  head = f"<b>{html.escape(r.name, quote=False)}</b> ({html.escape(family.label, quote=False)})"
  return "<br>".join([head, *(html.escape(f"{key}: {value}", quote=False) for key, value in rows)])


def _latency(median: float | None, p90: float | None) -> str:
  return "not measured" if median is None else f"{number(median, '.3g')} ms, p90 {number(p90, '.3g')} ms"


def _section(family: Family, shared: float) -> str:
  notes = " · ".join(f"{html.escape(str(k))}: {html.escape(str(v))}" for k, v in family.notes.items())
  lines = [*summary_lines(family), f"hypervolume in the box that all runs of this page share: {number(shared, '.3f')}"]
  items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
  return (
    f'<h2>{html.escape(family.label)}</h2><p class="notes">{notes}</p><ul>{items}</ul>'
    f'<div class="scroll"><table>{_table(family)}</table></div>'
  )


def _table(family: Family) -> str:
  """All sub-models by rising FLOPs; those off the front of loss in grey, the full model in bold."""
  plans = dict(zip((r.name for r in family.results), baselines.fixed(family)))
  columns = {
    "sub-model": lambda r: r.name,
    "loss": lambda r: number(r.loss, ".4f"),
    "± vs full": lambda r: number(r.loss_stderr, ".4f"),
    "bits/byte": lambda r: number(r.bits_per_byte, ".4f"),
    "accuracy": lambda r: number(r.accuracy, ".2%"),
    "agreement": lambda r: number(r.agreement, ".1%"),
    "total": lambda r: compact(r.params_total),
    "non-embedding": lambda r: compact(r.params_non_embedding),
    "active": lambda r: compact(r.params_active),
    "FLOPs/token": lambda r: compact(r.flops_per_token),
    "KV/token": lambda r: compact(r.kv_bytes_per_token, "B"),
    "fixed plans": lambda r: number(plans[r.name], ".4f"),
    "at random": lambda r: number(r.random_loss, ".4f"),
    "prefill ms": lambda r: number(r.prefill_ms, ".3g"),
    "step ms": lambda r: number(r.step_ms, ".3g"),
  }
  front = set(family.front().tolist())
  rows = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns) + "</tr>"]
  for i in np.argsort(family.column("flops_per_token"), kind="stable"):
    r = family.results[i]
    kind = "full" if r.name == family.full else "on" if i in front else "off"
    rows.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(c(r))}</td>" for c in columns.values()) + "</tr>")
  return "\n".join(rows)

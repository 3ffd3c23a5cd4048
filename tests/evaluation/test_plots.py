"""The picture and the page: every point is drawn, names stay apart, and the page opens without a network."""

import dataclasses
import html.parser
import itertools
import math

import matplotlib
import matplotlib.image
import numpy as np
import plotly.io
import pytest
from made_up import DENSE, ODD, grid, replaced
from matplotlib.collections import PathCollection

from adaptive.evaluation import page, plots
from adaptive.evaluation.page import plot_html
from adaptive.evaluation.plots import plot_png


@pytest.mark.parametrize(
  ("families", "panels"),
  [
    ([grid(latency=False)], 2),
    ([grid("a"), DENSE, grid("_b", seed=1, latency=False)], 3),
    ([DENSE], 2),
    ([ODD], 3),
  ],
)
def test_png_is_drawn(tmp_path, families, panels):
  backend = matplotlib.rcParams._get_backend_or_none()
  plot_png(families, tmp_path / "p.png")
  assert matplotlib.rcParams._get_backend_or_none() == backend, "the process's backend was changed"
  image = drawn(tmp_path / "p.png")
  assert abs(image.shape[1] - 5.6 * panels * plots.DPI) <= 1  # older matplotlibs round down
  below_legend = image[image.shape[0] // 4 :]
  for colour in plots.colours(families):
    assert pixels(below_legend, colour) > 100, f"nothing is drawn in {colour}"


def test_png_without_any_point(tmp_path):
  plot_png(replaced(DENSE, 0, loss=math.nan, accuracy=math.nan), tmp_path / "p.png")
  image = drawn(tmp_path / "p.png")
  assert pixels(image[image.shape[0] // 4 :], plots.COLOURS[0]) == 0


def test_every_finite_point_is_in_every_panel():
  panels = plots.draw([ODD, DENSE]).axes
  for axis, missing in zip(panels, (1, 1, 2), strict=True):
    dots = sum(len(c.get_offsets()) for c in axis.collections if isinstance(c, PathCollection))
    stars = 2 if axis is not panels[2] else 1  # the dense model was not timed
    fronts = 1 if axis is not panels[2] else 0  # it is its own front
    assert dots == 24 - missing + stars + fronts


def drawn(path):
  """[height, width, 3] of 0 to 255."""
  return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.int16)


def pixels(image, colour):
  """How many pixels are (nearly) of one colour, "#rrggbb"."""
  wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.int16)
  return int(np.sum(np.all(np.abs(image - wanted) <= 12, axis=-1)))


def test_names_do_not_cover_each_other():
  """Six families whose ends almost coincide: what is written at all is written apart, and inside the picture."""
  families = [grid(str(k), seed=k, latency=False) for k in range(6)]
  figure = plots.draw(families)
  for axis in figure.axes:
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) >= 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= axis.bbox.y0 for box in boxes)


class Tags(html.parser.HTMLParser):
  """Collects the tags of a page with their attributes."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))


HOSTILE = "</script><img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
  path = tmp_path_factory.mktemp("page") / "p.html"
  family = dataclasses.replace(replaced(grid(HOSTILE), 0, name=HOSTILE), notes={HOSTILE: HOSTILE})
  plot_html([family, DENSE, ODD], path)
  return path.read_text(encoding="utf-8")


def test_html_needs_no_network(hostile_page):
  tags = Tags(hostile_page).tags
  assert "plotly.js v" in hostile_page
  assert not [tag for tag, attrs in tags if tag in ("link", "img", "iframe") or "src" in attrs or "href" in attrs]


def test_html_escapes_texts(hostile_page):
  assert HOSTILE not in hostile_page
  assert "&lt;img src=x onerror" in hostile_page


def test_html_has_every_result_in_its_tables(hostile_page):
  assert sum(tag == "tr" for tag, _ in Tags(hostile_page).tags) == 24 + 1 + 24 + 3  # and three headers


def test_hover_tells_everything():
  family = grid("run")
  points = page._figure([family]).data[1]
  first = points.text[0]
  r = family.results[0]
  for wanted in (r.name, "depth: 1", "d_ff: 128", f"{r.loss:.4f}", f"{r.bits_per_byte:.4f}", f"{r.accuracy:.2%}",
                 "FLOPs per token: 4.79M", "KV cache: 512B", "p90", "active"):  # fmt: skip
    assert wanted in first
  assert "<i>" not in page._figure([replaced(family, 0, name="<i>")]).data[1].text[0]


def test_cost_menu_moves_every_trace():
  families = [grid("a"), DENSE]
  figure = page._figure(families)
  menu = figure.layout.updatemenus[0]
  assert [b.label for b in menu.buttons] == list(page.COSTS.values())
  for cost, button in zip(page.COSTS, menu.buttons):
    data, axes = button.args
    assert all(len(values) == len(figure.data) for values in data.values())
    assert axes["xaxis.title.text"] == axes["xaxis2.title.text"] == page.COSTS[cost]
    for k, points in enumerate(data["x"][1::2]):
      expected = families[k % 2].column(cost)
      np.testing.assert_array_equal(np.array(points, np.float64), expected)
  # The first button is what is shown at first.
  assert [list(trace.x) for trace in figure.data] == [list(x) for x in menu.buttons[0].args[0]["x"]]
  assert len(page._figure([DENSE]).layout.updatemenus[0].buttons) == 4  # nothing was timed


def test_html_with_values_that_are_not_finite_is_valid_json():
  text = plotly.io.to_json(page._figure([ODD]))
  assert not {"NaN", "Infinity"} & set(text.replace(":", ",").replace("[", ",").split(","))


def test_of_many_families_only_the_fronts_are_drawn():
  few, many = ([grid(f"run {i}", seed=i) for i in range(n)] for n in (6, 13))
  texts = lambda families: [t.get_text() for t in plots.draw(families).legends[0].get_texts()]
  assert "off the front" in texts(few)
  assert len(texts(many)) == 13 + 1
  lines = [line for line in plots.draw(many).axes[0].lines if len(line.get_xdata()) > 1]
  assert len({(line.get_color(), str(line.get_linestyle()), line.get_drawstyle()) for line in lines}) == 13

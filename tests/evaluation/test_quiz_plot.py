"""The picture of a quiz: a line or a point for every contender, and a file that is a PNG."""

import matplotlib.image
import numpy as np
import pytest

from adaptive.evaluation import plots, quiz, quiz_plot
from adaptive.evaluation.quiz import CHANCE, Line

NUMBER = 60
LEVELS = [1 + i % 3 for i in range(NUMBER)]
NAMES = ["budget=-0.6", "budget=-0.5", CHANCE + "budget=-0.6", "budget=-0.4", CHANCE + "budget=-0.5"]


def line(name, layers=None, seed=0):
  rng = np.random.default_rng(seed)
  layers = 4 + rng.random(NUMBER) + np.array(LEVELS) if layers is None else np.full(NUMBER, layers, float)
  return Line(name, rng.integers(0, 2, NUMBER).astype(float), layers, np.ones(NUMBER))


def contenders(*others):
  lines = [*(line(name, seed=i) for i, name in enumerate(NAMES)), *others, line("depth=8", 8.0, 9)]
  for one in lines:
    one.against = quiz.interval(one.rewards, lines[-1].rewards)
  return lines


def drawn(axis, number=None):
  """Lines of a panel that have so many points."""
  return [found for found in axis.get_lines() if number is None or len(found.get_xdata()) == number]


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def whiskers(axis):
  return [segment for found in axis.collections for segment in found.get_segments()]


def test_a_line_for_every_contender_that_decides_and_the_full_model():
  lines = contenders(line("fixed plan, 6 layers", 6.0), line("depth=3", np.nan))
  figure = quiz_plot.draw(lines, LEVELS, "Reward, exact")
  layers, reward = figure.axes
  of = np.array(LEVELS)
  order = [NAMES[i] for i in (0, 1, 3, 2, 4)]
  assert legend(figure) == [*order, "depth=8 (full model)"]
  by_name = {one.name: one for one in lines}
  for axis, field in ((layers, "layers"), (reward, "rewards")):
    assert len(drawn(axis)) == len(NAMES) + 1
    for found, name in zip(drawn(axis, 3), [*order, "depth=8"], strict=True):
      values = getattr(by_name[name], field)
      np.testing.assert_allclose(found.get_ydata(), [values[of == level].mean() for level in (1, 2, 3)])
      assert np.abs(found.get_xdata() - [1, 2, 3]).max() < 0.3
    assert len(whiskers(axis)) == 3 * len(NAMES)
    low_high = whiskers(axis)[0][:, 1]
    assert low_high[0] < drawn(axis)[0].get_ydata()[0] < low_high[1]
  assert (layers.get_title("left"), reward.get_title("left")) == ("Layers run", "Reward, exact")


def test_twins_share_a_colour_and_are_hollow():
  _, reward = quiz_plot.draw(contenders(), LEVELS, "Reward").axes
  solid, hollow = drawn(reward)[0], drawn(reward)[3]
  assert solid.get_color() == hollow.get_color() == plots.COLOURS[0]
  assert (solid.get_markerfacecolor(), hollow.get_markerfacecolor()) == (plots.COLOURS[0], "white")
  assert solid.get_linestyle() != hollow.get_linestyle()


def test_without_levels_a_point_for_everyone_whose_layers_are_known():
  lines = contenders(line("fixed plan, 6 layers", 6.0), line("depth=3", np.nan))
  figure = quiz_plot.draw(lines, [None] * NUMBER, "Reward, choice")
  (axis,) = figure.axes
  points = {(found.get_xdata()[0], found.get_ydata()[0]) for found in drawn(axis, 1)}
  assert points == {(one.layers.mean(), one.rewards.mean()) for one in lines if one.name != "depth=3"}
  solid, twins = [NAMES[i] for i in (0, 1, 3)], [NAMES[i] for i in (2, 4)]
  assert legend(figure) == [*solid, "fixed plan, 6 layers", *twins, "depth=8 (full model)"]
  here = lines[-1].rewards.mean()
  found = sorted(tuple(segment[:, 1]) for segment in whiskers(axis))
  wanted = sorted((here + one.against[1], here + one.against[2]) for one in lines[:-2])
  np.testing.assert_allclose(found, wanted)


def test_where_nobody_decides_everyone_is_drawn():
  lines = [line("fixed a", 5.0), line("fixed b", 6.0), line("depth=8", 8.0)]
  assert [len(drawn(axis)) for axis in quiz_plot.draw(lines, LEVELS, "Reward").axes] == [3, 3]


def test_questions_without_a_level_are_left_out_of_the_panels():
  lines = [line("a"), line("depth=8", 8.0)]
  levels = [None if i < 30 else level for i, level in enumerate(LEVELS)]
  layers, _ = quiz_plot.draw(lines, levels, "Reward").axes
  of = np.array([0 if level is None else level for level in levels])
  wanted = [lines[0].layers[of == level].mean() for level in (1, 2, 3)]
  np.testing.assert_allclose(drawn(layers)[0].get_ydata(), wanted)


@pytest.mark.parametrize("levels", [LEVELS, [None] * NUMBER, [4] * NUMBER])
@pytest.mark.parametrize("alone", [True, False])
def test_it_is_a_png(tmp_path, levels, alone):
  """Also of names that would be mathematics, or hidden from a legend, and of a full model that nobody contends with."""
  lines = [line("depth=8", np.nan)] if alone else contenders(line("_$a^b$ " * 12))
  quiz_plot.plot_png(lines, levels, tmp_path / "p.png", "Reward")
  assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
  image = matplotlib.image.imread(tmp_path / "p.png")
  assert image.shape[1] == round(6.4 * (1 if levels[0] is None else 2) * plots.DPI)


def test_names_lie_above_the_panels_and_inside_the_picture():
  name = "budget={} of a contender with a name too long for anybody to read"
  lines = contenders(*(line(name.format(i), seed=i) for i in range(5)))
  for levels in (LEVELS, [None] * NUMBER):
    figure = quiz_plot.draw(lines, levels, "Reward")
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    for axis in figure.axes:
      assert axis.title.get_window_extent().y1 <= box.y0 + 1
      left, right = axis._left_title.get_window_extent(), axis._right_title.get_window_extent()
      assert left.x1 < right.x0

"""Published axes and ours: whole tensors and parts of them."""

import itertools

import numpy as np
import pytest

from adaptive.pretrained.layout import Layout

SIZE = dict(v=7, d=4, k=2, g=3, h=2, m=2, f=5)


@pytest.mark.parametrize(
  ("pattern", "shape", "raw", "ours"),
  [
    ("v d -> d v", (7, 4), (5, 2), (2, 5)),
    ("(k g h) d -> d k g h", (12, 4), (1 * 6 + 2 * 2 + 1, 3), (3, 1, 2, 1)),
    ("d (k g h) -> k g h d", (4, 12), (3, 1 * 6 + 2 * 2 + 1), (1, 2, 1, 3)),
    ("(m f) d -> d m f", (10, 4), (1 * 5 + 3, 2), (2, 1, 3)),
    ("(k h) -> k h", (4,), (3,), (1, 1)),
  ],
)
def test_an_entry_goes_where_its_letters_say(pattern, shape, raw, ours):
  layout = Layout(pattern, SIZE)
  assert layout.raw_shape == shape
  tensor = np.arange(np.prod(shape)).reshape(shape)
  found = layout.to_ours(tensor)
  assert found.shape == layout.shape
  assert found[ours] == tensor[raw]
  np.testing.assert_array_equal(layout.to_raw(found), tensor)


@pytest.mark.parametrize(
  ("pattern", "parts"),
  [("(k g h) d -> d k g h", (2, 2, 1, 1)), ("d (m f) -> m f d", (2, 1, 4)), ("v d -> d v", (4, 1))],
)
def test_parts_of_a_tensor_are_the_parts_of_the_whole(pattern, parts):
  """As devices hold them: axes that the sharding rules cut, in equal pieces."""
  layout = Layout(pattern, SIZE)
  tensor = np.arange(np.prod(layout.raw_shape)).reshape(layout.raw_shape)
  whole = layout.to_ours(tensor)
  ranges = [
    [slice(i * size // n, (i + 1) * size // n) if n > 1 else slice(None) for i in range(n)]
    for size, n in zip(layout.shape, parts)
  ]
  for index in itertools.product(*ranges):
    np.testing.assert_array_equal(layout.to_ours(tensor[layout.raw_index(index)]), whole[index])


def test_a_cut_that_is_no_range_of_the_published_axis_is_a_fault():
  with pytest.raises(AssertionError, match="must not be cut"):
    Layout("(k g h) d -> d k g h", SIZE).raw_index((slice(None), slice(None), slice(0, 1), slice(None)))

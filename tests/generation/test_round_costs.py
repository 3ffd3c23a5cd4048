"""What a round of self-speculative decoding costs, and the choice that follows from it."""

import numpy as np
import pytest

from adaptive.generation.drafts import Chooser, expected_tokens
from adaptive.generation.round_costs import RoundCosts

LAYERS, FULL, LENGTHS = (1, 2, 4, 6), 12, (1, 2, 4, 8)


def seconds(draft: int, length: int, drafted=1e-3, head=5e-4, passing=3e-4, checked=3e-4) -> float:
  """A machine on which a layer takes as long for a pass as for each token in it, and a head half a layer."""
  below, tokens = LAYERS[draft], LENGTHS[length]
  above = FULL - below
  return drafted * (tokens + 1) * below + head * tokens + passing * above + checked * above * (tokens + 1)


TRUE = np.array([[seconds(e, d) for d in range(len(LENGTHS))] for e in range(len(LAYERS))])


def test_layers_are_counted_until_a_round_was_timed():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=0.0)
  np.testing.assert_array_equal(costs.table, [[d * e + FULL for d in LENGTHS] for e in LAYERS])
  assert RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0).table[1, 2] == 4 * (2 + 1) + FULL


def test_a_few_pairs_tell_what_all_cost():
  costs, tried = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0), set()
  while (pair := costs.probe()) is not None:
    tried.add(pair)
    costs.observe(*pair, seconds(*pair))
  assert len(tried) == 4
  np.testing.assert_allclose(costs.table, TRUE, rtol=1e-6)


def test_one_slow_round_changes_nothing_and_what_was_timed_counts_as_it_is():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  for pair in [(0, 0), (0, 3), (3, 0), (3, 3), (2, 2)]:
    for factor in (99.0, 1.0, 9.0, 1.0):
      costs.observe(*pair, factor * seconds(*pair) * (2.0 if pair == (2, 2) else 1.0))
  assert costs.table[2, 2] == 2 * TRUE[2, 2]
  assert costs.table[0, 3] == TRUE[0, 3]


@pytest.mark.parametrize("layers", [(3,), (1, 5)])
@pytest.mark.parametrize("lengths", [(4,), (2, 6)])
def test_few_drafts_or_lengths_are_enough(layers, lengths):
  costs = RoundCosts(layers, FULL, lengths, overhead=1.0)
  while (pair := costs.probe()) is not None:
    costs.observe(*pair, 1e-3 * (lengths[pair[1]] * layers[pair[0]] + FULL))
  assert np.all(costs.table > 0)


def agreeing(rates):
  return {"agrees": (1e3 * np.asarray(rates), 1e3)}


def test_the_choice_is_the_best_by_seconds_not_by_layers():
  rates = np.array([0.8, 0.85, 0.9, 0.95])
  promise = expected_tokens(rates[:, None], np.array(LENGTHS)[None]) / TRUE
  best = np.unravel_index(np.argmax(promise), promise.shape)
  chosen = {}
  for measured in (False, True):
    chooser = Chooser(LAYERS, FULL, LENGTHS, overhead=0.0, measured=measured)
    for _ in range(40):
      choice = chooser.choose()
      draft, length = choice.draft, LENGTHS.index(choice.tokens)
      chooser.observe(agreeing(rates), choice, seconds(draft, length))
    chosen[measured] = draft, length
  assert chosen[True] == best
  assert promise[chosen[False]] < 0.95 * promise[best]


def test_a_little_better_is_not_worth_another_program():
  rates = np.array([0.6, 0.7, 0.9, 0.95])
  chooser = Chooser(LAYERS, FULL, LENGTHS, decay=0.0, measured=True)
  for _ in range(40):
    choice = chooser.choose()
    chooser.observe(agreeing(rates), choice, seconds(choice.draft, LENGTHS.index(choice.tokens)))
  took = choice._replace(look=False)
  for factor, stays in ((1.02, True), (2.0, False)):
    for _ in range(10):
      chooser.observe(agreeing(rates), took, factor * TRUE[took.draft, LENGTHS.index(took.tokens)])
    assert (chooser.choose()[:2] == took[:2]) is stays


def test_rounds_that_count_agreement_are_not_timed():
  chooser = Chooser(LAYERS, FULL, LENGTHS, measured=True)
  probes = {chooser.choose() for _ in range(24)}
  assert not any(choice.look for choice in probes)
  looks = []
  for _ in range(8):
    choice = chooser.choose()
    looks.append(choice.look)
    chooser.observe(
      agreeing((0.5,) * 4), choice, 1e9 if choice.look else seconds(choice.draft, LENGTHS.index(choice.tokens))
    )
  assert looks == [False, False, False, True] * 2
  assert chooser._costs.table.max() < 1e6

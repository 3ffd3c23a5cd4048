"""What a round of self-speculative decoding costs, and the choice that follows from it."""

import itertools

import numpy as np
import pytest

from adaptive.generation.drafts import Choice, Chooser, expected_tokens
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
  assert len(tried) == 5
  np.testing.assert_allclose(costs.table, TRUE, rtol=1e-6)


def test_slow_rounds_and_cold_programs_change_nothing_and_what_was_timed_counts_as_it_is():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  cold, factors = itertools.cycle([True, False]), itertools.cycle([2.0, 1.0, 9.0])
  while (pair := costs.probe()) is not None:
    factor = 0.1 if next(cold) else next(factors)  # what follows another program may even look quick
    costs.observe(*pair, factor * seconds(*pair) * (2.0 if pair == (2, 1) else 1.0))
  assert (2, 1) in costs.timed
  for pair in costs.timed:
    assert costs.table[pair] == (2.0 if pair == (2, 1) else 1.0) * TRUE[pair]


def test_a_time_counts_where_the_program_follows_itself():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  for pair, taken in (((0, 0), 1.0), ((1, 1), 2.0), ((0, 0), 3.0), ((0, 0), 4.0), ((1, 1), 5.0), ((1, 1), 6.0)):
    costs.observe(*pair, taken)
  assert costs.timed == {(0, 0), (1, 1)}
  assert (costs.table[0, 0], costs.table[1, 1]) == (4.0, 6.0)


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
  chosen = {measured: settled(measured, rates) for measured in (False, True)}
  assert chosen[True] == best
  assert promise[chosen[False]] < 0.95 * promise[best]


def settled(measured, rates, factors=None, slower=1.0):
  """The pair, as indices, that a chooser takes in the end.

  Args:
    factors: of pairs that take other seconds than their parts tell. slower: what all take after thirty rounds.
  """
  chooser = Chooser(LAYERS, FULL, LENGTHS, overhead=0.0, measured=measured)
  for number in range(200):
    choice = chooser.choose()
    pair = choice.draft, LENGTHS.index(choice.tokens)
    if choice.timed:
      chooser.time(choice, seconds(*pair) * (factors or {}).get(pair, 1.0) * (slower if number >= 30 else 1.0))
    chooser.observe(agreeing(rates), None)
  return pair


def test_a_little_better_is_not_worth_another_program():
  chooser = Chooser((1, 1), FULL, (1, 2), overhead=0.0, decay=0.0)
  chooser.observe(agreeing((0.5, 0.49)), None)
  assert chooser.choose()[:2] == (0, 2)
  chooser.observe(agreeing((0.49, 0.5)), None)
  assert chooser.choose()[:2] == (0, 2)
  chooser.observe(agreeing((0.49, 0.6)), None)
  assert chooser.choose()[:2] == (1, 2)


def test_rounds_that_are_timed_count_no_agreement_and_later_ones_do_now_and_then():
  chooser = Chooser(LAYERS, FULL, LENGTHS, measured=True)
  probes = []
  while (choice := chooser.choose()).timed:
    probes.append(choice)
    chooser.time(choice, seconds(choice.draft, LENGTHS.index(choice.tokens)))
  assert not any(choice.look for choice in probes)
  assert len(set(probes[:30])) == 5
  assert 5 <= len(set(probes)) <= 9, "and the few beside the best"
  assert not any(chooser.choose().timed for _ in range(8))


@pytest.mark.parametrize("quick", [{(0, 1): 0.6}, {(1, 0): 0.6}, {(0, 1): 0.9, (1, 1): 0.6}], ids=str)
def test_pairs_beside_the_best_are_timed_until_it_stays_the_best(quick):
  """A machine on which some pairs are quicker than their parts tell; the last is two steps from what seems best."""
  rates = np.array([0.8, 0.85, 0.9, 0.95])
  assert settled(True, rates) == (0, 0)
  assert settled(True, rates, quick) == list(quick)[-1]


@pytest.mark.parametrize("slower", [0.7, 1.5])
def test_a_pair_is_timed_beside_the_best_so_a_machine_that_slows_down_misleads_nobody(slower):
  rates = np.array([0.8, 0.85, 0.9, 0.95])
  assert settled(True, rates, slower=slower) == (0, 0)
  assert settled(True, rates, {(0, 1): 0.85}, slower) == (0, 1)


def test_rates_of_all_move_with_those_of_the_draft_that_was_taken():
  """What was looked at in hard text: once the text is easy for the draft that runs, it is easier for the others."""
  chooser = Chooser((1, 2), 4, decay=1.0)
  chooser.observe(agreeing((0.4, 0.6)), None)
  np.testing.assert_allclose(chooser.rates, (0.4, 0.6), atol=1e-3)
  for _ in range(1000):
    chooser.observe({"right": (8.0, 10.0)}, Choice(0, 10))
  moved = (0.8 / 0.2) / (0.4 / 0.6)
  odds = moved**0.5 * 0.6 / 0.4
  np.testing.assert_allclose(chooser.rates, (0.8, odds / (1 + odds)), atol=2e-3)


def test_hard_text_makes_no_draft_better_that_was_not_seen_there():
  """Two drafts alike, of which one runs: its bad rounds are no reason to go to and fro."""
  chooser = Chooser((1, 1), 12, (2,), overhead=0.0, decay=0.95)
  chooser.observe(agreeing((0.8, 0.8)), None)
  taken = []
  for _ in range(60):
    taken.append(chooser.choose())
    chooser.observe({"right": (5.0, 10.0)}, taken[-1])
  assert len({choice.draft for choice in taken}) == 1
  assert sum(choice.look for choice in taken) == 4, "after 4, 8, 16 and 32 rounds"


def test_what_was_easy_counts_for_the_draft_that_showed_it():
  chooser = Chooser((1, 2, 3), 4, decay=1.0)
  chooser.observe(agreeing((0.5, 0.5, 0.5)), None)
  for draft, rounds in ((0, 300), (1, 100)):  # whichever ran last
    for _ in range(rounds):
      chooser.observe({"right": (8.0, 10.0)}, Choice(draft, 10))
  rates = chooser.rates
  assert rates[0] > rates[1] > rates[2] > 0.5


def test_one_slow_round_of_a_new_pair_decides_nothing():
  """Its seconds are the median of what it took beside a pair that is known."""
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  for taken in (9.0, 2.0):
    costs.observe(0, 0, taken)
  costs.try_out([(1, 1)], beside=(0, 0))
  for speed, slow in ((1.0, 5.0), (2.0, 1.0), (0.5, 0.2)):
    for pair, taken in (((0, 0), 2.0), ((1, 1), 3.0)):
      costs.observe(*pair, 99.0)
      costs.observe(*pair, taken * speed * (slow if pair == (1, 1) else 1.0))
  assert costs.table[1, 1] == pytest.approx(3.0)


def test_a_new_program_has_time_to_warm_up():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  while (pair := costs.probe()) is not None:
    costs.observe(*pair, 1.0)
  costs.try_out([(1, 2)], beside=(0, 0))
  assert len(list(iter(costs.probe, None))) >= 30


def test_a_round_after_other_work_is_cold():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  costs.observe(0, 0, 9.0)
  costs.begin()
  costs.observe(0, 0, 9.0)
  assert not costs.timed
  costs.observe(0, 0, 1.0)
  assert costs.table[0, 0] == 1.0


@pytest.mark.parametrize("rounds", [1, 2])
def test_calls_of_a_round_or_two_choose_all_the_same(rounds):
  chooser = Chooser(LAYERS, FULL, (0, 1, 2, 4), measured=True)
  for _ in range(100):
    chooser.begin()
    for _ in range(rounds):
      choice = chooser.choose()
      if choice.timed:
        chooser.time(choice, 1.0)
      chooser.observe(agreeing((0.8, 0.85, 0.9, 0.95)), None)
  assert rounds == 2 or not choice.timed


def test_without_tokens_there_is_one_draft():
  chooser = Chooser(LAYERS, FULL, (0, 1), overhead=9.0, measured=True)
  pairs = set()
  for _ in range(300):
    choice = chooser.choose()
    pairs.add(choice[:2])
    if choice.timed:
      chooser.time(choice, 1.0 + 9.0 * choice.tokens)
    chooser.observe(agreeing([0.1] * 4), None)
  assert choice[:2] == (0, 0)
  assert {draft for draft, tokens in pairs if not tokens} <= {0, 2}, "the middle one once, to be timed"


def test_the_usual_choice_is_what_most_rounds_took():
  chooser = Chooser((1, 2), 4, (1, 2), overhead=0.0)
  assert chooser.usual is None
  chooser.observe({"agrees": (np.array([0.0, 99.0]), 99.0)}, None)
  taken = [chooser.choose()[:2] for _ in range(3)]
  chooser.observe({"agrees": (np.array([9999.0, 0.0]), 9999.0)}, None)
  taken += [chooser.choose()[:2] for _ in range(5)]
  assert len(set(taken)) == 2
  assert chooser.usual == (Choice(*taken[-1]), 5 / 8)


def looks(chooser, rounds):
  """The numbers of the rounds, from 1, that look."""
  return [i for i in range(1, rounds + 1) if chooser.choose().look]


def test_the_longer_a_choice_stays_the_less_often_agreement_is_counted():
  chooser = Chooser((1, 2), FULL, (1, 2), overhead=0.0, decay=0.0, looks=(2, 8))
  chooser.observe(agreeing((0.5, 0.1)), None)
  assert looks(chooser, 30) == [2, 6, 14, 22, 30]
  chooser.observe(agreeing((0.1, 0.99)), None)
  assert looks(chooser, 6) == [2, 6], "another choice is looked at soon"
  chooser.begin()
  chooser.observe(agreeing((0.5, 0.1)), None)
  assert looks(chooser, 6) == [2, 6], "and so are new prompts"

"""What a round of self-speculative decoding costs, and the choice that follows from it."""

import collections
import itertools

import numpy as np
import pytest

from adaptive.generation.drafts import Choice, Chooser, expected_tokens
from adaptive.generation.round_costs import RoundCosts

LAYERS, FULL, LENGTHS = (1, 2, 4, 6), 12, (1, 2, 4, 8)
RATES = np.array([0.8, 0.85, 0.9, 0.95])


def seconds(draft: int, length: int, drafted=1e-3, head=5e-4, passing=3e-4, checked=3e-4) -> float:
  """A machine on which a layer takes as long for a pass as for each token in it, and a head half a layer."""
  below, tokens = LAYERS[draft], LENGTHS[length]
  above = FULL - below
  return drafted * (tokens + 1) * below + head * tokens + passing * above + checked * above * (tokens + 1)


TRUE = np.array([[seconds(e, d) for d in range(len(LENGTHS))] for e in range(len(LAYERS))])
PROMISE = expected_tokens(RATES[:, None], np.array(LENGTHS)[None]) / TRUE


def timed(costs, seconds=seconds):
  """Times what is to be timed first; the pairs, as they came."""
  pairs = []
  while (pair := costs.probe()) is not None:
    costs.observe(*pair, seconds(*pair))
    pairs.append(pair)
  return pairs


def test_layers_are_counted_until_rounds_were_timed():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=0.0)
  np.testing.assert_array_equal(costs.table, [[d * e + FULL for d in LENGTHS] for e in LAYERS])
  np.testing.assert_array_equal(costs.doubt, np.zeros_like(costs.table))
  assert RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0).table[1, 2] == 4 * (2 + 1) + FULL


def test_a_few_pairs_tell_what_all_cost():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  pairs = timed(costs)
  assert len(set(pairs)) == 5 == len(set(pairs[:5])), "in turns"
  np.testing.assert_allclose(costs.table, TRUE, rtol=1e-6)


def test_cold_programs_and_slow_rounds_change_nothing_and_what_was_timed_counts_as_it_is():
  costs, ran = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0), collections.Counter()

  def of_this_machine(*pair):
    ran[pair] += 1
    factor = 9.0 if ran[pair] <= 4 or ran[pair] == 6 else 1.0
    return factor * seconds(*pair) * (2.0 if pair == (2, 1) else 1.0)

  pairs = timed(costs, of_this_machine)
  assert (2, 1) in pairs
  for pair in set(pairs):
    assert costs.table[pair] == pytest.approx((2.0 if pair == (2, 1) else 1.0) * TRUE[pair])


def test_pairs_are_asked_for_until_they_were_seen():
  """What is read a round late, or not at all, is asked for again; then nothing is."""
  costs, late = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0), []
  for number in itertools.count():
    late.append(costs.probe())
    if late[-1] is None:
      break
    if len(late) > 1 and number % 3:
      costs.observe(*late[-2], 1.0)
  assert 5 * 8 * 1.4 < number < 5 * 8 * 1.7
  assert np.all((costs.doubt > 0) & (costs.doubt < 0.2))
  np.testing.assert_allclose([costs.table[pair] for pair in late[:-1]], 1.0)


@pytest.mark.parametrize("layers", [(3,), (1, 5)])
@pytest.mark.parametrize("lengths", [(4,), (2, 6)])
def test_few_drafts_or_lengths_are_enough(layers, lengths):
  costs = RoundCosts(layers, FULL, lengths, overhead=1.0)
  taken = 1e-3 * (np.array(lengths)[None] * np.array(layers)[:, None] + FULL)
  timed(costs, lambda *pair: taken[pair])
  np.testing.assert_allclose(costs.table, taken, rtol=1e-6)


def test_a_pair_s_own_rounds_tell_more_than_its_parts():
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  timed(costs)
  before = costs.doubt[3, 0]
  for _ in range(50):
    costs.observe(3, 0, 1.3 * seconds(3, 0))
    costs.observe(0, 0, seconds(0, 0))
  assert costs.table[3, 0] / costs.table[0, 0] == pytest.approx(1.3 * TRUE[3, 0] / TRUE[0, 0], rel=0.02)
  assert costs.table[1, 3] == pytest.approx(TRUE[1, 3], rel=0.05), "nobody ran it"
  assert costs.doubt[3, 0] < before / 2
  assert costs.doubt[1, 3] > 0.1


def test_the_filter_is_the_posterior_of_its_model():
  """All rounds at once, by a Gaussian's conditional, are what they are one after the other."""
  costs = RoundCosts((1, 5), FULL, (2, 6), overhead=1.0)
  timed(costs, lambda draft, length: 1e-3 * ((2, 6)[length] * (1, 5)[draft] + FULL))
  prior, pairs = costs.table.ravel(), [(0, 1), (1, 0), (0, 1), (0, 0), (1, 0), (0, 1)] * 5
  spread = costs.doubt.ravel() ** 2
  for pair in (0, 0), (0, 1), (1, 0), (1, 1):
    for _ in range(4 - costs._ran[pair]):  # cold
      costs.observe(*pair, 1.0)
  factors = np.exp(np.random.default_rng(0).normal(0, 0.05, len(pairs)))
  for pair, factor in zip(pairs, factors):
    costs.observe(*pair, factor * prior[2 * pair[0] + pair[1]])
  which = np.array([2 * e + d for e, d in pairs])
  rounds = np.arange(1, len(pairs) + 1)
  before = len(costs._first) * 4 / 3  # rounds in which the machine may have changed while the first were timed
  drift = 0.03**2 * (before + np.minimum(rounds[:, None], rounds[None]))  # of a random walk
  seen = drift + np.where(which[:, None] == which[None], spread[which], 0.0) + 0.1**2 * np.eye(len(pairs))
  cross = (np.arange(4)[:, None] == which[None]) * spread[:, None]
  mean = cross @ np.linalg.solve(seen, np.log(factors))
  np.testing.assert_allclose(np.log(costs.table.ravel() / prior), mean, atol=1e-9)
  variance = spread - np.sum(cross * np.linalg.solve(seen, cross.T).T, axis=1)
  np.testing.assert_allclose(costs.doubt.ravel() ** 2, variance, atol=1e-9)


def test_new_programs_are_cold_and_soon_make_up_for_what_was_learned_of_others():
  """Other rows: all take three times as long, and one pair six times."""
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  timed(costs)
  other = lambda pair: (6.0 if pair == (0, 1) else 3.0) * TRUE[pair]
  for _ in range(500):
    for pair in (0, 0), (0, 1):
      costs.observe(*pair, TRUE[pair])
  costs.renew()
  before = costs.table
  assert np.all(costs.doubt > 0.1)
  for number in range(54):
    for pair in (0, 0), (0, 1):
      costs.observe(*pair, 99.0 if number < 4 else other(pair))
    assert (number < 4) is np.array_equal(costs.table, before)
  assert costs.table[0, 1] / costs.table[0, 0] == pytest.approx(2.0 * TRUE[0, 1] / TRUE[0, 0], rel=0.05)


@pytest.mark.parametrize("nothing", [0.0, -1.0, np.nan, np.inf])
def test_a_clock_that_stood_still_tells_nothing(nothing):
  costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
  for _ in range(2):
    before = costs.table
    for _ in range(9):
      costs.observe(0, 0, nothing)
    np.testing.assert_array_equal(costs.table, before)
    timed(costs)


def test_a_round_that_took_very_long_counts_as_one_that_took_long():
  def after(factor):
    costs = RoundCosts(LAYERS, FULL, LENGTHS, overhead=1.0)
    timed(costs)
    for _ in range(10):
      costs.observe(0, 0, seconds(0, 0))
    costs.observe(0, 0, factor * seconds(0, 0))
    return costs.table[0, 0]

  assert TRUE[0, 0] < after(2.0) == after(1e6) < 1.05 * TRUE[0, 0]


def agreeing(rates):
  return {"agrees": (1e3 * np.asarray(rates), 1e3)}


def test_the_choice_is_the_best_by_seconds_not_by_layers():
  assert PROMISE[settled(True, RATES)] > 0.97 * PROMISE.max()
  assert PROMISE[settled(False, RATES)] < 0.95 * PROMISE.max()


def settled(measured, rates, factors=None, slower=1.0, noise=0.0, seed=0):
  """The pair, as indices, that a chooser takes most often in the last hundred rounds.

  Args:
    factors: of pairs that take other seconds than their parts tell. slower: what all take after sixty rounds.
    noise: of a round's seconds, and its seed.
  """
  chooser, rng = Chooser(LAYERS, FULL, LENGTHS, overhead=0.0, measured=measured), np.random.default_rng(seed)
  pairs = []
  for number in range(400):
    choice = chooser.choose()
    pair = choice.draft, LENGTHS.index(choice.tokens)
    pairs.append(pair)
    speed = (slower if number >= 60 else 1.0) * np.exp(rng.normal(0, noise))
    right = {"right": (rates[choice.draft] * choice.tokens, choice.tokens)}
    chooser.observe(agreeing(rates) | right, choice, seconds(*pair) * (factors or {}).get(pair, 1.0) * speed)
  return collections.Counter(pairs[-100:]).most_common(1)[0][0]


def test_a_little_better_is_not_worth_another_program():
  chooser = Chooser((1, 1), FULL, (1, 2), overhead=0.0, decay=0.0)
  chooser.observe(agreeing((0.5, 0.49)), None)
  assert chooser.choose()[:2] == (0, 2)
  chooser.observe(agreeing((0.49, 0.5)), None)
  assert chooser.choose()[:2] == (0, 2)
  chooser.observe(agreeing((0.49, 0.6)), None)
  assert chooser.choose()[:2] == (1, 2)


def test_the_first_rounds_are_timed_and_count_no_agreement_and_later_ones_do_now_and_then():
  chooser = Chooser(LAYERS, FULL, LENGTHS, measured=True)
  choices, trials = [], []
  for _ in range(300):
    choice = chooser.choose()
    choices.append(choice)
    trials.append(chooser.trials)
    right = {"right": (choice.tokens, choice.tokens)}
    chooser.observe(agreeing(RATES) | right, choice, seconds(choice.draft, LENGTHS.index(choice.tokens)))
  assert trials[:40] == list(range(1, 41))
  assert trials[-1] == 40
  assert not any(choice.look for choice in choices[:40])
  looking = [i for i, choice in enumerate(choices[40:], 1) if choice.look]
  assert looking[:2] == [4, 12]
  assert len(looking) < 10, "and often again only where the choice has changed"


def test_rounds_that_look_or_whose_seconds_nobody_knows_tell_no_costs():
  chooser = Chooser(LAYERS, FULL, LENGTHS, measured=True)
  found = agreeing(RATES) | {"right": (0.0, 0.0)}
  for _ in range(200):
    choice = chooser.choose()
    chooser.observe(found, choice, None)
    chooser.observe(found, choice._replace(look=True), 1.0)
  assert chooser.trials == 200


@pytest.mark.parametrize("slower", [0.7, 1.0, 1.5])
def test_a_pair_that_may_be_better_is_tried(slower):
  """By its parts another pair seems 2 % worse, and is 15 % better; the machine slows down, for all."""
  assert PROMISE[0, 1] < 0.98 * PROMISE.max()
  assert settled(True, RATES, {(0, 1): 0.85}, slower) == (0, 1)


def test_the_second_best_is_run_beside_the_best_if_it_is_nearly_as_good():
  """Every other round at first, then every sixteenth; not what nobody ever took, nor what is much worse."""
  chooser = Chooser(LAYERS, FULL, LENGTHS, measured=True)
  table = np.full_like(TRUE, 0.1)
  table[0, 1], table[0, 0], table[1, 0] = 1.0, 0.96, 0.9
  chooser._gain = lambda: table
  while (pair := chooser._costs.probe()) is not None:
    chooser._costs.observe(*pair, 1.0)
  chooser._compiled.update([(0, 1), (1, 0)])
  take = lambda rounds: [(c.draft, LENGTHS.index(c.tokens)) for c in (chooser.choose() for _ in range(rounds))]
  assert set(take(100)) == {(0, 1)}
  chooser._compiled.update([(0, 0)])
  chooser._start_looking()
  taken = take(48)
  assert [i for i, pair in enumerate(taken, 1) if pair == (0, 0)] == [2, 4, 6, 8, 10, 12, 14, 16, 32, 48]
  assert set(taken) == {(0, 0), (0, 1)}
  chooser.renew()
  assert set(take(48)) == {(0, 1)}, "there is no program of the other at hand"


@pytest.mark.parametrize("slower", [0.7, 1.0, 1.5])
def test_noise_misleads_by_little(slower):
  taken = [settled(True, RATES, slower=slower, noise=0.1, seed=seed) for seed in range(8)]
  assert np.mean([PROMISE[pair] for pair in taken]) > 0.96 * PROMISE.max()


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


@pytest.mark.parametrize("rounds", [1, 2])
def test_calls_of_a_round_or_two_choose_all_the_same(rounds):
  chooser = Chooser(LAYERS, FULL, (0, 1, 2, 4), measured=True)
  for _ in range(100):
    chooser.begin()
    for _ in range(rounds):
      choice = chooser.choose()
      chooser.observe(agreeing((0.8, 0.85, 0.9, 0.95)) | {"right": (0.0, 0.0)}, choice, 1.0)
  assert chooser.trials == 40


def test_without_tokens_there_is_one_draft():
  chooser = Chooser(LAYERS, FULL, (0, 1), overhead=9.0, measured=True)
  pairs = []
  for _ in range(300):
    choice = chooser.choose()
    pairs.append(choice[:2])
    right = {"right": (0.1 * choice.tokens, choice.tokens)}
    chooser.observe(agreeing([0.1] * 4) | right, choice, 1.0 + 9.0 * choice.tokens)
  assert choice[:2] == (0, 0)
  assert {draft for draft, tokens in pairs if not tokens} <= {0, 2}, "the middle one to be timed"
  assert {draft for draft, tokens in pairs[40:] if not tokens} == {0}


def test_the_usual_choice_is_what_most_rounds_took():
  chooser = Chooser((1, 2), 4, (1, 2), overhead=0.0)
  assert chooser.usual is None
  chooser.observe({"agrees": (np.array([0.0, 99.0]), 99.0)}, None)
  taken = [chooser.choose()[:2] for _ in range(3)]
  chooser.observe({"agrees": (np.array([9999.0, 0.0]), 9999.0)}, None)
  taken += [chooser.choose()[:2] for _ in range(5)]
  assert len(set(taken)) == 2
  assert chooser.usual == (Choice(*taken[-1]), 5, 8)


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

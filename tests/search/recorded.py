"""Searches with a witness of what they ask for, and rewards without any structure."""

import numpy as np

from adaptive.search.memory import run


def without_structure(visits):
  """A reward in quarters that is random, but always the same for a plan."""
  return int(np.random.default_rng([*visits]).integers(5)) / 4


def watched(search, reward):
  """What a search found, and its requests in order."""
  asked = []

  def evaluate(wanted):
    asked.append(list(wanted))
    return [reward(visits) for visits in wanted]

  return run(search, evaluate), asked

"""What an answer is worth: rewards in 0 .. 1 from the scores of a question's options."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from adaptive.config import require
from adaptive.data.questions import Question
from adaptive.search.scorer import Options

Kind = Literal["choice", "choice_per_character", "exact", "likelihood"]
Reward = Callable[[Question, Options], float]


def choice(question: Question, scores: Options) -> float:
  """1 when the right option is the likeliest, as a whole text."""
  return float(np.argmax(scores.log_probs) == question.answer)


def choice_per_character(question: Question, scores: Options) -> float:
  """1 when the right option is the likeliest by its mean over characters, which does not prefer short ones."""
  lengths = np.array([max(len(option.strip()), 1) for option in question.options])
  return float(np.argmax(scores.log_probs / lengths) == question.answer)


def exact(question: Question, scores: Options) -> float:
  """1 when greedy generation writes the answer: each of its tokens is the likeliest after those before it."""
  return float(scores.greedy[_right(question)])


def likelihood(question: Question, scores: Options) -> float:
  """Mean probability of the reference answer's tokens (geometric), of which a search keeps at least the model's own."""
  right = _right(question)
  return float(np.exp(scores.log_probs[right] / scores.tokens[right]))


def _right(question: Question) -> int:
  """Index of the answer among what was scored."""
  return question.answer if question.options else 0


REWARDS: dict[str, Reward] = {
  "choice": choice,
  "choice_per_character": choice_per_character,
  "exact": exact,
  "likelihood": likelihood,
}


def find(kind: str, questions: list[Question]) -> Reward:
  """The reward of that name; ConfigError where a question has no options to choose from."""
  require(kind in REWARDS, f"unknown reward {kind!r}; the rewards are {', '.join(REWARDS)}")
  without = [question.id for question in questions if not question.options]
  require(
    not kind.startswith("choice") or not without,
    f"reward {kind!r} needs options, which question {without[0] if without else ''!r} lacks",
  )
  return REWARDS[kind]


def goal(kind: str, default: float) -> float:
  """The reward at which a question counts as answered: a right answer, or what the model itself gives a reference."""
  return default if kind == "likelihood" else 1.0

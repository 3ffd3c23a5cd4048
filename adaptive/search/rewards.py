"""What an answer is worth: rewards in 0 .. 1 from the scores of a question's options."""

from collections.abc import Callable

import numpy as np

from adaptive.config import require
from adaptive.data.questions import Question
from adaptive.search.scorer import Options

Reward = Callable[[Question, Options], float]


def choice(question: Question, scores: Options) -> float:
  """1 when the right option is the likeliest, as a whole text."""
  return _right_option(question, scores.log_probs)


def choice_per_character(question: Question, scores: Options) -> float:
  """1 when the right option is the likeliest by its mean over characters, which does not prefer short ones."""
  return _right_option(question, _per_character(question, scores))


def margin(question: Question, scores: Options) -> float:
  """At least 0.5 when the question is answered, and more the surer the model is of the answer.

  Half of the right option's probability among the options, and another half when it is the likeliest; without options,
  half of `likelihood` and half of `exact`. Plans that only happen to keep a narrow decision right are told from those
  that leave it as sure as it was.
  """
  if not question.options:
    return 0.5 * likelihood(question, scores) + 0.5 * exact(question, scores)
  return _margin(question, scores.log_probs)


def margin_per_character(question: Question, scores: Options) -> float:
  """`margin`, by the means over characters."""
  return _margin(question, _per_character(question, scores))


def _right_option(question: Question, log_probs: np.ndarray) -> float:
  """Where none has a probability, none is right."""
  return float(np.isfinite(log_probs.max()) and np.argmax(log_probs) == question.answer)


def _margin(question: Question, log_probs: np.ndarray) -> float:
  if not np.isfinite(log_probs.max()):
    return 0.0
  shares = np.exp(log_probs - log_probs.max())
  return float(0.5 * shares[question.answer] / shares.sum() + 0.5 * (np.argmax(log_probs) == question.answer))


def _per_character(question: Question, scores: Options) -> np.ndarray:
  return scores.log_probs / np.array([max(len(option.strip()), 1) for option in question.options])


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
  "margin": margin,
  "margin_per_character": margin_per_character,
  "exact": exact,
  "likelihood": likelihood,
}

_OF_OPTIONS = ("choice", "choice_per_character", "margin_per_character")


def find(kind: str, questions: list[Question]) -> Reward:
  """The reward of that name; ConfigError where it chooses, and a question has no options to choose from."""
  require(kind in REWARDS, f"unknown reward {kind!r}; the rewards are {', '.join(REWARDS)}")
  without = [question.id for question in questions if not question.options]
  require(
    kind not in _OF_OPTIONS or not without,
    f"reward {kind!r} needs options, which question {without[0] if without else ''!r} lacks",
  )
  return REWARDS[kind]


def goal(kind: str) -> float:
  """The reward at which a question counts as answered; what the model gives a reference is always good enough."""
  return {"likelihood": 0.0, "margin": 0.5, "margin_per_character": 0.5}.get(kind, 1.0)

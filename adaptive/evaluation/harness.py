"""Any sub-model as a model of lm-evaluation-harness, in process and without torch.

The harness asks for three things: log-likelihoods of continuations, of whole texts, and continuations. The first two
are one forward pass (`adaptive.evaluation.likelihood`), the third is what `generate.py` does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from adaptive.config import require
from adaptive.data.pieces import Piece, continuation
from adaptive.data.tokenizers import Tokenizer
from adaptive.evaluation.likelihood import Scorer
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.generation.text import RowText

_NEW_TOKENS = 256  # of a continuation, unless the task says otherwise
_SIZES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class AdaptiveLM(LM):
  """One sub-model.

  Args:
    tokenizer: of the model. prefix: tokens that stand before every text, and are not scored; the tokenizer's `bos`
      stands for them where there is no context at all.
    scorer: of the sub-model. generator: (sampling, most tokens of a row) -> what continues prompts with it.
    max_len: tokens of the longest row. rows: texts at a time.
    chat: messages -> text, where the model has a chat template. name: of model and sub-model, for the harness's caches.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    prefix: Sequence[int],
    scorer: Scorer,
    generator: Callable[[Sampling, int], Generator],
    max_len: int,
    rows: int,
    chat: Callable[[Sequence[Mapping[str, str]], bool], str] | None = None,
    name: str = "adaptive",
  ):
    super().__init__()
    self._tokenizer, self._prefix, self._scorer, self._generator = tokenizer, tuple(prefix), scorer, generator
    self._max_len, self._rows, self._chat, self._name = max_len, rows, chat, name

  def _encode(self, text: str) -> list[int]:
    """Special tokens that a chat template wrote are tokens; in any other text they are text."""
    encode = self._tokenizer.encode if self._chat is None else self._tokenizer.encode_marked
    return encode(text).tolist()

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    pieces = []
    for context, text in (request.args for request in requests):
      prefix = self._prefix or (() if context else (self._tokenizer.bos,))
      pieces.append(continuation(self._encode, prefix, context, text, self._max_len))
    return [tuple(score) for score in self._scorer(pieces, show=not disable_tqdm)]

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Every token once, in windows that do not overlap; the first of a text after `bos`."""
    pieces, owners = [], []
    for owner, (text,) in enumerate(request.args for request in requests):
      windows = get_rolling_token_windows(self._encode(text), self._tokenizer.bos, self._max_len, context_len=1)
      for given, scored in map(make_disjoint_window, windows):
        pieces.append(Piece([*given, *scored], len(given)))
        owners.append(owner)
    totals = [0.0] * len(requests)
    for owner, score in zip(owners, self._scorer(pieces, show=not disable_tqdm, prompts=False)):
      totals[owner] += score.log_prob
    return totals

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    found: list[str] = [""] * len(requests)
    for settings, numbers in _alike(requests):
      until, most, sampling = _settings(settings)
      generator = self._generator(sampling, self._max_len)
      for start in range(0, len(numbers), self._rows):
        chosen = numbers[start : start + self._rows]
        room = self._max_len - most
        require(room > 0, f"a task asks for {most} tokens, rows hold {self._max_len}: set --max_len")
        prompts = [[*self._prefix, *self._encode(requests[i].args[0])][-room:] for i in chosen]
        prompts = [prompt or [self._tokenizer.bos] for prompt in prompts]
        for i, text in zip(chosen, _continued(generator, prompts, most, self._tokenizer, until)):
          found[i] = text
    return found

  def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    require(self._chat is not None, "this model has no chat template: leave out --chat")
    return self._chat(chat_history, add_generation_prompt)

  @property
  def tokenizer_name(self) -> str:
    return self._name


def _alike(requests: Sequence[Any]) -> Iterable[tuple[Mapping[str, Any], list[int]]]:
  """Numbers of the requests that share their settings, the longest prompts first."""
  groups: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
  for i, request in enumerate(requests):
    groups.setdefault(repr(request.args[1]), (request.args[1], []))[1].append(i)
  for settings, numbers in groups.values():
    yield settings, sorted(numbers, key=lambda i: -len(requests[i].args[0]))


def _settings(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
  """Stop texts, most new tokens, and sampling, from the names that tasks have for them."""
  until = settings.get("until") or ()
  until = (until,) if isinstance(until, str) else tuple(until)
  most = next((int(settings[name]) for name in _SIZES if settings.get(name) is not None), _NEW_TOKENS)
  sampled = settings.get("do_sample", bool(settings.get("temperature")))
  temperature = float(settings.get("temperature") or 1.0) if sampled else 0.0
  return until, most, Sampling(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))


def _continued(
  generator: Generator, prompts: Sequence[Sequence[int]], most: int, tokenizer: Tokenizer, until: Sequence[str]
) -> list[str]:
  """Texts that follow, without the first of the stop texts and what comes after it."""
  streams = [RowText(tokenizer, prompt, "") for prompt in prompts]
  texts = [""] * len(prompts)

  def watch(row: int, token: int) -> bool:
    texts[row] += streams[row].feed(token)
    return any(stop in texts[row] for stop in until)

  generator(prompts, most, watch=watch)
  texts = [text + stream.end() for text, stream in zip(texts, streams)]
  return [min((text.split(stop)[0] for stop in until if stop), key=len, default=text) for text in texts]

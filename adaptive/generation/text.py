"""A row's text as its tokens come, up to where a stop text begins."""

from collections.abc import Sequence

from adaptive.data.tokenizers import Tokenizer


class RowText:
  """Turns the tokens after a prompt into text, a piece at a time.

  Args:
    tokenizer: of the run. prompt: the tokens before.
    stop: the text ends where this begins; empty: it does not.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: str = ""):
    self._stream, self._stop, self._held = tokenizer.stream(prompt), stop, ""
    self.stopped = False

  def feed(self, token: int) -> str:
    """The text that is certain now, which may be none: half a character waits, and so does the beginning of `stop`."""
    return self._pass(self._stream.feed(token))

  def end(self) -> str:
    """What was still waiting."""
    text = self._pass(self._stream.end()) + self._held
    self._held = ""
    return text

  def _pass(self, text: str) -> str:
    if self.stopped or not self._stop:
      return "" if self.stopped else text
    self._held += text
    found = self._held.find(self._stop)
    self.stopped = found >= 0
    # Without the stop text, its longest beginning at the end of what there is may still become it.
    begun = max(n for n in range(len(self._stop)) if self._held.endswith(self._stop[:n]))
    certain = found if self.stopped else len(self._held) - begun
    text, self._held = self._held[:certain], "" if self.stopped else self._held[certain:]
    return text

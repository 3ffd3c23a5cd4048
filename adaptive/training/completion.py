"""What `generate.py` does: continue prompts with a sub-model of a run."""

import dataclasses
import functools
import io
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from adaptive.config import ConfigError, require
from adaptive.data.tokenizers import Tokenizer, check_vocab, make_tokenizer, prefix_of
from adaptive.depth.exits import check_end
from adaptive.generation import depthwise
from adaptive.generation.drafts import Chooser, Fixed
from adaptive.generation.loop import Generator, Result, check
from adaptive.generation.sampling import Sampling
from adaptive.generation.speculative import SpeculativeGenerator
from adaptive.generation.text import RowText
from adaptive.pretrained import chat
from adaptive.pretrained.published import Published, is_published
from adaptive.training.run import find_submodel, load_params, load_plan


@dataclasses.dataclass(frozen=True)
class Request:
  """What to generate.

  Attributes:
    prompts: each begins a document; an empty one asks for a document from its start.
    chat: whether prompts are messages, which the template of a published model makes a conversation of; None: where it
      has one.
    sampling, seed, max_new_tokens: as in `adaptive.generation`.
    submodel: its name; None is the full model. step: of the checkpoint; None is the newest.
    max_len: limit on the tokens of a prompt and its continuation; None is the length of rows that the run trained on.
    stop: a continuation ends before this text, or with its document; empty: only with its document.
    slots: prompts under way at a time, each token of them at its own depth; 0 takes all prompts step by step.
    draft: name of the sub-model that drafts for the full one; `auto`: the best of all that can; None: none.
    draft_tokens: that it drafts in a round; `auto` chooses that too.
    changes: settings that are not trained, as `field=value` texts.
  """

  prompts: tuple[str, ...]
  sampling: Sampling
  chat: bool | None = None
  submodel: str | None = None
  step: int | None = None
  max_new_tokens: int = 100
  max_len: int | None = None
  seed: int = 0
  stop: str = ""
  slots: int = 0
  draft: str | None = None
  draft_tokens: int = 6
  changes: tuple[str, ...] = ()


def complete(workdir: str, request: Request) -> None:
  """Prints every prompt with its continuation, that of a single prompt as it comes, and on stderr how fast that was.

  Raises:
    ConfigError: anything that cannot work; all but a missing checkpoint, and slots for a method without them, is found
      before parameters are read.
  """
  require(jax.process_count() == 1, "generate.py runs in one process")
  require(request.slots >= 0, f"slots={request.slots} must be at least 1, or 0 for none")
  drafts = request.draft is not None
  require(not (drafts and request.slots), "--draft and --slots are two ways to generate: choose one")
  require(not (drafts and request.submodel), "--draft drafts for the full model: leave out --submodel")
  plan = load_plan(workdir, request.changes)
  submodels = plan.method.submodels(plan.model)
  submodel = submodels[-1] if request.submodel is None else find_submodel(plan, request.submodel)
  draft = find_submodel(plan, request.draft) if drafts and request.draft != "auto" else None
  require(draft is None or draft != submodel, f"--draft={request.draft} is the full model itself")
  data = plan.experiment.data
  tokenizer = make_tokenizer(data)
  check_vocab(tokenizer, plan.experiment.model.vocab_size)
  check_end(plan.model, tokenizer.eos)
  published = Published(pathlib.Path(workdir)) if is_published(workdir) else None
  request, prompts = _prompts(tokenizer, request, published, prefix_of(tokenizer, plan.experiment.data))
  stop_tokens = (tokenizer.eos,) if published is None else tuple({tokenizer.eos, *published.stop_tokens})
  max_len = data.seq_len if request.max_len is None else request.max_len
  check(prompts, request.max_new_tokens, request.seed, tokenizer.vocab_size, max_len)
  _, params = load_params(plan, workdir, request.step)
  texts = [RowText(tokenizer, prompt, request.stop) for prompt in prompts]
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, a terminal may know less
  sampled = dict(vocab_size=tokenizer.vocab_size, sampling=request.sampling, stop_tokens=stop_tokens)
  if request.slots:
    ticker = plan.method.ticker(plan.model, params, submodel)
    require(ticker is not None, "this run's method has no depth-wise batching: leave out --slots")
    del params  # the ticker has its own, and so has a decoder
    slots = min(request.slots, len(prompts))
    generator = depthwise.DepthwiseGenerator(ticker, slots=slots, **sampled)
    summary = _through_slots(generator, request, prompts, texts)
  else:
    sampled |= dict(max_len=max_len, mesh=plan.mesh)
    if drafts:
      ladder = plan.method.ladder(plan.model, params, None if draft is None else [draft])
      require(ladder is not None, "no sub-model of this run can draft for the full one: leave out --draft")
      *layers, full = ladder.layers
      greedy = request.sampling.temperature == 0  # else what a seed samples would depend on the machine's mood
      choice = Chooser(layers, full, measured=greedy) if draft is None else Fixed(0, request.draft_tokens)
      generator = SpeculativeGenerator(ladder, choice=choice, **sampled)
    else:
      generator = Generator(plan.method.decoder(plan.model, params, submodel), **sampled)
    del params
    summary = _summary((_stream if len(prompts) == 1 else _print_all)(generator, request, prompts, texts))
    if request.draft == "auto":
      summary += _chosen(choice, layers)
  print(summary, file=sys.stderr)


def _chosen(choice: Chooser, layers: Sequence[int]) -> str:
  """What rounds were spent on, given the layers that each draft runs."""
  said = f"; {choice.trials} rounds to time the drafts" if choice.trials else ""
  if choice.usual is not None:
    taken, number, rounds = choice.usual
    some = lambda number, what: f"{number} {what}{'s' if number != 1 else ''}"
    drafted = f"{some(taken.tokens, 'token')} drafted by {some(layers[taken.draft], 'layer')}"
    of = f"{some(rounds, 'other round' if choice.trials else 'round')}"
    said += f"; {number} of {of}: {drafted if taken.tokens else 'no draft'}"
  return said


def _prompts(
  tokenizer: Tokenizer, request: Request, published: Published | None, prefix: Sequence[int]
) -> tuple[Request, list[list[int]]]:
  """The ids that each prompt begins a row with, and the request with what of the prompts is to be shown."""
  template = published and published.chat_template
  require(not request.chat or template is not None, "--chat: this model has no chat template")
  try:
    if template is None or request.chat is False:
      prompts = [[*prefix, *tokenizer.encode(prompt).tolist()] for prompt in request.prompts]
      empty = [i for i, prompt in enumerate(prompts) if not prompt]
      return request, [[tokenizer.bos] if i in empty else prompt for i, prompt in enumerate(prompts)]
    render = functools.partial(chat.render, template, special=tokenizer.special)
    messages = ([{"role": "user", "content": prompt}] for prompt in request.prompts)
    prompts = [tokenizer.encode_marked(render(message)).tolist() for message in messages]
    return dataclasses.replace(request, prompts=("",) * len(prompts)), prompts
  except UnicodeEncodeError as error:  # how Python keeps arguments that are not UTF-8
    raise ConfigError(f"the prompt {error.object!r} is not UTF-8") from error


def _stream(generator: Generator, request: Request, prompts: Sequence[Sequence[int]], texts: list[RowText]) -> Result:
  """Prints the only prompt, and what follows as it comes."""
  show = lambda text, end="": print(text, end=end, flush=True)

  def watch(row: int, token: int) -> bool:
    show(texts[row].feed(token))
    return texts[row].stopped

  show(request.prompts[0])
  try:
    result = generator(prompts, request.max_new_tokens, request.seed, watch=watch)
  except KeyboardInterrupt:
    show("", end="\n")
    raise
  show(texts[0].end(), end="\n")
  return result


def _print_all(
  generator: Generator, request: Request, prompts: Sequence[Sequence[int]], texts: list[RowText]
) -> Result:
  """Prints every prompt with its continuation when all are done, each below a line with its number."""
  pieces = [[prompt] for prompt in request.prompts]

  def watch(row: int, token: int) -> bool:
    pieces[row].append(texts[row].feed(token))
    return texts[row].stopped

  result = generator(prompts, request.max_new_tokens, request.seed, watch=watch)
  for number, (found, text) in enumerate(zip(pieces, texts), 1):
    print(f"--- {number}\n{''.join(found)}{text.end()}")
  return result


def _through_slots(
  generator: depthwise.DepthwiseGenerator, request: Request, prompts: Sequence[Sequence[int]], texts: list[RowText]
) -> str:
  """Prints as `_print_all` does; a stop text ends what is shown, and not the work."""
  result = generator(prompts, request.max_new_tokens, request.seed)
  for number, (prompt, tokens, text) in enumerate(zip(request.prompts, result.tokens, texts), 1):
    print(f"--- {number}\n{prompt}{''.join(map(text.feed, tokens))}{text.end()}")
  return (
    f"{sum(map(len, result.tokens))} tokens of {len(prompts)} prompts, {result.tokens_per_second:.1f} tokens/s with "
    f"prompts; {result.ticks} ticks with {result.occupancy:.0%} of the slots at work"
  )


def _summary(result: Result) -> str:
  rows, number = len(result.tokens), sum(map(len, result.tokens))
  speed = f"{result.tokens_per_second:.1f} tokens/s after the first" if result.tokens_per_second else "no second token"
  mean = lambda total, count: np.mean(total / np.maximum(count, 1))
  # Those of single layers, as ran/3, are too many for a line.
  means = [f"{name} {mean(*pair):.4g}" for name, pair in result.metrics.items() if "/" not in name]
  what = "prompt" if rows == 1 else f"{rows} prompts"
  return ", ".join([f"{number} tokens: {what} in {1000 * result.prefill_seconds:.1f} ms", speed, *means])

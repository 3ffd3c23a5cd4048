"""What `harness.py` does: tasks of lm-evaluation-harness on a sub-model of a run or of a published model."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from adaptive.config import ConfigError, require
from adaptive.data.tokenizers import check_vocab, make_tokenizer, prefix_of
from adaptive.depth.exits import check_end
from adaptive.evaluation.likelihood import Scorer
from adaptive.generation.loop import Generator
from adaptive.generation.sampling import Sampling
from adaptive.pretrained import chat
from adaptive.pretrained.published import Published, is_published
from adaptive.training.run import find_submodel, load_params, load_plan


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate.

  Attributes:
    tasks: their names. include: folder with task files of one's own.
    submodel: its name. limit: documents of each task; None: all. num_fewshot: examples; None: the task's own number.
    chat: whether prompts are written by the model's chat template.
    rows: texts at a time. max_len: tokens of a row; None: the run's.
    step: of the checkpoint; None is the newest. changes: settings that are not trained. output: JSON file; empty: none.
  """

  tasks: tuple[str, ...]
  include: str = ""
  submodel: str = "full"
  limit: int | None = None
  num_fewshot: int | None = None
  chat: bool = False
  rows: int = 8
  max_len: int | None = None
  step: int | None = None
  changes: tuple[str, ...] = ()
  output: str = ""


def evaluate(workdir: str, request: Request) -> None:
  """Prints the harness's table below a line that says which model and mode ran.

  Raises:
    ConfigError: anything that cannot work, most of it before parameters are read.
  """
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from adaptive.evaluation.harness import AdaptiveLM
  except ImportError as error:
    raise ConfigError(f"tasks need lm-evaluation-harness: pip install -e '.[harness]' ({error})") from error
  require(jax.process_count() == 1, "harness.py runs in one process")
  plan = load_plan(workdir, request.changes)
  submodel = find_submodel(plan, request.submodel)
  index = plan.method.submodels(plan.model).index(submodel)
  tokenizer = make_tokenizer(plan.experiment.data)
  check_vocab(tokenizer, plan.experiment.model.vocab_size)
  check_end(plan.model, tokenizer.eos)
  published = Published(pathlib.Path(workdir)) if is_published(workdir) else None
  template = published and published.chat_template
  require(not request.chat or template is not None, "--chat: this model has no chat template")
  logging.getLogger("lm_eval").setLevel(logging.WARNING)
  manager = TaskManager(include_path=request.include or None)
  unknown = [task for task in request.tasks if not manager.match_tasks([task])]
  require(not unknown, f"no task {', '.join(unknown)}; name the folder of your own with --include")
  _, params = load_params(plan, workdir, request.step)
  stops = (tokenizer.eos,) if published is None else tuple({tokenizer.eos, *published.stop_tokens})

  @functools.cache
  def generator(sampling: Sampling, max_len: int) -> Generator:
    decoder = plan.method.decoder(plan.model, params, submodel)
    return Generator(decoder, tokenizer.vocab_size, sampling, stops, max_len, plan.mesh)

  write = lambda messages, begin: chat.render(template, messages, tokenizer.special, begin)
  label = f"{pathlib.Path(workdir).absolute().name}, method {plan.method_name}, sub-model {submodel.name}"
  model = AdaptiveLM(
    tokenizer,
    prefix=prefix_of(tokenizer, plan.experiment.data),
    scorer=Scorer(plan.method, plan.model, params, index, plan.mesh, request.rows),
    generator=generator,
    max_len=plan.experiment.data.seq_len if request.max_len is None else request.max_len,
    rows=request.rows,
    chat=write if request.chat else None,
    name=label,
  )
  found = lm_eval.simple_evaluate(
    model,
    tasks=list(request.tasks),
    limit=request.limit,
    num_fewshot=request.num_fewshot,
    apply_chat_template=request.chat,
    task_manager=manager,
    log_samples=bool(request.output),
  )
  mode = "log-likelihoods by one forward pass, continuations by cached decoding, both of this sub-model"
  changes = f"; {', '.join(request.changes)}" if request.changes else ""
  print(f"{label}{changes}\n{mode}\n" + "\n".join(_table(found)))
  if request.output:
    _write(found, label, request.output)


def _table(found: Mapping[str, Any]) -> Iterator[str]:
  """A line for every task and metric, with its standard error."""
  yield f"{'task':24} {'documents':>9} {'examples':>8}  {'metric':16} {'value':>8} {'error':>8}"
  for task, results in found["results"].items():
    documents = found.get("n-samples", {}).get(task, {}).get("effective", "")
    for name, value in results.items():
      metric, _, kind = name.partition(",")
      if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
        continue
      error = results.get(f"{metric}_stderr,{kind}")
      error = f"{error:8.4f}" if isinstance(error, (int, float)) else f"{'':8}"
      label = metric if kind == "none" else f"{metric} {kind}"
      yield f"{task:24} {documents:>9} {found['n-shot'].get(task, 0):>8}  {label:16} {value:8.4f} {error}"


def _write(found: Mapping[str, Any], label: str, output: str) -> None:
  kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples", "samples") if name in found}
  try:
    pathlib.Path(output).write_text(json.dumps({"model": label, **kept}, default=str, indent=1), encoding="utf-8")
  except OSError as error:
    raise ConfigError(f"cannot write {output}: {error.strerror}") from error


def names(texts: Sequence[str]) -> tuple[str, ...]:
  """Of tasks, given one by one or with commas between them."""
  return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())

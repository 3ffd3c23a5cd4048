"""What `perplexity.py` does: how well a model predicts any text, in windows of its tokens."""

import dataclasses
import glob
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from adaptive import sharding
from adaptive.config import require
from adaptive.data.tokenizers import Tokenizer, check_vocab, make_tokenizer, prefix_of
from adaptive.evaluation import quality
from adaptive.methods.contract import Batch
from adaptive.training.run import Plan, find_submodel, load_params, load_plan
from adaptive.training.workdir import user_errors

_HEADER = f"{'sub-model':24} {'nats/token':>11} {'perplexity':>11} {'bits/byte':>10} {'accuracy':>9}"


@dataclasses.dataclass(frozen=True)
class Request:
  """What to read.

  Attributes:
    texts: files, or patterns of them such as `docs/**/*.md`; each file is a document.
    window: tokens that are seen at a time; windows do not overlap. None: the length of the run's rows, 1024 at most.
    limit: of each file at most so many windows, its first; None: all.
    submodels: their names; empty: all of them.
    rows: windows at a time. step: of the checkpoint; None is the newest. changes: settings that are not trained.
  """

  texts: tuple[str, ...]
  window: int | None = None
  limit: int | None = None
  submodels: tuple[str, ...] = ()
  rows: int = 8
  step: int | None = None
  changes: tuple[str, ...] = ()


def perplexity(workdir: str, request: Request) -> None:
  """Prints a line for every sub-model.

  Raises:
    ConfigError: anything that cannot work, before parameters are read.
  """
  plan = load_plan(workdir, request.changes)
  submodels = plan.method.submodels(plan.model)
  chosen = [find_submodel(plan, name) for name in request.submodels] or list(submodels)
  tokenizer = make_tokenizer(plan.experiment.data)
  check_vocab(tokenizer, plan.experiment.model.vocab_size)
  window = min(plan.experiment.data.seq_len, 1024) if request.window is None else request.window
  require(window >= 2 and request.rows >= 1, f"window={window} and rows={request.rows} must be at least 2 and 1")
  prefix = prefix_of(tokenizer, plan.experiment.data)
  rows, share, size = _rows(request, tokenizer, prefix, window)
  _, params = load_params(plan, workdir, request.step)
  indices = [submodels.index(submodel) for submodel in chosen]
  if indices[-1] != len(submodels) - 1:
    indices.append(len(submodels) - 1)  # agreement is with it
  batches = [sharding.global_batch(batch, plan.mesh) for batch in _batches(rows, plan, request.rows)]
  with tqdm.tqdm(total=len(indices), desc="reading", unit="sub-model", disable=len(indices) == 1) as bar:
    found = quality.measure(
      plan.method, plan.model, params, batches, plan.mesh, indices, report=lambda done: bar.update(done - bar.n)
    )
  tokens = int(found.tokens.sum())
  print(f"{tokens:,} tokens predicted, of {share * size:,.0f} bytes, in windows of {window}\n{_HEADER}")
  for i, submodel in enumerate(chosen):
    loss = found.loss(i)
    cells = f"{loss:11.4f} {math.exp(min(loss, 700.0)):11.2f} {tokens * loss / math.log(2) / (share * size):10.4f}"
    print(f"{submodel.name:24} {cells} {found.accuracy(i):9.2%}")


def _files(patterns: Sequence[str]) -> list[pathlib.Path]:
  found = []
  for pattern in patterns:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if pathlib.Path(path).is_file())
    require(bool(matches), f"--text={pattern} matches no file")
    found += map(pathlib.Path, matches)
  return list(dict.fromkeys(found))


def _rows(
  request: Request, tokenizer: Tokenizer, prefix: Sequence[int], window: int
) -> tuple[list[np.ndarray], float, int]:
  """Windows [t + 1] of all files, the share of the text's tokens that they predict, and the text's bytes."""
  rows, total, size, predicted = [], 0, 0, 0
  for path in _files(request.texts):
    with user_errors(f"cannot read {path}"):
      text = path.read_bytes().decode("utf-8", errors="strict")
    ids = tokenizer.encode(text)
    total, size = total + len(ids), size + len(text.encode("utf-8"))
    for start in list(range(0, len(ids), window))[: request.limit]:
      row = np.concatenate([np.array(prefix, np.int32), ids[start : start + window]])
      if len(row) > 1:
        rows.append(row)
        predicted += len(row) - 1
  require(predicted > 0, "there is nothing to predict: the text has no second token")
  return rows, predicted / total, size


def _batches(rows: Sequence[np.ndarray], plan: Plan, number: int) -> Iterator[Batch]:
  """Batches of equal shape: rows are filled up to the longest, and the last batch with rows without tokens."""
  parts = sharding.batch_parts(plan.mesh)
  number, length = -(-number // parts) * parts, max(map(len, rows)) - 1
  for start in range(0, len(rows), number):
    batch = {name: np.zeros((number, length), np.int32) for name in ("inputs", "targets", "segment_ids", "positions")}
    for i, row in enumerate(rows[start : start + number]):
      size = len(row) - 1
      batch["inputs"][i, :size], batch["targets"][i, :size] = row[:-1], row[1:]
      batch["segment_ids"][i, :size], batch["positions"][i, :size] = 1, np.arange(size)
    yield batch

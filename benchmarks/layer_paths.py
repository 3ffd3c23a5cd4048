"""Layer paths scored per second by the search, beside the same paths of the same questions in transformers on torch.

  pip install -e '.[parity]'
  python benchmarks/layer_paths.py --model=models/SmolLM2-135M-Instruct --questions=data/piqa_train.jsonl

Questions of equal length are searched side by side, and what the search asked for is then run through `transformers`,
question by question, the options as the rows of one batch and the model's list of layers changed to the path's. Both
score the options' tokens and nothing else is timed. The two take turns, group by group; programs of a length that was
not seen before are compiled first, and how many were compiled after that is told. A Hugging Face folder is needed.
Where others use the machine, give both one core (taskset -c 0, --threads=1): torch's threads wait for each other.
"""

import argparse
import itertools
import random
import sys
import time

import jax
import numpy as np

from adaptive.cli import use_compilation_cache
from adaptive.config import ConfigError
from adaptive.data.pieces import continuation
from adaptive.data.questions import read_questions
from adaptive.data.tokenizers import make_tokenizer, prefix_of
from adaptive.search import rewards, trees
from adaptive.search.driver import search_many
from adaptive.search.scorer import PathScorer
from adaptive.search.strategies import STRATEGIES
from adaptive.training.run import load_params, load_plan


class Peer:
  """The same model in transformers; any path by a list of its layers."""

  def __init__(self, folder: str, threads: int):
    import torch
    import transformers

    torch.set_num_threads(threads)
    self._torch = torch
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self._model, self._device = model.eval().to(device), device
    self._layers = list(self._model.model.layers)

  def __call__(self, pieces, visits) -> np.ndarray:
    """Log-probability of each option."""
    torch = self._torch
    path = [self._layers[layer] for layer, count in enumerate(visits) for _ in range(count)]
    self._model.model.layers = torch.nn.ModuleList(path)
    self._model.config.num_hidden_layers = len(path)  # of a longer list the rest would be passed over
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(p.tokens)) for p in pieces], batch_first=True)
    lengths = torch.tensor([len(p.tokens) for p in pieces])[:, None]
    tokens, mask = tokens.to(self._device), (torch.arange(tokens.shape[1])[None] < lengths).long().to(self._device)
    with torch.inference_mode():
      logits = self._model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
      each = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0].cpu()
    return np.array([float(each[i, p.given - 1 : len(p.tokens) - 1].sum()) for i, p in enumerate(pieces)])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", required=True)
  parser.add_argument("--questions", required=True)
  parser.add_argument("--groups", type=int, default=6)
  parser.add_argument("--width", type=int, default=8, help="questions side by side")
  parser.add_argument("--budget", type=int, default=20, help="paths of a question")
  parser.add_argument("--replayed", type=int, default=6, help="of those, through transformers")
  parser.add_argument("--together", type=int, default=None)
  parser.add_argument("--threads", type=int, default=2, help="of torch on a CPU")
  a = parser.parse_args()
  use_compilation_cache("runs/model")
  plan = load_plan(a.model)
  _, params = load_params(plan, a.model)
  tokenizer = make_tokenizer(plan.experiment.data)
  encode, prefix = lambda text: tokenizer.encode(text).tolist(), prefix_of(tokenizer, plan.experiment.data)
  groups = grouped(read_questions(a.questions), lambda q: trees.plant(q, encode, prefix, 1024), a.width, a.groups)
  config, reward, peer, draw = (
    plan.experiment.model,
    rewards.REWARDS["margin"],
    Peer(a.model, a.threads),
    random.Random(0),
  )
  together = a.together or (1 if jax.default_backend() == "cpu" else 8)
  shares, worst, compiled_late = [], 0.0, 0
  print(f"{'tokens':>7} {'ours, paths/s':>14} {'theirs':>8} {'ratio':>6} {'layers run':>11}")
  for questions, planted in groups:
    pieces = [[continuation(encode, prefix, q.prompt, text) for text in q.options] for q in questions]
    scorer = PathScorer(config, params, planted, together=together)
    scorer([(i, (1,) * config.num_layers) for i in range(len(questions))])  # compiles
    for i in range(len(questions)):
      scorer.forget(i)
    known, asked, scores = scorer.programs, [], {}

    def evaluate(wanted, scorer=scorer, asked=asked, scores=scores, questions=questions):
      found = scorer(wanted)
      asked += wanted
      scores |= {pair: options.log_probs for pair, options in zip(wanted, found)}
      return [reward(questions[i], options) for (i, _), options in zip(wanted, found)]

    make = lambda i: (
      lambda: STRATEGIES["find_then_shrink"](config.num_layers, a.budget, np.random.default_rng(i), goal=0.5)
    )
    began = time.perf_counter()
    list(search_many([(i, make(i)) for i in range(len(questions))], evaluate, a.width))
    ours = len(asked) / (time.perf_counter() - began)
    compiled_late += scorer.programs - known
    sample = draw.sample(asked, min(a.replayed * len(questions), len(asked)))
    peer(pieces[sample[0][0]], sample[0][1])
    began = time.perf_counter()
    theirs_found = [peer(pieces[i], visits) for i, visits in sample]
    theirs = len(sample) / (time.perf_counter() - began)
    worst = max(worst, *(np.abs(scores[pair] - x).max() for pair, x in zip(sample, theirs_found)))
    shares.append(ours / theirs)
    run = scorer.computed / scorer.visits
    print(f"{planted[0].shape[0]:7} {ours:14.2f} {theirs:8.2f} {shares[-1]:6.2f} {run:11.0%}", flush=True)
  print(f"median ratio {np.median(shares):.2f}; log-probabilities differ by at most {worst:.1e}")
  print(f"programs compiled after a group's first batch: {compiled_late}")


def grouped(questions, plant, width: int, number: int):
  """Groups of questions whose programs have one shape, spread over the lengths that there are."""
  pairs = sorted(((plant(q), q) for q in questions), key=lambda pair: (pair[0].shape, pair[1].id))
  found = []
  for _, same in itertools.groupby(pairs, key=lambda pair: pair[0].shape):
    same = list(same)
    if len(same) >= width:
      found.append(([q for _, q in same[:width]], [tree for tree, _ in same[:width]]))
  if not found:
    raise ConfigError(f"no {width} questions have the same length: lower --width")
  return [found[i] for i in sorted({int(i) for i in np.linspace(0, len(found) - 1, number)})]


if __name__ == "__main__":
  try:
    main()
  except ConfigError as error:
    sys.exit(f"error: {error}")

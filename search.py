"""Searches, for each question of a file, which layers of a trained model to skip or to repeat (Dr.LLM's labels).

python search.py --model=models/SmolLM2-135M-Instruct --reward=likelihood --questions=data/piqa_train.jsonl \\
  --labels=data/piqa_labels.jsonl
python search.py --workdir=runs/graded --questions=data/pointers_train.jsonl --labels=data/pointers_labels.jsonl

The same command goes on with a label file that is not finished.
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_MODEL = flags.DEFINE_string(
  "model", None, "Instead: a published model: a folder, a GGUF file, or its name on the hub."
)
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of questions with their answers.")
_LABELS = flags.DEFINE_string("labels", None, "JSONL file to write: of each question the plan found.")
_LIMIT = flags.DEFINE_integer("limit", None, "At most so many questions, the first of the file.", lower_bound=1)
_STRATEGY = flags.DEFINE_string(
  "strategy", "find_then_shrink", "exhaustive, random, hill_climb, greedy, mcts or find_then_shrink."
)
_BUDGET = flags.DEFINE_integer("budget", 50, "Plans evaluated of a question, at most.", lower_bound=1)
_REWARD = flags.DEFINE_string(
  "reward",
  "margin",
  "margin, choice (each also with _per_character), exact or likelihood: see adaptive/search/rewards.py.",
)
_SHARED = flags.DEFINE_bool("shared", False, "Search one plan that serves all questions.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn.", lower_bound=0)
_WIDTH = flags.DEFINE_integer("width", 16, "Questions searched side by side.", lower_bound=1)
_TOGETHER = flags.DEFINE_integer(
  "together", None, "Plans that run a layer as one batch; by default 1 on a CPU, else 8.", lower_bound=1
)
_MAX_LEN = flags.DEFINE_integer(
  "max_len", None, "Tokens of the longest question; by default the run's data.seq_len.", lower_bound=2
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    cli.fail("name one of --workdir, such as --workdir=runs/demo, and --model, a published model's folder")
  for flag in (_QUESTIONS, _LABELS):
    if not flag.value:
      cli.fail(f"--{flag.name} is missing, such as --{flag.name}=data/{flag.name}.jsonl")

  from adaptive.pretrained import hub
  from adaptive.training import path_search

  workdir = _WORKDIR.value or hub.resolve(_MODEL.value)
  cli.use_compilation_cache(_WORKDIR.value or "runs/model")  # not beside somebody's model
  request = path_search.Request(
    questions=_QUESTIONS.value,
    labels=_LABELS.value,
    limit=_LIMIT.value,
    strategy=_STRATEGY.value,
    budget=_BUDGET.value,
    reward=_REWARD.value,
    shared=_SHARED.value,
    seed=_SEED.value,
    width=_WIDTH.value,
    together=_TOGETHER.value,
    max_len=_MAX_LEN.value,
    step=_STEP.value,
  )
  path_search.search(workdir, request)


if __name__ == "__main__":
  cli.run(main)

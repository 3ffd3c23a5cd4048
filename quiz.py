"""Puts questions to the sub-models of a run: what they answer, layers run and time, beside chance and fixed paths.

python quiz.py --workdir=runs/dr_llm_demo --questions=data/pointers_held_out.jsonl --output=runs/dr_llm_demo/quiz.json
python quiz.py --workdir=runs/dr_llm --questions=data/piqa_held_out.jsonl --fixed=data/piqa_one_plan.jsonl
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_MODEL = flags.DEFINE_string(
  "model", None, "Instead: a published model: a folder, a GGUF file, or its name on the hub."
)
_QUESTIONS = flags.DEFINE_string("questions", None, "JSONL file of questions with their answers.")
_LIMIT = flags.DEFINE_integer("limit", None, "At most so many questions, the first of the file.", lower_bound=1)
_REWARD = flags.DEFINE_string(
  "reward",
  "",
  "choice (also _per_character), exact, margin, likelihood; by default choice where there are options, or exact.",
)
_SUBMODEL = flags.DEFINE_multi_string("submodel", [], "Name of a sub-model; all of them by default.")
_CHANCE = flags.DEFINE_bool("chance", True, "Ask those that decide also with chance deciding, at their rates.")
_FIXED = flags.DEFINE_multi_string(
  "fixed", [], "Label file with a plan for all questions, as search.py --shared writes."
)
_MAX_LEN = flags.DEFINE_integer(
  "max_len", None, "Tokens of the longest question; by default the run's data.seq_len.", lower_bound=2
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change that is not trained, such as method.when=per_step.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for everything measured; its picture is written beside it.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    cli.fail("name one of --workdir, such as --workdir=runs/demo, and --model, a published model's folder")
  if not _QUESTIONS.value:
    cli.fail("--questions is missing, such as --questions=data/pointers_held_out.jsonl")

  from adaptive.pretrained import hub
  from adaptive.training import quiz_run

  workdir = _WORKDIR.value or hub.resolve(_MODEL.value)
  cli.use_compilation_cache(_WORKDIR.value or "runs/model")  # not beside somebody's model
  request = quiz_run.Request(
    questions=_QUESTIONS.value,
    limit=_LIMIT.value,
    reward=_REWARD.value,
    submodels=tuple(_SUBMODEL.value),
    chance=_CHANCE.value,
    fixed=tuple(_FIXED.value),
    max_len=_MAX_LEN.value,
    step=_STEP.value,
    changes=tuple(_SET.value),
    output=_OUTPUT.value,
  )
  quiz_run.run(workdir, request)


if __name__ == "__main__":
  cli.run(main)

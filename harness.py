"""Tasks of lm-evaluation-harness on any sub-model of a run, or on a published model; in process, without torch.

python harness.py --model=models/SmolLM2-135M-Instruct --include=tasks --tasks=nested_arithmetic
python harness.py --workdir=runs/early_exit --submodel=threshold=0.7 --include=tasks --tasks=nested_arithmetic
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_MODEL = flags.DEFINE_string(
  "model", None, "Instead: a published model: a folder, a GGUF file, or its name on the hub."
)
_TASKS = flags.DEFINE_multi_string("tasks", [], "Names of tasks, with commas between them.")
_INCLUDE = flags.DEFINE_string("include", "", "Folder with task files of your own, such as tasks.")
_SUBMODEL = flags.DEFINE_string("submodel", "full", "Name of a sub-model, as eval.py lists them.")
_LIMIT = flags.DEFINE_integer("limit", None, "Of each task at most so many documents.", lower_bound=1)
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each document; the task's own by default.")
_CHAT = flags.DEFINE_bool("chat", False, "Write prompts by the model's chat template.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts at a time.", lower_bound=1)
_MAX_LEN = flags.DEFINE_integer("max_len", None, "Tokens of the longest row; by default the run's data.seq_len.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change that is not trained, such as method.exit.kv=exact.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for results and samples.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    cli.fail("name one of --workdir, such as --workdir=runs/demo, and --model, a published model's folder")
  if not _TASKS.value:
    cli.fail("--tasks is missing, such as --include=tasks --tasks=nested_arithmetic")

  from adaptive.pretrained import hub
  from adaptive.training import harness_run

  workdir = _WORKDIR.value or hub.resolve(_MODEL.value)
  cli.use_compilation_cache(_WORKDIR.value or "runs/model")  # not beside somebody's model
  request = harness_run.Request(
    tasks=harness_run.names(_TASKS.value),
    include=_INCLUDE.value,
    submodel=_SUBMODEL.value,
    limit=_LIMIT.value,
    num_fewshot=_FEWSHOT.value,
    chat=_CHAT.value,
    rows=_BATCH_SIZE.value,
    max_len=_MAX_LEN.value,
    step=_STEP.value,
    changes=tuple(_SET.value),
    output=_OUTPUT.value,
  )
  harness_run.evaluate(workdir, request)


if __name__ == "__main__":
  cli.run(main)

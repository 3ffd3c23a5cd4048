"""How well a run, or a published model, predicts any text: nats per token, perplexity and bits per byte.

python perplexity.py --workdir=runs/demo --text='docs/**/*.md'
python perplexity.py --model=models/SmolLM2-135M-Instruct --text=README.md --window=1024
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_MODEL = flags.DEFINE_string(
  "model", None, "Instead: a published model: a folder, a GGUF file, or its name on the hub."
)
_TEXT = flags.DEFINE_multi_string("text", [], "File, or a pattern such as 'docs/**/*.md'; may be given several times.")
_WINDOW = flags.DEFINE_integer(
  "window", None, "Tokens seen at a time; by default the run's data.seq_len, at most 1024."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Of each file at most so many windows.", lower_bound=1)
_SUBMODEL = flags.DEFINE_multi_string("submodel", [], "Name of a sub-model; all of them by default.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Windows at a time.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change that is not trained, such as model.dtype=bfloat16.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}; patterns stand in quotes: --text='docs/*.md'")
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    cli.fail("name one of --workdir, such as --workdir=runs/demo, and --model, a published model's folder")
  if not _TEXT.value:
    cli.fail("--text is missing, such as --text=README.md")

  from adaptive.pretrained import hub
  from adaptive.training import perplexity

  workdir = _WORKDIR.value or hub.resolve(_MODEL.value)
  cli.use_compilation_cache(_WORKDIR.value or "runs/model")  # not beside somebody's model
  request = perplexity.Request(
    texts=tuple(_TEXT.value),
    window=_WINDOW.value,
    limit=_LIMIT.value,
    submodels=tuple(_SUBMODEL.value),
    rows=_BATCH_SIZE.value,
    step=_STEP.value,
    changes=tuple(_SET.value),
  )
  perplexity.perplexity(workdir, request)


if __name__ == "__main__":
  cli.run(main)

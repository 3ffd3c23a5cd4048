"""Continues prompts with any sub-model of a trained run.

python generate.py --workdir=runs/demo --prompt='def __init__(self' --submodel=depth=3,d_ff=128
python generate.py --workdir=runs/demo --prompt='import ' --prompt='class ' --temperature=0 --max_new_tokens=40
python generate.py --workdir=runs/early_exit --prompt='import ' --draft=depth=2
python generate.py --model=models/SmolLM2-135M-Instruct --prompt='What is the capital of France?'
"""

from absl import flags

from adaptive import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run that train.py made.")
_MODEL = flags.DEFINE_string(
  "model", None, "Instead: a published model: a folder, a GGUF file, or its name on the hub."
)
_CHAT = flags.DEFINE_bool(
  "chat", None, "Whether prompts are messages to --model; by default if it has a chat template."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Beginning of a document; given several times, a batch")
_SUBMODEL = flags.DEFINE_string("submodel", None, "Name of a sub-model, as eval.py lists them; the full by default.")
_SET = flags.DEFINE_multi_string("set", [], "Setting to change that is not trained, such as method.exit.kv=exact.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; the newest by default.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "A continuation ends after so many tokens.")
_MAX_LEN = flags.DEFINE_integer("max_len", None, "Limit on prompt and continuation; by default the run's data.seq_len.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits; 0 takes the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k likeliest tokens; 0: among all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the likeliest tokens that reach this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
_SLOTS = flags.DEFINE_integer(
  "slots",
  0,
  "Depth-wise batching of Mixture-of-Recursions: prompts under way at a time, each token at its own depth; --stop then "
  "shortens what is shown, not the work.",
)
_DRAFT = flags.DEFINE_string(
  "draft",
  None,
  "Self-speculative decoding: the sub-model that drafts tokens for the full one, such as depth=2, or 'auto': the best "
  "of all, chosen anew in every round.",
)
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", None, "Tokens that a named --draft proposes in a round; 6.")
_STOP = flags.DEFINE_string("stop", "", "A continuation ends before this text.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    cli.fail(f"unexpected argument {argv[1]!r}")
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    cli.fail("name one of --workdir, such as --workdir=runs/demo, and --model, a published model's folder")
  if not _PROMPT.value:
    cli.fail("--prompt is missing, such as --prompt='import '; an empty one, --prompt=, starts a document")
  if _DRAFT_TOKENS.value is not None and _DRAFT.value in (None, "auto"):
    cli.fail("--draft_tokens goes with a draft that is named, such as --draft=depth=2")

  from adaptive.generation.sampling import Sampling
  from adaptive.pretrained import hub
  from adaptive.training import completion

  workdir = _WORKDIR.value or hub.resolve(_MODEL.value)
  cli.use_compilation_cache(_WORKDIR.value or "runs/model")  # not beside somebody's model
  request = completion.Request(
    prompts=tuple(_PROMPT.value),
    chat=_CHAT.value,
    sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
    submodel=_SUBMODEL.value,
    step=_STEP.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    max_len=_MAX_LEN.value,
    seed=_SEED.value,
    stop=_STOP.value,
    slots=_SLOTS.value,
    draft=_DRAFT.value,
    changes=tuple(_SET.value),
    draft_tokens=6 if _DRAFT_TOKENS.value is None else _DRAFT_TOKENS.value,
  )
  completion.complete(workdir, request)


if __name__ == "__main__":
  cli.run(main)

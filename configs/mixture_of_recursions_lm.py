"""Mixture-of-Recursions (arXiv 2507.10524) at the paper's sizes with its recipe, to be trained on your own text.

  python train.py --config=configs/mixture_of_recursions_lm.py:360m,3 --workdir=/mnt/share/runs/mor_360m --distributed \
    --config.data.source=tfds --config.data.tfds_name=my_set --config.data.tokenizer=/mnt/share/tokenizer.json

The argument is a size (`135m`, `360m`, `730m`, `1.7b`: Table 6) and the number of recursions. The paper's data are
FineWeb-Edu-dedup of the SmolLM corpus, with SmolLM's tokenizer of 49,152 entries. Its 16.5e18-FLOP runs of the 360m
size took 12,619 (two recursions), 14,161 (three) and 14,216 (four) steps of 1,024 rows of 2,048 tokens, and reached a
validation loss of 2.7511, 2.7925 and 2.8204 under top-k routing, which looks ahead.

Warm-up is 5 % of the smallest of the paper's three budgets, the linear decay the last 20 %. Nobody has trained these
here: docs/ahead_of_time.md says how to ask the compiler.
"""

from adaptive import methods

SHAPES = {
  "135m": dict(num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3),
  "360m": dict(num_layers=32, d_model=960, d_ff=2560, num_heads=15, num_kv_heads=5),
  "730m": dict(num_layers=26, d_model=1536, d_ff=4096, num_heads=24, num_kv_heads=8),
  "1.7b": dict(num_layers=24, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=32),
}
STEPS = {1: 9_438, 2: 12_619, 3: 14_161, 4: 14_216}


def get_config(which="360m,3"):
  size, _, recursions = which.partition(",")
  recursions = int(recursions or 3)
  if size not in SHAPES:
    raise ValueError(f"no size {size!r}; there are {', '.join(SHAPES)}")
  config = methods.default_config("mixture_of_recursions")
  config.model.update(SHAPES[size], vocab_size=49152, tied_embeddings=True, dtype="bfloat16", remat="full")
  # The unrolled depth is the next that divides, as in the paper: 1 + 10 x 3 + 1 for 135m, 34 for 360m with four.
  inner = config.model.num_layers - 2
  config.model.num_layers = 2 + -(-inner // recursions) * recursions
  config.method.update(num_recursions=recursions)
  config.data.update(source="files", path="corpus", tokenizer="tokenizer.json", seq_len=2048, batch_size=1024)
  config.training.update(steps=STEPS.get(recursions, 14_161), grad_accum=2, eval_every=1000, checkpoint_every=500)
  config.training.optimizer.update(name="adamw", learning_rate=3e-3, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=1.0)
  config.training.optimizer.update(schedule="wsd", warmup_steps=86, decay_fraction=0.2, final_fraction=0.0)
  config.evaluation.update(rows=512, batch_size=256)
  config.mesh.update(fsdp=16)
  return config

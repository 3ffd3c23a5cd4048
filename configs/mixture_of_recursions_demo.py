"""Mixture-of-Recursions (arXiv 2507.10524) on the source code of Python's standard library, on two CPU cores.

python train.py --config=configs/mixture_of_recursions_demo.py --workdir=runs/mor
python eval.py --workdir=runs/mor

1 + 2 x 3 + 1 layers, of which the two in the middle run up to three times. `:recursive` is the same network without
routers, every token all the way; `:dense` has eight layers of its own.
"""

from adaptive import methods


def get_config(variant="mor"):
  config = methods.default_config({"mor": "mixture_of_recursions"}.get(variant, variant))
  config.model.update(num_layers=8, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=40)
  if variant == "mor":
    config.method.update(score_shifts=(-1.0, 1.0), capacity_scales=(0.75, 0.5))
  config.evaluation.update(rows=128)
  return config

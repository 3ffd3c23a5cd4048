"""Mixture-of-Recursions (arXiv 2507.10524) on the source code of Python's standard library, on two CPU cores.

python train.py --config=configs/mixture_of_recursions_demo.py --workdir=runs/mor
python eval.py --workdir=runs/mor

1 + 2 x 3 + 1 layers, of which the two in the middle run up to three times. `:recursive` is the same network without
routers, every token all the way; `:dense` has eight layers of its own. `:wide` is what depth-wise batching is for, a
block that is most of the model: 1 + 6 x 3 + 1 layers of width 512, all recursions with the keys of the first, and half
of the tokens going on after each; half an hour.
"""

from adaptive import methods


def get_config(variant="mor"):
  routed = variant in ("mor", "wide")
  config = methods.default_config("mixture_of_recursions" if routed else variant)
  config.model.update(num_layers=8, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=40)
  if routed:
    config.method.update(score_shifts=(-1.0, 1.0), capacity_scales=(0.75, 0.5))
  if variant == "wide":
    config.model.update(num_layers=20, d_model=512, d_ff=1536, num_heads=8)
    config.method.update(kv_cache="shared", capacities=(1.0, 0.5, 0.25))
  config.evaluation.update(rows=128)
  return config

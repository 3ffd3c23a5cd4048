"""Methods of dynamic depth on one network of 16 layers, long enough to matter: 35 minutes each on two idle CPU cores.

python train.py --config=configs/dynamic_depth.py:early_exit --workdir=runs/early_exit
python eval.py --workdir=runs/early_exit

On the source code of Python's standard library, byte by byte. `:layer_skip` is LayerSkip, `:dense` the plain network;
`:dense,8` has 8 layers: a shallower network is what any of these must beat. `:deep` has 24 layers of twice the width,
for self-speculative decoding (an hour); `:drafts` goes on with it for 180 updates (20 minutes) that teach its first
exits to say what the whole model says:

python train.py --config=configs/dynamic_depth.py:deep --workdir=runs/deep
python train.py --config=configs/dynamic_depth.py:drafts --config.training.init_from=runs/deep --workdir=runs/drafts

Every method, on a smaller network, is in `depth_demo.py`.
"""

from adaptive import methods
from adaptive.config import require

VARIANTS = {
  "early_exit": dict(exits=(1, 2, 3, 4, 6, 8, 12)),
  "layer_skip": dict(dropout=0.1, exit_scale=1.0, rotation=4),
  "dense": {},
}
DEEP = {
  "deep": dict(exits=(1, 2, 3, 4, 6, 8, 12, 18), weights="equal", distill=0.5),
  "drafts": dict(exits=(1, 2, 3, 4), weights="equal", distill=1.0),
}


def get_config(variant="early_exit"):
  name, _, layers = variant.partition(",")
  require(name in (*VARIANTS, *DEEP), f"no variant {name!r} of this config; there are {', '.join((*VARIANTS, *DEEP))}")
  deep = name in DEEP
  config = methods.default_config("early_exit" if deep else name)
  layers = 24 if deep else int(layers or 16)
  config.model.update(num_layers=layers, d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, scan_unroll=layers)
  if deep:
    config.model.update(d_model=384, d_ff=1152)
  config.method.update(DEEP[name] if deep else VARIANTS[name])
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=500 if deep else 600, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=60)
  if name == "drafts":
    config.training.update(steps=180)
    config.training.optimizer.update(warmup_steps=20, decay_fraction=0.6, learning_rate=1.5e-3, muon_learning_rate=1e-2)
  config.evaluation.update(rows=128)
  return config

"""Methods of dynamic depth on one network of 16 layers, long enough to matter: an hour each on two CPU cores.

python train.py --config=configs/dynamic_depth.py:early_exit --workdir=runs/early_exit
python eval.py --workdir=runs/early_exit

On the source code of Python's standard library, byte by byte. `:layer_skip` is LayerSkip, `:dense` the plain network;
`:dense,8` has 8 layers: a shallower network is what any of these must beat.
"""

from adaptive import methods

VARIANTS = {
  "early_exit": dict(exits=(1, 2, 3, 4, 6, 8, 12)),
  "layer_skip": dict(dropout=0.1, exit_scale=1.0, rotation=4),
  "dense": {},
}


def get_config(variant="early_exit"):
  name, _, layers = variant.partition(",")
  config = methods.default_config(name)
  config.model.update(num_layers=int(layers or 16), d_model=192, d_ff=512, num_heads=6, num_kv_heads=2, scan_unroll=16)
  config.method.update(VARIANTS[name])
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=600, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=60)
  config.evaluation.update(rows=128)
  return config

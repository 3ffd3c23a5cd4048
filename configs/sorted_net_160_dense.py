"""Dense models beside `sorted_net_160.py`: same data, tokens and optimizer, the size of its full or smallest sub-model.

python train.py --config=configs/sorted_net_160_dense.py:full --workdir=runs/dense_full
python train.py --config=configs/sorted_net_160_dense.py:small --workdir=runs/dense_small
python benchmarks/nesting_tax.py --nested=runs/sorted_net_160 --dense=runs/dense_full --small=runs/dense_small
"""

from adaptive import methods


def get_config(size="full"):
  config = methods.default_config("dense")
  config.model.update(num_layers=10, d_model=128, d_ff=384, num_heads=8, num_kv_heads=2)
  if size == "small":
    config.model.update(num_layers=3, d_ff=128, num_heads=2, head_dim=16)
  config.data.update(seq_len=256, batch_size=16)
  config.training.update(steps=900, eval_every=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon")
  config.evaluation.update(rows=128)
  return config

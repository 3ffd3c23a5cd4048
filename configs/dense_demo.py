"""The plain backbone on the source code of Python's standard library: the ruler for `sorted_net_demo.py`.

python train.py --config=configs/dense_demo.py --workdir=runs/dense
python eval.py --compare runs/demo runs/dense

`configs/dense_demo.py:small` has the size of the demo's smallest sub-model.
"""

from adaptive import methods


def get_config(size="full"):
  config = methods.default_config("dense")
  config.model.update(num_layers=6, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  if size == "small":
    config.model.update(num_layers=2, d_ff=64)
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=300)
  config.training.optimizer.update(name="muon", warmup_steps=40)
  config.evaluation.update(rows=128)
  return config

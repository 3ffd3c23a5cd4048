"""SortedNet (arXiv 2309.00255) on the source code of Python's standard library: a first run, on two CPU cores.

python train.py --config=configs/sorted_net_demo.py --workdir=runs/demo
python eval.py --workdir=runs/demo
"""

from adaptive import methods


def get_config():
  config = methods.default_config("sorted_net")
  config.model.update(num_layers=6, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  config.data.update(seq_len=256, batch_size=12)
  # Deep and thin sub-models lose to shallower and wider ones of the same cost, and the other way round.
  widths = {2: (64, 128, 192, 256), 3: (128, 192, 256, 320), 4: (192, 256, 320), 5: (256, 320, 384), 6: (320, 384)}
  sizes = [(depth, 2, d_ff) for depth, choices in widths.items() for d_ff in choices]
  config.method.update(listed=tuple(sizes), scheme="sandwich", num_sampled=3)
  config.training.update(steps=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=40)
  config.evaluation.update(rows=128)
  return config

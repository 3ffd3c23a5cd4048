"""160 sub-models from one run, as in SortedNet's headline (arXiv 2309.00255): 8 depths x 4 head counts x 5 widths.

  python train.py --config=configs/sorted_net_160.py --workdir=runs/sorted_net_160
  python eval.py --workdir=runs/sorted_net_160

Trained in 51 minutes on two CPU cores that other work shared (33 minutes of CPU). Results: docs/methods/sorted_net.md.
"""

from adaptive import methods


def get_config():
  config = methods.default_config("sorted_net")
  config.model.update(num_layers=10, d_model=128, d_ff=384, num_heads=8, num_kv_heads=2)
  config.data.update(seq_len=256, batch_size=16)
  config.method.update(
    depths=tuple(range(3, 11)), q_per_kv=(1, 2, 3, 4), d_ff=(128, 192, 256, 320, 384), scheme="uniform", num_sampled=4
  )
  config.training.update(steps=900, eval_every=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon")
  config.evaluation.update(rows=128)
  return config

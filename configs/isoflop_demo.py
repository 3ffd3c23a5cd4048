"""The isoFLOP comparison of Mixture-of-Recursions (arXiv 2507.10524, Section 3) at a size for two CPU cores.

python isoflop.py --study=configs/isoflop_demo.py --workdir=runs/isoflop --budgets=3e12,8e12

Vanilla, recursive (2 and 3 recursions) and Mixture-of-Recursions (2 and 3), all of eight unrolled layers:
1 + 3 x 2 + 1 = 1 + 2 x 3 + 1. The number of steps is set by the budget.
"""

from adaptive import methods

VARIANTS = ("dense", "recursive,2", "recursive,3", "mixture_of_recursions,2", "mixture_of_recursions,3")


def get_config(variant="dense"):
  method, _, recursions = variant.partition(",")
  config = methods.default_config(method)
  config.model.update(num_layers=8, d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  if recursions:
    config.method.num_recursions = int(recursions)
  config.data.update(seq_len=256, batch_size=12)
  config.training.optimizer.update(name="muon")
  config.evaluation.update(rows=256, latency=False)
  return config

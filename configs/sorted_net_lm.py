"""SortedNet (arXiv 2309.00255) at the sizes of `dense_lm.py`, with the same data and batch: 9 or 12 sub-models a run.

  python train.py --config=configs/sorted_net_lm.py:360m --workdir=/mnt/share/runs/sorted_360m --distributed \
    --config.data.path='/mnt/share/corpus/**/*.txt' --config.data.tokenizer=/mnt/share/tokenizer.json

The family is three or four depths from half of the layers up, each with three feed-forward widths; a step gives each of
two sub-models half of the batch. Nobody has trained these: docs/ahead_of_time.md has what the compiler makes of them.
"""

import runpy

from adaptive import methods

DEPTHS = {"135m": (15, 20, 25, 30), "360m": (16, 24, 32), "1.7b": (12, 18, 24)}
D_FF = {"135m": (512, 1024, 1536), "360m": (1280, 1920, 2560), "1.7b": (4096, 6144, 8192)}


def get_config(size="135m"):
  dense = runpy.run_path(__file__.replace("sorted_net_lm", "dense_lm"))["get_config"](size)
  config = methods.default_config("sorted_net")
  config.method.update(depths=DEPTHS[size], d_ff=D_FF[size], num_sampled=2)
  config.update({key: value for key, value in dense.to_dict().items() if key != "method"})
  return config

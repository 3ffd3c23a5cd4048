"""Every method of dynamic depth on one small network: a first run of each on two CPU cores, and one plot of all.

python train.py --config=configs/depth_demo.py:early_exit --workdir=runs/early_exit
python eval.py --compare runs/early_exit runs/layer_skip

On the source code of Python's standard library, byte by byte. Eight layers, as in `mixture_of_recursions_demo.py`.
`:calm` and `:mue` are early exit too, one with CALM's classifier. A shared block of 2 layers makes 4 passes in
`:ponder` and `:act`, and up to 3 after 2 layers of their own in `:recurrent_depth`. `:dense` is the plain network and
`:dense,4` one of four layers: shallower networks are what any of these has to beat.
"""

from adaptive import methods
from adaptive.config import require

EXITS = (1, 2, 3, 4, 6)
MUE = dict(signal="cosine", kv="copy", thresholds=(0.9, 0.95, 0.98))
VARIANTS = {
  "dense": ("dense", {}),
  "early_exit": ("early_exit", dict(exits=EXITS)),
  "calm": ("early_exit", dict(exits=EXITS, classifier="joint", exit=dict(signal="learned"))),
  "mue": ("early_exit", dict(exits=tuple(range(1, 8)), weights="equal", exit=MUE)),
  "layer_skip": ("layer_skip", dict(exit_scale=1.0, rotation=4)),
  "jei_dnn": ("jei_dnn", dict(exits=EXITS, warmup_steps=150, phase_steps=15, gate_rate=10.0)),
  "sec": ("sec", dict(exits=EXITS)),
  "ponder": ("ponder", dict(num_recursions=4)),
  "act": ("ponder", dict(halting="act", num_recursions=4, exit=dict(thresholds=(0.99, 0.9, 0.7)))),
  "recurrent_depth": (
    "recurrent_depth",
    dict(prelude=2, core=2, num_recursions=3, mean_recursions=2.0, backprop=2),
  ),
  "unified_skip": ("unified_skip", dict(speedups=(1.2, 1.6, 2.0, 2.6))),  # 6, 5, 4 and 3 layers
  "first": ("first", dict(prompt_tokens=32, target=0.6, thresholds=(0.3, 0.4, 0.5, 0.6, 0.7))),
  "mixture_of_depths": (
    "mixture_of_depths",
    dict(capacity=0.25, gate="sigmoid", score_shifts=(-1.0, -0.5, 0.5, 1.0), capacity_scales=(0.75, 0.5, 0.25)),
  ),
}


def get_config(variant="early_exit"):
  name, _, layers = variant.partition(",")
  require(name in VARIANTS, f"no variant {name!r} of this config; there are {', '.join(VARIANTS)}")
  method, settings = VARIANTS[name]
  config = methods.default_config(method)
  config.model.update(num_layers=int(layers or 8), d_model=128, d_ff=384, num_heads=4, num_kv_heads=2)
  config.method.update(settings)
  config.data.update(seq_len=256, batch_size=12)
  config.training.update(steps=300, checkpoint_every=100)
  config.training.optimizer.update(name="muon", warmup_steps=40)
  if method == "jei_dnn":  # while gates learn, momentum must not move the heads, nor the other way round
    config.training.optimizer.inactive = "freeze"
  config.evaluation.update(rows=128)
  return config

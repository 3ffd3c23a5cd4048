"""Dense language models of three common sizes, to be trained on your own text: SmolLM2's shapes (arXiv 2502.02737).

python train.py --config=configs/dense_lm.py:135m --workdir=/mnt/share/runs/dense_135m --distributed \
  --config.data.path='/mnt/share/corpus/**/*.txt' --config.data.tokenizer=/mnt/share/tokenizer.json

Sizes are `135m`, `360m` and `1.7b`; the tokenizer may have up to 49,152 entries. A set prepared with TFDS instead of
text files: `--config.data.source=tfds --config.data.tfds_name=my_set --config.data.tfds_data_dir=/mnt/share/data`.

512 rows of 2,048 tokens are a step of about a million tokens; 20 tokens per parameter are 2,600, 6,900 and 32,600
steps. Parameters and optimizer are spread over 16 devices, and copies of that over the rest. On fewer than 256 devices,
`--config.training.grad_accum` keeps the activations of a step small enough.

Nobody has trained these: what is known of them is what the compiler says, in docs/ahead_of_time.md.
"""

from adaptive import methods

SHAPES = {
  "135m": dict(num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3),
  "360m": dict(num_layers=32, d_model=960, d_ff=2560, num_heads=15, num_kv_heads=5),
  "1.7b": dict(num_layers=24, d_model=2048, d_ff=8192, num_heads=32, num_kv_heads=32),
}
STEPS = {"135m": 2_600, "360m": 6_900, "1.7b": 32_600}


def get_config(size="135m"):
  config = methods.default_config("dense")
  config.model.update(SHAPES[size], vocab_size=49152, tied_embeddings=True, rope_theta=1e5)
  config.model.update(dtype="bfloat16", remat="full")
  config.data.update(source="files", path="corpus", tokenizer="tokenizer.json", seq_len=2048, batch_size=512)
  config.training.update(steps=STEPS[size], eval_every=1000, checkpoint_every=500)
  config.training.optimizer.update(schedule="wsd", warmup_steps=500, decay_fraction=0.2)
  config.evaluation.update(rows=512, batch_size=256)
  config.mesh.update(fsdp=16)
  return config

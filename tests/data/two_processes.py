"""Run by `test_pipeline.py`, once per process: prints the inputs of the shards that this process holds.

The mesh orders the devices of the two processes alternately, as the device order of a TPU slice may.
"""

import json
import sys

import jax

from adaptive import sharding
from adaptive.config import MeshConfig
from adaptive.data import packing, pipeline
from adaptive.data.sources import Document
from adaptive.data.tokenizers import ByteTokenizer

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))


def shards(batch):
  return [[shard.index[0].start, shard.data.tolist()] for shard in batch["inputs"].addressable_shards]


rows = packing.pack([Document("a", "".join(map(chr, range(32, 127))))], ByteTokenizer(), 4)
result = {"places": []}
for tensor in (1, 2):
  first, second, third, fourth = jax.devices()
  mesh = sharding.make_mesh(MeshConfig(tensor=tensor), [first, third, second, fourth])
  result["places"].append(pipeline.host_places(mesh, 8).tolist())
  result[f"train{tensor}"] = [shards(b) for b in pipeline.train_batches(rows, 8, 0, 1, 3, mesh)]
  result[f"validation{tensor}"] = [shards(b) for b in pipeline.validation_batches(rows, 10, 8, mesh)]
print(json.dumps(result))

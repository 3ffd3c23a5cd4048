"""Run by `test_two_processes.py`, once per process: trains a run whose devices two processes hold, four each."""

import json
import pathlib
import sys

import jax

from adaptive.methods import parse_config
from adaptive.training import loop, run

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
port, process, config, workdir = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(process))
loop.train(run.assemble(*parse_config(json.loads(pathlib.Path(config).read_text()))), workdir)

"""Eight fake CPU devices for every test, no silent rank promotion, and programs compiled quickly rather than well."""

import os

# Tests compile hundreds of tiny programs and run each a few times. LLVM's optimisations are most of that time; XLA's
# own passes, which decide what is computed and sent where, stay on. `XLA_FLAGS= pytest` tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

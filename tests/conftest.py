"""Eight fake CPU devices for every test, no silent rank promotion, and programs compiled quickly rather than well."""

import gc
import os

# Tests compile hundreds of tiny programs and run each a few times. LLVM's optimisations are most of that time; XLA's
# own passes, which decide what is computed and sent where, stay on. `XLA_FLAGS= pytest` tests what users run.
import jax
import pytest
import slow_list

quick = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones do not know the flag; here it makes compiling three times as fast
  quick += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", quick)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)  # before markers are asked for
def pytest_collection_modifyitems(items):
  slow = slow_list.names()
  for item in items:
    if item.nodeid in slow:
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_file_end_with_it():
  """Every compiled program holds some dozens of memory maps, of which a process may have 65 thousand."""
  yield
  jax.clear_caches()
  gc.collect()

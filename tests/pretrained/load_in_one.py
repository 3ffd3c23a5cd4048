"""Reads a published model in a process of its own; prints the bytes of its parameters, and by how much memory rose.

That is memory which nothing can give back: pages of a file that is mapped are not counted. First a small model is read,
with all that is loaded once.
"""

import pathlib
import sys
import threading

import jax

from adaptive.training.run import load_params, load_plan


def held() -> int:
  lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
  """The most that was held, looked at every millisecond."""

  def __init__(self):
    super().__init__(daemon=True)
    self.most, self.over = held(), threading.Event()

  def run(self):
    while not self.over.wait(0.001):
      self.most = max(self.most, held())


if __name__ == "__main__":
  small, folder = sys.argv[1:]
  jax.block_until_ready(load_params(load_plan(small), small))
  plan, peak, before = load_plan(folder), Peak(), held()
  peak.start()
  _, params = jax.block_until_ready(load_params(plan, folder))
  peak.over.set()
  peak.join()
  print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), peak.most - before)

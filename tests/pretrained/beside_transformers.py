"""Compares a published model here with `transformers` on torch, in a process of its own; prints JSON."""

import json
import sys

import jax
import numpy as np
import torch
import transformers

from adaptive.data.tokenizers import make_tokenizer
from adaptive.training.run import load_params, load_plan

if __name__ == "__main__":
  file, folder, text = sys.argv[1:]
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  plan = load_plan(file)
  _, params = load_params(plan, file)
  ids = make_tokenizer(plan.experiment.data).encode(text)[None]
  with torch.no_grad():
    want = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
  batch = {"inputs": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(ids.shape[1], dtype=np.int32)[None]}
  found = np.asarray(jax.jit(plan.model.apply)({"params": params}, batch))
  same_ids = tokenizer(text)["input_ids"] == ids[0].tolist()
  same_top = bool((found.argmax(-1) == want.argmax(-1)).all())
  furthest = float(np.abs(found - want).max())
  print(json.dumps({"same_ids": same_ids, "same_top": same_top, "furthest": furthest, "spread": float(want.std())}))

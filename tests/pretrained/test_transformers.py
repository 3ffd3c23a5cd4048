"""Parity with `transformers` on torch, both ways: its models here, ours there. Skipped, with a reason, without them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from adaptive.config import DataConfig
from adaptive.data.tokenizers import ByteTokenizer
from adaptive.pretrained import export
from adaptive.training.run import load_params, load_plan

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[parity]'")

SIZES = dict(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=256,
)
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
FAMILIES = {
  "llama": dict(model_type="llama", tie_word_embeddings=True),
  "llama_untied": dict(model_type="llama", tie_word_embeddings=False, head_dim=16),
  "llama3_rope": dict(model_type="llama", rope_scaling={"rope_theta": 50000.0, **LLAMA3}),
  "linear_rope": dict(model_type="llama", rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
  "mistral": dict(model_type="mistral", sliding_window=None),
  "qwen2": dict(model_type="qwen2"),
  "qwen3": dict(model_type="qwen3", head_dim=16),
}


def made(folder, model_type, dtype=torch.float32, **settings):
  """A random model of `transformers`, saved as it saves them, in several files."""
  config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
  with torch.no_grad():
    for parameter in model.parameters():  # norms and biases too
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(folder, max_shard_size="60KB")
  (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}), encoding="utf-8")
  return model


def ours(folder, *changes):
  plan = load_plan(str(folder), changes)
  return plan, load_params(plan, str(folder))[1]


def batch_of(tokens):
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return {"inputs": tokens.astype(np.int32), "segment_ids": np.ones_like(tokens, np.int32), "positions": positions}


TOKENS = np.random.default_rng(0).integers(0, 97, (2, 70))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_computes_the_same_here(family, tmp_path):
  model = made(tmp_path, **FAMILIES[family])
  with torch.no_grad():
    want = model(torch.tensor(TOKENS)).logits.numpy()
  plan, params = ours(tmp_path)
  assert len(list(tmp_path.glob("*.safetensors"))) > 1
  found = np.asarray(jax.jit(plan.model.apply)({"params": params}, batch_of(TOKENS)))
  np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-4)
  assert np.std(want) > 0.1


def written(tmp_path, family):
  """One of its models, read and written here: the run it was read into, its parameters, and the new folder."""
  there, here = tmp_path / "in", tmp_path / "out"
  there.mkdir()
  here.mkdir()
  made(there, **FAMILIES[family])
  plan, params = ours(there)
  export.write(here, plan.experiment.model, params, DataConfig(seq_len=256), ByteTokenizer(), shard_bytes=100_000)
  return plan, params, here


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral"])
def test_a_model_written_here_computes_the_same_there(family, tmp_path):
  plan, params, folder = written(tmp_path, family)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    found = model(torch.tensor(TOKENS)).logits.numpy()
  want = np.asarray(jax.jit(plan.model.apply)({"params": params}, batch_of(TOKENS)))
  np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-4)
  back, again = ours(folder)
  assert dataclasses.replace(back.experiment.model, head_dim=0) == dataclasses.replace(
    plan.experiment.model, head_dim=0
  )
  tiny.assert_trees_equal(again, params)


def test_its_tokenizer_reads_bytes_as_ours_does(tmp_path):
  folder = written(tmp_path, "llama")[-1]
  theirs, mine = transformers.AutoTokenizer.from_pretrained(folder), ByteTokenizer()
  for text in ("", "def f(x):\n  return x  # größer 中 \U0001f600\x00", "\r\n\t \x85 \xad"):
    assert theirs(text)["input_ids"] == [mine.bos, *mine.encode(text)]
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text

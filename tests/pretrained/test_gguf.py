"""GGUF files: tensors, whose rows of queries and keys llama.cpp interleaves, metadata and tokenizer."""

import folders
import gguf
import numpy as np
import pytest
import tiny
from gguf import quants

from adaptive.config import ConfigError
from adaptive.data.tokenizers import HuggingFaceTokenizer
from adaptive.pretrained.published import Published
from adaptive.training.run import load_params, load_plan

NAMES = {
  "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
CONFIG = {**folders.CONFIG, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
LETTERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdef0123456789", "ab", "12", "Ġ"]


def theirs(name):
  stem, suffix = name.rsplit(".", 1)
  if stem in NAMES:
    return f"{NAMES[stem]}.{suffix}"
  _, _, layer, kind = stem.split(".", 3)
  return f"blk.{layer}.{NAMES[kind]}.{suffix}"


def interleaved(rows, heads):
  """Row 2 i of a head is row i of its first half, row 2 i + 1 that of its second: where rotary pairs stand in GGUF."""
  out = np.empty_like(rows)
  for old, new in zip(np.split(rows, heads), np.split(out, heads)):
    half = len(old) // 2
    for i in range(half):
      new[2 * i], new[2 * i + 1] = old[i], old[half + i]
  return out


def write(path, weights, kind=None, arch="llama", pre="smollm"):
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(2)
  writer.add_context_length(64)
  writer.add_embedding_length(64)
  writer.add_feed_forward_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_rope_freq_base(20000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(LETTERS)
  writer.add_token_types([3] * 3 + [1] * (len(LETTERS) - 3))
  writer.add_token_merges(["a b", "1 2"])
  writer.add_eos_token_id(2)
  writer.add_chat_template(folders.CHAT)
  for name, tensor in weights.items():
    if arch == "llama" and "q_proj" in name:
      tensor = interleaved(tensor, 4)
    if arch == "llama" and "k_proj" in name:
      tensor = interleaved(tensor, 2)
    if kind is None or tensor.ndim == 1:
      writer.add_tensor(theirs(name), np.ascontiguousarray(tensor))
    else:
      writer.add_tensor(theirs(name), quants.quantize(tensor, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def params_of(path):
  plan = load_plan(str(path))
  assert plan.experiment.data.prefix == "template", "before a text stands what the model was published with"
  return plan.experiment.model, load_params(plan, str(path))[1]


def test_a_file_holds_what_the_folder_holds(tmp_path):
  weights = folders.tensors(CONFIG)
  config = {**CONFIG, "rms_norm_eps": 1e-5}
  want_config, want = params_of(folders.write(tmp_path / "model", config, weights))
  found_config, found = params_of(write(tmp_path / "model.gguf", weights))
  assert {**vars(found_config), "head_dim": 0} == {**vars(want_config), "head_dim": 0}
  assert found_config.head_size == want_config.head_size
  tiny.assert_trees_equal(found, want)


def test_quantised_tensors_are_what_they_stand_for(tmp_path):
  weights = folders.tensors(CONFIG)
  kind = gguf.GGMLQuantizationType.Q8_0
  rounded = {n: w if w.ndim == 1 else quants.dequantize(quants.quantize(w, kind), kind) for n, w in weights.items()}
  _, want = params_of(folders.write(tmp_path / "model", CONFIG, rounded))
  _, found = params_of(write(tmp_path / "model.gguf", weights, kind))
  tiny.assert_trees_equal(found, want)
  assert not np.array_equal(found["embedding"]["table"], weights["model.embed_tokens.weight"])


def test_other_architectures_have_biases_and_leave_rows_in_their_order(tmp_path):
  weights, config = folders.tensors(CONFIG), {**CONFIG, "model_type": "qwen2"}
  with pytest.raises(ConfigError, match=r"lacks the tensor model.layers.0.self_attn.q_proj.bias"):
    params_of(write(tmp_path / "without.gguf", weights, arch="qwen2"))
  rng = np.random.default_rng(1)
  for layer in range(2):
    for letter, size in (("q", 64), ("k", 32), ("v", 32)):
      weights[f"model.layers.{layer}.self_attn.{letter}_proj.bias"] = rng.normal(size=size).astype(np.float32)
  _, want = params_of(folders.write(tmp_path / "model", config, weights))
  _, found = params_of(write(tmp_path / "model.gguf", weights, arch="qwen2"))
  tiny.assert_trees_equal(found, want)


def test_the_tokenizer_cuts_digits_apart_where_the_file_says_so(tmp_path):
  weights = folders.tensors(CONFIG)
  smol = HuggingFaceTokenizer(str(write(tmp_path / "smol.gguf", weights)))
  plain = HuggingFaceTokenizer(str(write(tmp_path / "plain.gguf", weights, pre="gpt-2")))
  at = {letter: i for i, letter in enumerate(LETTERS)}
  assert plain.encode("ab12").tolist() == [at["ab"], at["12"]]
  assert smol.encode("ab12").tolist() == [at["ab"], at["1"], at["2"]]
  assert smol.decode(smol.encode("ab 12")) == "ab 12"
  assert smol.encode_marked("<|im_start|>ab").tolist() == [1, at["ab"]]
  assert smol.encode("<|im_start|>ab").tolist()[-1] == at["ab"]
  assert smol.prefix == ()


def test_what_the_metadata_says_of_a_conversation(tmp_path):
  model = Published(write(tmp_path / "model.gguf", folders.tensors(CONFIG)))
  assert model.chat_template == folders.CHAT
  assert model.stop_tokens == (2,)
  assert model.max_len == 64


def test_files_that_cannot_be_read_are_named(tmp_path):
  file = tmp_path / "model.gguf"
  file.write_bytes(b"not a gguf file at all, but long enough to have a header")
  with pytest.raises(ConfigError, match="is not a readable GGUF file"):
    load_plan(str(file))
  unknown = write(tmp_path / "unknown.gguf", folders.tensors(CONFIG), pre="somebody-else")
  with pytest.raises(ConfigError, match="'somebody-else' is not read from GGUF"):
    HuggingFaceTokenizer(str(unknown))

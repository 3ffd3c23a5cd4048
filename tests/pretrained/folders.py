"""Tiny published models on disk, made without any other library's model code."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

CONFIG = {
  "model_type": "llama",
  "vocab_size": 24,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-6,
  "rope_theta": 20000.0,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
  "eos_token_id": 1,
}
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def tensors(config=CONFIG, seed=0, dtype=np.float32) -> dict[str, np.ndarray]:
  """Random ones, under their published names and in their published shapes."""
  d, f = config["hidden_size"], config["intermediate_size"]
  h = config.get("head_dim") or d // config["num_attention_heads"]
  q, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
  shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
  if not config["tie_word_embeddings"]:
    shapes["lm_head.weight"] = (config["vocab_size"], d)
  for i in range(config["num_hidden_layers"]):
    layer = {
      "input_layernorm": (d,), "post_attention_layernorm": (d,), "self_attn.q_proj": (q, d), "self_attn.k_proj": (k, d),
      "self_attn.v_proj": (k, d), "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d),
      "mlp.down_proj": (d, f),
    }  # fmt: skip
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
  rng = np.random.default_rng(seed)
  return {name: (0.3 * rng.normal(size=shape) + (len(shape) == 1)).astype(dtype) for name, shape in shapes.items()}


def write(folder: pathlib.Path, config=CONFIG, weights=None, chat: str | None = None) -> pathlib.Path:
  """A folder with config, weights and a tokenizer of single letters."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
  save_file(tensors(config) if weights is None else weights, folder / "model.safetensors", metadata={"format": "pt"})
  names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrs \n"]
  tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
  tokenizer.add_special_tokens(names[:3])
  tokenizer.save(str(folder / "tokenizer.json"))
  settings = {"chat_template": chat} if chat else {}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
  return folder

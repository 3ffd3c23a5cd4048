"""What a published model's `config.json` says, as the backbone's config, and back.

Families: Llama (with SmolLM), Mistral, Qwen2 and Qwen3, dense. Anything in a config that would change what is computed
and that the backbone does not know is refused by name, never passed over.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptive.config import ConfigError, ModelConfig, RopeScaling, require

_FAMILIES = {
  "llama": {},
  "mistral": {},
  "qwen2": dict(qkv_bias=True),
  "qwen3": dict(qk_norm=True),
}
_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
# Settings that must be as given, where they are there at all.
_ONLY = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "quantization_config": (None,),
  "partial_rotary_factor": (1.0, None),
}
_SIZES = {  # ours: Hugging Face's
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "d_model": "hidden_size",
  "d_ff": "intermediate_size",
  "num_heads": "num_attention_heads",
}
_DEFAULT_THETA = 10000.0


def to_model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
  """The backbone's config.

  Args:
    config: a `config.json`. where: what messages call it.

  Raises:
    ConfigError: no family of ours, a field is missing, or one asks for what the backbone does not compute.
  """
  family = config.get("model_type")
  require(family in _FAMILIES, f"{where}: model_type={family!r} is none of {', '.join(_FAMILIES)}")
  for name, allowed in _ONLY.items():
    value = config.get(name, allowed[0])
    require(value in allowed, f"{where}: {name}={value!r} is not supported, only {allowed[0]!r}")
  for name in _SIZES.values():
    require(isinstance(config.get(name), int), f"{where}: {name} is missing or no integer")
  require("rms_norm_eps" in config, f"{where}: rms_norm_eps is missing")
  theta, scaling = _rope(config, where)
  return ModelConfig(
    **{ours: config[theirs] for ours, theirs in _SIZES.items()},
    num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
    head_dim=config.get("head_dim") or 0,
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=config["rms_norm_eps"],
    tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    **_FAMILIES[family],
  )


def max_len(config: Mapping[str, Any]) -> int:
  """The longest row that the model computes as the backbone does; 0 where the config does not say.

  Mistral's sliding window makes no difference to rows that fit into it, and has no counterpart here.
  """
  lengths = [config.get("max_position_embeddings"), config.get("sliding_window")]
  if config.get("model_type") != "mistral":
    lengths.pop()
  return min((int(length) for length in lengths if length), default=0)


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
  """Base and scaling of the rotary frequencies, from either of the two places where configs keep them."""
  found = config.get("rope_parameters") or {}
  theta = float(found.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA)
  scaling = config.get("rope_scaling") or found
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind == "default":
    return theta, RopeScaling()
  require(kind in ("linear", "llama3"), f"{where}: rotary scaling {kind!r} is not supported, only linear and llama3")
  try:
    if kind == "linear":
      return theta, RopeScaling("linear", float(scaling["factor"]))
    names = ("factor", "low_freq_factor", "high_freq_factor")
    original = int(scaling["original_max_position_embeddings"])
    return theta, RopeScaling("llama3", *(float(scaling[name]) for name in names), original)
  except KeyError as error:
    raise ConfigError(f"{where}: rotary scaling {kind!r} without {error.args[0]}") from None


def to_hugging_face(config: ModelConfig, max_len: int, bos: int, eos: int) -> dict[str, Any]:
  """A `config.json` with which `transformers` builds the same model.

  Raises:
    ConfigError: no published family computes what this config does.
  """
  require(not (config.qkv_bias and config.qk_norm), "no published family has model.qkv_bias and model.qk_norm both")
  family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  found = {
    "architectures": [_ARCHITECTURES[family]],
    "model_type": family,
    **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_size,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling(config.rope_scaling),
    "tie_word_embeddings": config.tied_embeddings,
    "max_position_embeddings": max_len,
    "initializer_range": config.init_std,
    "attention_dropout": 0.0,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "torch_dtype": config.param_dtype,
    "use_cache": True,
  }
  return found | {"llama": dict(attention_bias=False, mlp_bias=False), "qwen3": dict(attention_bias=False)}.get(
    family, {}
  )


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
  if scaling.kind == "none":
    return None
  found = {"rope_type": scaling.kind, **dataclasses.asdict(scaling)}
  del found["kind"]
  original = found.pop("original_max_len")
  if scaling.kind == "linear":
    return {"rope_type": "linear", "factor": scaling.factor}
  return found | {"original_max_position_embeddings": original}

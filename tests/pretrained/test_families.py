"""Published configs as ours: defaults that differ, and what is refused by name."""

import pytest
from folders import CONFIG

from adaptive.config import ConfigError, ModelConfig, RopeScaling
from adaptive.pretrained import families

LLAMA3 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def read(**changes):
  return families.to_model_config({k: v for k, v in {**CONFIG, **changes}.items() if v != "absent"}, "here")


def test_fields_go_where_they_belong():
  assert read() == ModelConfig(
    vocab_size=24, num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, rope_theta=20000.0, norm_eps=1e-6
  )  # fmt: skip
  assert read(num_key_value_heads="absent").num_kv_heads == 4
  assert read(tie_word_embeddings="absent").tied_embeddings is False, "transformers' own default"
  assert read(head_dim=8).head_size == 8
  assert read(model_type="qwen2").qkv_bias
  assert read(model_type="qwen3").qk_norm


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_found_in_both_places(place):
  found = read(**{place: {**LLAMA3, "rope_theta": 5e5}, "rope_theta": 5e5})
  assert found.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
  assert found.rope_theta == 5e5
  assert read(**{place: {"type": "linear", "factor": 2}}).rope_scaling == RopeScaling("linear", 2.0)
  assert read(**{place: {"rope_type": "default"}}).rope_scaling == RopeScaling()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(model_type="gpt2"), "model_type='gpt2' is none of llama, mistral, qwen2, qwen3"),
    (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(use_sliding_window=True), "use_sliding_window=True"),
    (dict(quantization_config={"bits": 4}), "quantization_config="),
    (dict(hidden_size="absent"), "hidden_size is missing"),
    (dict(rms_norm_eps="absent"), "rms_norm_eps is missing"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rotary scaling 'yarn' is not supported"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "rotary scaling 'llama3' without original_max"),
  ],
)
def test_what_the_backbone_does_not_compute_is_refused_by_name(changes, message):
  with pytest.raises(ConfigError, match=f"here: {message}"):
    read(**changes)


def test_mistral_s_window_bounds_its_rows():
  lengths = dict(max_position_embeddings=32768)
  assert families.max_len({"model_type": "mistral", "sliding_window": 4096, **lengths}) == 4096
  assert families.max_len({"model_type": "mistral", "sliding_window": None, **lengths}) == 32768
  assert families.max_len({"model_type": "qwen2", "sliding_window": 4096, **lengths}) == 32768
  assert families.max_len({"model_type": "llama"}) == 0


@pytest.mark.parametrize(
  "config",
  [
    ModelConfig(),
    ModelConfig(qk_norm=True, head_dim=16),
    ModelConfig(qkv_bias=True, tied_embeddings=False),
    ModelConfig(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ModelConfig(rope_scaling=RopeScaling("linear", 4.0)),
  ],
)
def test_ours_as_theirs_and_back(config):
  found = families.to_model_config(families.to_hugging_face(config, 128, 0, 1), "there")
  assert found.head_size == config.head_size
  assert {**vars(found), "head_dim": 0} == {**vars(config), "head_dim": 0}


def test_a_model_of_no_published_family_is_refused():
  with pytest.raises(ConfigError, match="no published family"):
    families.to_hugging_face(ModelConfig(qk_norm=True, qkv_bias=True), 128, 0, 1)

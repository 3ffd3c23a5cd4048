"""Published models on disk: where tensors end up, what is refused, and how they stand where a run may."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from adaptive.config import ConfigError, MeshConfig
from adaptive.data.tokenizers import make_tokenizer
from adaptive.methods import METHODS
from adaptive.pretrained import chat, hub
from adaptive.pretrained.published import Published, is_published
from adaptive.training import extraction, run
from adaptive.training.run import load_params, load_plan


def read(folder, *changes):
  plan = load_plan(str(folder), changes)
  return plan, load_params(plan, str(folder))[1]


def test_every_tensor_is_where_its_name_says(tmp_path):
  weights = folders.tensors()
  plan, params = read(folders.write(tmp_path / "model", weights=weights))
  np.testing.assert_array_equal(params["embedding"]["table"], weights["model.embed_tokens.weight"])
  query = np.asarray(params["layers"]["attention"]["query"])  # l d k g h
  np.testing.assert_array_equal(
    query[1, :, 1, 0], weights["model.layers.1.self_attn.q_proj.weight"][2 * 4 : 3 * 4].T, "head 2 = (k 1, g 0)"
  )
  np.testing.assert_array_equal(params["layers"]["mlp"]["down"][0, 0], weights["model.layers.0.mlp.down_proj.weight"].T)
  assert plan.experiment.data.seq_len == 64
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(w.size for w in weights.values())


def test_devices_of_a_mesh_hold_their_parts(tmp_path):
  """8 devices, parameters over all three axes; each part is read by itself."""
  config = {**folders.CONFIG, "tie_word_embeddings": False}
  folder = folders.write(tmp_path / "model", config, folders.tensors(config))
  _, whole = read(folder)
  experiment = load_plan(str(folder), ["model.ff_groups=2"]).experiment
  mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  plan = run.plan(METHODS["dense"], dataclasses.replace(experiment, mesh=mesh), training=False)
  params = load_params(plan, str(folder))[1]
  query = params["layers"]["attention"]["query"]
  assert query.sharding.shard_shape(query.shape) == (2, 8, 1, 2, 4)
  np.testing.assert_array_equal(query, whole["layers"]["attention"]["query"])
  gate = np.asarray(params["layers"]["mlp"]["gate"])
  np.testing.assert_array_equal(gate.reshape(2, 16, 1, 24), whole["layers"]["mlp"]["gate"])
  np.testing.assert_array_equal(params["embedding"]["head"], whole["embedding"]["head"])


def test_bfloat16_files_are_read_exactly_and_stay_so_on_request(tmp_path):
  weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in folders.tensors().items()}
  folder = folders.write(tmp_path / "model", weights=weights)
  table = read(folder)[1]["embedding"]["table"]
  assert table.dtype == jnp.float32
  np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"].astype(np.float32))
  table = read(folder, "model.param_dtype=bfloat16")[1]["embedding"]["table"]
  assert table.dtype == jnp.bfloat16
  np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda w: w.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
    (lambda w: w.update({"model.norm.weight": np.zeros(8, np.float32)}), r"model.norm.weight has the shape \(8,\)"),
    (lambda w: w.update({"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}), "does not account for"),
  ],
)
def test_tensors_that_do_not_fit_the_config_are_named(damage, message, tmp_path):
  weights = folders.tensors()
  damage(weights)
  with pytest.raises(ConfigError, match=message):
    read(folders.write(tmp_path / "model", weights=weights))


def test_damaged_and_missing_files_are_named(tmp_path):
  folder = folders.write(tmp_path / "model")
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
    read(folder)
  file.unlink()
  with pytest.raises(ConfigError, match="holds neither model.safetensors nor"):
    read(folder)
  index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
  with pytest.raises(ConfigError, match="lacks model-00001-of-00002.safetensors"):
    read(folder)


def test_names_that_are_nothing_are_refused(tmp_path):
  assert not is_published(str(tmp_path))
  with pytest.raises(ConfigError, match="there is no folder or file"):
    hub.resolve(str(tmp_path / "nothing" / "here"))
  with pytest.raises(ConfigError, match="neither a Hugging Face folder"):
    hub.resolve(str(tmp_path))
  (tmp_path / "small.gguf").touch()
  with pytest.raises(ConfigError, match="name the file in it, .*small.gguf"):
    hub.resolve(str(tmp_path))
  folder = folders.write(tmp_path / "model")
  assert hub.resolve(str(folder)) == str(folder)
  with pytest.raises(ConfigError, match="which has no steps"):
    load_params(load_plan(str(folder)), str(folder), step=3)
  with pytest.raises(ConfigError, match="part of what was trained"):
    load_plan(str(folder), ["model.num_layers=1"])


def test_in_and_out_and_in_is_the_same_to_the_bit(tmp_path):
  folder = folders.write(tmp_path / "model", chat=folders.CHAT)
  extraction.extract(str(folder), None, "full", str(tmp_path / "out"), hugging_face=True)
  first, second = Published(folder), Published(tmp_path / "out")
  assert second.chat_template == folders.CHAT
  assert second.max_len == first.max_len
  assert second.stop_tokens == first.stop_tokens == (1,)
  tiny.assert_trees_equal(read(tmp_path / "out")[1], read(folder)[1])
  a, b = (make_tokenizer(load_plan(str(path)).experiment.data) for path in (folder, tmp_path / "out"))
  assert a.encode_marked("<|im_start|>abc").tolist() == b.encode_marked("<|im_start|>abc").tolist() == [1, 3, 4, 5]
  with pytest.raises(ConfigError, match="is not empty"):
    extraction.extract(str(folder), None, "full", str(tmp_path / "out"), hugging_face=True)


def test_a_message_is_rendered_and_a_failing_template_is_told():
  message = [{"role": "user", "content": "abc"}]
  assert chat.render(folders.CHAT, message, {}) == "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant"
  with pytest.raises(ConfigError, match="chat template fails: no"):
    chat.render("{{ raise_exception('no') }}", message, {})


@pytest.mark.slow
def test_reading_holds_one_tensor_beside_the_model(tmp_path):
  """Of 414 MB in float32, the largest tensor 131: at most one and a half of it beside the model itself."""
  paths = []
  for name, (d, f, v, layers) in {"small": (256, 512, 512, 2), "large": (1024, 2816, 32000, 6)}.items():
    sizes = dict(hidden_size=d, intermediate_size=f, vocab_size=v, num_hidden_layers=layers)
    config = {**folders.CONFIG, **sizes, "num_attention_heads": 8}
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in folders.tensors(config).items()}
    paths.append(folders.write(tmp_path / name, config, weights))
  command = [sys.executable, pathlib.Path(__file__).with_name("load_in_one.py"), *paths]
  environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
  model, rose = map(int, done.stdout.split())
  assert model > 400e6
  assert rose < model + 1.5 * 32000 * 1024 * 4

import dataclasses
import json

import pytest

from adaptive import config_dict, methods
from adaptive.config import ConfigError, Experiment, ModelConfig


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  sizes: tuple[int, ...] = ()
  rate: float = 0.5
  limit: int | None = None


def parse(**changes):
  return config_dict.from_config_dict(changes, MethodConfig)


def saved(**method):
  return json.loads(config_dict.to_json(Experiment(method=MethodConfig(**method)), "some"))


@pytest.mark.parametrize(("changes", "message"), [
  (dict(num_layers=0), "model.num_layers=0 must be at least 1"),
  (dict(vocab_size=-1), "model.vocab_size=-1 must be at least 1"),
  (dict(d_model=30, num_heads=4), "model.d_model=30 is not divisible by model.num_heads=4; set model.head_dim"),
  (dict(head_dim=3), "size of a head, 3, must be even"),
  (dict(d_model=12, num_heads=4), "size of a head, 3, must be even"),
  (dict(num_heads=4, num_kv_heads=3), "model.num_heads=4 is not divisible by model.num_kv_heads=3"),
  (dict(head_dim=-2), "model.head_dim=-2 must be at least 0"),
  (dict(scan_unroll=-1), "model.scan_unroll=-1 must be at least 0"),
  (dict(rope_theta=0.0), "model.rope_theta=0.0 must be more than 0"),
  (dict(d_ff=384, ff_groups=5), "model.d_ff=384 is not divisible by model.ff_groups=5"),
])  # fmt: skip
def test_an_impossible_model_is_refused_in_one_line(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    ModelConfig(**changes)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
  ({"data": {"seq_len": 1}}, "data.seq_len=1 must be at least 2"),
  ({"data": {"source": "files"}}, "needs data.path"),
  ({"data": {"source": "tfds"}}, "needs data.tfds_name"),
  ({"data": {"validation_fraction": 1.0}}, "must lie between 0 and 1"),
  ({"training": {"steps": 0}}, "training.steps=0 must be at least 1"),
  ({"training": {"eval_every": -1}}, "training.eval_every=-1 must be at least 0"),
  ({"training": {"optimizer": {"learning_rate": 0}}}, "learning_rate=0.0 must be more than 0"),
  ({"training": {"optimizer": {"decay_fraction": 1.5}}}, "decay_fraction=1.5 must be at least 0 and at most 1"),
  ({"evaluation": {"rows": 0}}, "evaluation.rows=0 must be at least 1"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(fields, message):
  with pytest.raises(ConfigError, match=message):
    parse(**fields)


@pytest.mark.parametrize(("fields", "message"), [
  ({"modle": {}}, "unknown config field modle; did you mean model?"),
  ({"model": {"num_layer": 3}}, "unknown config field model.num_layer; did you mean model.num_layers?"),
  ({"training": {"optimizer": {"b3": 1}}}, "unknown config field training.optimizer.b3; did you mean"),
  ({"method": {"size": (1,)}}, "unknown config field method.size; did you mean method.sizes?"),
  ({"model": {"rope_scaling": {"factr": 2}}}, "did you mean model.rope_scaling.factor?"),
])  # fmt: skip
def test_a_misspelt_field_is_refused_with_the_nearest_known_one(fields, message):
  with pytest.raises(ConfigError) as error:
    parse(**fields)
  assert message in str(error.value)


@pytest.mark.parametrize(("fields", "message"), [
  ({"model": {"num_layers": 3.0}}, "model.num_layers=3.0 must be of type int"),
  ({"model": {"num_layers": True}}, "model.num_layers=True must be of type int"),
  ({"model": {"dtype": "float16"}}, "model.dtype='float16' is not one of 'float32', 'bfloat16'"),
  ({"training": {"tensorboard": 1}}, "training.tensorboard=1 must be of type bool"),
  ({"data": {"path": 3}}, "data.path=3 must be of type str"),
  ({"method": {"rate": "fast"}}, "method.rate='fast' must be of type float"),
  ({"method": {"rate": True}}, "method.rate=True must be of type float"),
  ({"method": {"sizes": 3}}, "method.sizes=3 must be a tuple"),
  ({"method": {"sizes": (1, "2")}}, "method.sizes='2' must be of type int"),
])  # fmt: skip
def test_a_value_of_the_wrong_type_is_refused(fields, message):
  with pytest.raises(ConfigError) as error:
    parse(**fields)
  assert message in str(error.value)


def test_values_are_converted_to_what_the_fields_declare():
  method = parse(method={"name": "some", "sizes": [1, 2], "rate": 1, "limit": 4}).method
  assert method == MethodConfig(sizes=(1, 2), rate=1.0, limit=4)
  assert isinstance(method.rate, float)
  assert parse(method={"limit": None}).method.limit is None
  hash(parse(model={"rope_scaling": {"kind": "linear", "factor": 2}}))


def test_a_config_survives_json_and_config_dict():
  experiment = Experiment(
    method=MethodConfig(sizes=(1, 2), limit=3), seed=7, model=ModelConfig(num_layers=2, tied_embeddings=False)
  )
  text = config_dict.to_json(experiment, "some")
  assert json.loads(text)["method"]["name"] == "some"
  assert config_dict.from_config_dict(json.loads(text), MethodConfig) == experiment
  assert config_dict.from_config_dict(config_dict.to_config_dict(experiment, "some"), MethodConfig) == experiment


def test_a_config_dict_is_locked_against_unknown_fields_and_types():
  config = config_dict.to_config_dict(Experiment(method=MethodConfig()), "some")
  with pytest.raises(AttributeError):
    config.model.num_layer = 3
  with pytest.raises(TypeError):
    config.model.num_layers = "three"


def test_differences_name_the_fields_that_matter_on_resume():
  old, new = saved(), saved(sizes=(1,))
  new["model"]["num_layers"] = 9
  new["training"]["optimizer"]["learning_rate"] = 0.1
  del new["data"]["seq_len"]
  assert config_dict.differences(old, new) == [
    "data.seq_len: 256 -> None",
    "method.sizes: [] -> [1]",
    "model.num_layers: 6 -> 9",
    "training.optimizer.learning_rate: 0.003 -> 0.1",
  ]
  assert config_dict.differences(old, saved()) == []


def test_fields_that_change_nothing_learned_may_differ_on_resume():
  old, new = saved(), saved()
  new["mesh"]["data"], new["training"]["log_every"], new["evaluation"]["rows"] = 4, 1, 8
  assert config_dict.differences(old, new) == []


@pytest.mark.parametrize("name", ["mixture_of_depths", "mixture_of_recursions"])
def test_dials_that_nothing_trains_may_change_after_training(name):
  experiment = Experiment(method=methods.METHODS[name].Config())
  before = json.loads(config_dict.to_json(experiment, name))
  changes = ["method.score_shifts=(-0.5, 0.5)", "method.capacity_scales=(0.75,)"]
  found = methods.parse_config(config_dict.changed(before, changes))[1].method
  assert (found.score_shifts, found.capacity_scales) == ((-0.5, 0.5), (0.75,))
  with pytest.raises(ConfigError, match="method.gate is part of what was trained"):
    config_dict.changed(before, ["method.gate=tanh"])


def test_a_shallow_model_is_unrolled_and_a_deep_one_scanned():
  assert [ModelConfig().unroll(n) for n in (0, 3, 8, 9)] == [1, 3, 8, 1]
  assert ModelConfig(remat="dots").unroll(3) == 1
  assert ModelConfig(remat="dots", scan_unroll=2).unroll(3) == 2

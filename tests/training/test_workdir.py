import copy
import json

import pytest

from adaptive.config import ConfigError
from adaptive.methods import default_config
from adaptive.training import workdir

CONFIG = {"seed": 0, "model": {"d_model": 128, "d_ff": 384, "num_heads": 4}, "evaluation": {"rows": 256}}


def config(**model):
  return json.dumps({**CONFIG, "model": {**CONFIG["model"], **model}})


def test_first_use_writes_config_and_versions(tmp_path):
  folder = workdir.open_workdir(tmp_path / "runs" / "x", config())
  assert folder == tmp_path / "runs" / "x"
  assert workdir.load_config(folder) == CONFIG
  found = json.loads((folder / "versions.json").read_text())
  assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "adaptive", "platform"} < set(found)
  assert found["device_kind"] == "cpu"
  assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "versions.json"]


def test_same_config_opens_again_and_keeps_the_files(tmp_path):
  workdir.open_workdir(tmp_path, config())
  (tmp_path / "versions.json").write_text("{}")
  (tmp_path / "metrics.jsonl").write_text("")
  workdir.open_workdir(tmp_path, config())
  assert (tmp_path / "versions.json").read_text() == "{}"


def test_fields_that_change_nothing_learned_may_differ(tmp_path):
  workdir.open_workdir(tmp_path, config())
  workdir.open_workdir(tmp_path, json.dumps({**CONFIG, "evaluation": {"rows": 8}}))
  assert workdir.load_config(tmp_path) == CONFIG


def test_another_config_is_refused_and_the_fields_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  workdir.open_workdir("runs/x", config())
  with pytest.raises(ConfigError) as caught:
    workdir.open_workdir("runs/x", config(d_model=256))
  assert (
    str(caught.value)
    == "runs/x holds another config: model.d_model: 128 -> 256; choose another --workdir, or --change_config"
  )
  assert workdir.load_config("runs/x") == CONFIG


def test_at_most_three_fields_are_named(tmp_path):
  workdir.open_workdir(tmp_path, config())
  other = {"seed": 1, "model": {"d_model": 256, "d_ff": 768, "num_heads": 8}}
  with pytest.raises(ConfigError) as caught:
    workdir.open_workdir(tmp_path, json.dumps(other))
  message = str(caught.value)
  assert "model.d_ff: 384 -> 768; model.d_model: 128 -> 256; model.num_heads: 4 -> 8 (and 1 more);" in message
  assert "\n" not in message


def test_a_config_may_be_changed_where_told_and_where_it_can(tmp_path, capfd):
  saved = {**CONFIG, "training": {"steps": 10}, "data": {"batch_size": 8}}
  workdir.open_workdir(tmp_path, json.dumps(saved))
  longer = {**saved, "training": {"steps": 20}}
  with pytest.raises(ConfigError, match="steps: 10 -> 20; choose another --workdir, or --change_config"):
    workdir.open_workdir(tmp_path, json.dumps(longer))
  folder = workdir.open_workdir(tmp_path, json.dumps(longer), change=True)
  assert workdir.load_config(tmp_path) == saved
  workdir.keep_config(folder, json.dumps(longer))
  assert "changed: training.steps: 10 -> 20" in capfd.readouterr().err
  assert workdir.load_config(tmp_path) == longer
  for fixed in ({"data": {"batch_size": 4}}, {"seed": 1}, {"model": {"d_model": 64}}):
    with pytest.raises(ConfigError, match=r"holds another config: .*; which cannot be changed within a run"):
      workdir.open_workdir(tmp_path, json.dumps({**longer, **fixed}), change=True)
  assert workdir.load_config(tmp_path) == longer


def test_a_workdir_in_use_is_refused(tmp_path):
  """Locks belong to open files, so one process can stand for two."""
  refused = pytest.raises(ConfigError, match=r"is in use by another run \(process \d+ on ")
  with workdir.in_use(tmp_path), refused, workdir.in_use(tmp_path):
    pass
  with workdir.in_use(tmp_path):
    pass


def test_foreign_folder_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("precious")
  with pytest.raises(ConfigError, match=r"is not empty and holds no config\.json; choose another --workdir"):
    workdir.open_workdir(tmp_path, config())
  assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_a_run_killed_at_birth_is_accepted(tmp_path):
  (tmp_path / ".config.json.tmp").write_text('{"seed"')
  workdir.open_workdir(tmp_path, config())
  assert workdir.load_config(tmp_path) == CONFIG


def test_path_that_cannot_be_a_folder(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"^cannot use .*file/x as workdir: Not a directory$"):
    workdir.open_workdir(tmp_path / "file" / "x", config())
  with pytest.raises(ConfigError, match="mounted file system"):
    workdir.open_workdir("gs://bucket/x", config())


def test_load_config_of_what_is_no_workdir(tmp_path):
  with pytest.raises(ConfigError, match=r"is not a workdir: it holds no config\.json$"):
    workdir.load_config(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text("{\n'seed'")
  with pytest.raises(ConfigError, match=r"config\.json is not valid JSON \(line 2\)"):
    workdir.load_config(tmp_path)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
  assert workdir.open_workdir(tmp_path / "x", config()) == tmp_path / "x"
  assert not (tmp_path / "x").exists()


def test_a_field_that_came_after_the_workdir_counts_as_its_default(tmp_path):
  wanted = default_config("sorted_net").to_dict()
  older = copy.deepcopy(wanted)
  del older["method"]["listed"], older["model"]["scan_unroll"]
  folder = workdir.open_workdir(tmp_path / "run", json.dumps(older))
  assert workdir.open_workdir(folder, json.dumps(wanted)) == folder
  wanted["model"]["scan_unroll"] = 3
  with pytest.raises(ConfigError, match=r"model\.scan_unroll: 0 -> 3"):
    workdir.open_workdir(folder, json.dumps(wanted))

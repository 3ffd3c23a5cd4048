"""Where documents come from, which are held out, and what is refused."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from adaptive.config import ConfigError, DataConfig
from adaptive.data import sources
from adaptive.data.sources import load_documents


def write(root, **files):
  for name, content in files.items():
    path = root / name.replace("__", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def files_config(path, **fields):
  return DataConfig(source="files", path=str(path), **fields)


def error_of(config):
  with pytest.raises(ConfigError) as caught:
    load_documents(config)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def names(documents):
  return [document.name for document in documents]


def test_stdlib_is_there_and_the_same_each_time():
  corpus, again = load_documents(DataConfig()), load_documents(DataConfig())
  assert corpus == again
  assert len(corpus.train) > 100
  assert len(corpus.validation) > 5
  assert sum(len(d.text) for d in corpus.train) > 3e6
  assert all(d.text and d.name.endswith(".py") for d in corpus.train + corpus.validation)
  assert {"json/decoder.py", "argparse.py"} <= set(names(corpus.train + corpus.validation))
  skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "tkinter", "lib2to3"}
  assert not any(skipped & set(pathlib.PurePosixPath(n).parts[:-1]) for n in names(corpus.train + corpus.validation))
  assert "Python " + ".".join(map(str, sys.version_info[:3])) in corpus.description
  assert "\n" not in corpus.description


def test_files_fall_on_a_side_by_the_hash_of_their_name(tmp_path):
  write(tmp_path, **{f"sub__f{i}.txt": f"text {i}" for i in range(40)})
  corpus = load_documents(files_config(tmp_path, validation_fraction=0.25))
  held_out = [f"sub/f{i}.txt" for i in range(40) if hashlib.sha256(f"sub/f{i}.txt".encode()).digest()[0] < 64]
  assert 0 < len(held_out) < 40
  assert names(corpus.validation) == sorted(held_out)
  assert sorted(names(corpus.train) + held_out) == sorted(f"sub/f{i}.txt" for i in range(40))


def test_hidden_and_empty_files_are_left_out(tmp_path):
  write(tmp_path, **{"a.txt": "a\n" * 50, "b.txt": "", ".hidden": "no", ".git__config": "no", "c__d.md": "d\n" * 50})
  corpus = load_documents(files_config(tmp_path))
  assert set(names(corpus.train + corpus.validation)) == {"a.txt", "c/d.md"}


def test_glob_names_are_relative_to_its_fixed_part(tmp_path):
  write(tmp_path, **{"x.txt": "x\n" * 50, "deep__er__y.txt": "y\n" * 50, "z.md": "z"})
  corpus = load_documents(files_config(tmp_path / "**" / "*.txt"))
  assert set(names(corpus.train + corpus.validation)) == {"x.txt", "deep/er/y.txt"}


def test_relative_and_absolute_paths_give_the_same_corpus(tmp_path, monkeypatch):
  write(tmp_path, **{f"c__f{i}.txt": f"text {i}\n" * 9 for i in range(9)})
  monkeypatch.chdir(tmp_path)
  prints = {load_documents(files_config(p)).fingerprint for p in ("c", "./c", tmp_path / "c", "c/*.txt", "c/**/*.txt")}
  assert len(prints) == 1


def test_fingerprint_sees_names_contents_and_split_but_not_the_order_of_the_file_system(tmp_path, monkeypatch):
  write(tmp_path, **{f"f{i}.txt": f"text {i}\n" * 9 for i in range(9)})
  base = load_documents(files_config(tmp_path))
  walk = os.walk

  def backwards(*args, **kwargs):
    for folder, subfolders, files in walk(*args, **kwargs):
      yield folder, subfolders, files[::-1]

  monkeypatch.setattr(os, "walk", backwards)
  assert load_documents(files_config(tmp_path)) == base
  assert load_documents(files_config(tmp_path, validation_fraction=0.5)).fingerprint != base.fingerprint
  (tmp_path / "f0.txt").rename(tmp_path / "g0.txt")
  renamed = load_documents(files_config(tmp_path)).fingerprint
  (tmp_path / "g0.txt").write_text("other")
  assert len({base.fingerprint, renamed, load_documents(files_config(tmp_path)).fingerprint}) == 3


def test_a_single_file_is_cut_at_a_line(tmp_path):
  text = "".join(f"line {i}\n" for i in range(100))
  write(tmp_path, **{"one.txt": text})
  corpus = load_documents(files_config(tmp_path / "one.txt", validation_fraction=0.1))
  (train,), (validation,) = corpus.train, corpus.validation
  assert train.text + validation.text == text
  assert train.text.endswith("\n")
  assert 8 <= validation.text.count("\n") <= 12
  assert train.name == validation.name == "one.txt"


def test_few_files_on_one_side_are_all_cut(tmp_path):
  write(tmp_path, **{"a.txt": "abc\ndef\n" * 10, "b.txt": "x", "c.txt": "one long line" * 10})
  corpus = load_documents(files_config(tmp_path))
  # Held out are the ends of two files; a file of one character stays whole.
  assert names(corpus.train) == ["a.txt", "b.txt", "c.txt"]
  assert names(corpus.validation) == ["a.txt", "c.txt"]
  assert corpus.validation[0].text == "def\n"
  assert corpus.validation[1].text == ("one long line" * 10)[-len(corpus.validation[1].text) :]


def test_bytes_are_read_as_they_are(tmp_path):
  write(tmp_path, **{"a.txt": "é\r\nb\r\n".encode()})
  corpus = load_documents(files_config(tmp_path, validation_fraction=0.5))
  assert corpus.train[0].text + corpus.validation[0].text == "é\r\nb\r\n"


def test_undecodable_file_is_named_with_its_offset_or_skipped(tmp_path, caplog):
  write(tmp_path, **{"good.txt": "good\n" * 20, "bad.txt": b"abc\xff"})
  message = error_of(files_config(tmp_path))
  assert "bad.txt" in message
  assert "offset 3" in message
  with caplog.at_level("WARNING"):
    corpus = load_documents(files_config(tmp_path, bad_files="skip"))
  assert names(corpus.train) == ["good.txt"]
  assert any("bad.txt" in record.getMessage() for record in caplog.records)


def test_bad_folders_and_files(tmp_path):
  assert "no such folder" in error_of(files_config(tmp_path / "missing"))
  assert "no such folder" in error_of(files_config(tmp_path / "*.txt"))
  assert "holds no files" in error_of(files_config(tmp_path))
  write(tmp_path, **{"empty.txt": "", "empty2.txt": ""})
  assert "all 2 files are empty" in error_of(files_config(tmp_path))
  write(tmp_path, **{"empty.txt": "x"})
  assert "too little text" in error_of(files_config(tmp_path))
  (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
  assert "cannot read" in error_of(files_config(tmp_path))
  assert "link.txt" in error_of(files_config(tmp_path / "*.txt"))


def test_a_file_that_vanished_is_refused_or_skipped(tmp_path, caplog):
  """A broken link is one that was there when the folder was listed and cannot be opened."""
  write(tmp_path, **{"good.txt": "good\n" * 20})
  (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
  message = error_of(files_config(tmp_path))
  assert "gone.txt': No such file" in message
  assert "data.bad_files='skip' leaves such files out" in message
  with caplog.at_level("WARNING"):
    assert names(load_documents(files_config(tmp_path, bad_files="skip")).train) == ["good.txt"]
  assert any("Skipped: cannot read" in r.getMessage() and "gone.txt" in r.getMessage() for r in caplog.records)


def test_empty_files_are_counted_and_one_is_named(tmp_path, caplog):
  write(tmp_path, **{"good.txt": "good\n" * 20, "a.txt": "", "b.txt": ""})
  with caplog.at_level("WARNING"):
    load_documents(files_config(tmp_path))
  (record,) = caplog.records
  assert record.getMessage() == f"Left out: 2 empty files below {tmp_path}, such as a.txt"


def test_unreadable_file_is_named(tmp_path, monkeypatch):
  write(tmp_path, **{"secret.txt": "x"})

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  message = error_of(files_config(tmp_path))
  assert "secret.txt" in message
  assert "Permission denied" in message


def test_interpreter_without_source_code_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  assert "data.source='stdlib'" in error_of(DataConfig())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder with the TFDS set `tiny_notes`, prepared without TensorFlow."""
  import tensorflow_datasets as tfds

  class TinyNotes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {"text": tfds.features.Text(), "raw": np.int32}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
      return {"train": self._generate_examples(range(9)), "validation": self._generate_examples(range(9, 12))}

    def _generate_examples(self, numbers):
      for i in numbers:
        yield i, {"text": f"nöte {i}", "raw": i}

  folder = tmp_path_factory.mktemp("tfds")
  builder = TinyNotes(data_dir=str(folder), file_format="array_record")
  builder.download_and_prepare(file_format="array_record")
  return folder


def tfds_config(prepared, **fields):
  return DataConfig(source="tfds", **{"tfds_name": "tiny_notes", "tfds_data_dir": str(prepared), **fields})


def test_tfds_reads_both_splits(prepared):
  corpus = load_documents(tfds_config(prepared))
  assert {d.text for d in corpus.train} == {f"nöte {i}" for i in range(9)}
  assert {d.text for d in corpus.validation} == {f"nöte {i}" for i in range(9, 12)}
  assert corpus == load_documents(tfds_config(prepared))
  assert "12 documents" in corpus.description


def test_tfds_takes_parts_of_splits(prepared):
  corpus = load_documents(tfds_config(prepared, tfds_train_split="train[:5]", tfds_validation_split="train[5:]"))
  assert (len(corpus.train), len(corpus.validation)) == (5, 4)


def test_tfds_errors_are_one_line_and_name_the_field(prepared, tmp_path):
  assert "data.tfds_name='no_such_set'" in error_of(tfds_config(prepared, tfds_name="no_such_set"))
  assert "is not prepared" in error_of(tfds_config(prepared, tfds_data_dir=str(tmp_path)))
  unknown_split = error_of(tfds_config(prepared, tfds_validation_split="test"))
  assert "data.tfds_validation_split='test'" in unknown_split
  assert "train, validation" in unknown_split
  assert "data.tfds_text_key='words'" in error_of(tfds_config(prepared, tfds_text_key="words"))
  assert "is not text but int" in error_of(tfds_config(prepared, tfds_text_key="raw"))


def test_tfds_with_a_damaged_file_is_one_line_or_skipped(prepared, tmp_path):
  copy = shutil.copytree(prepared, tmp_path / "copy")
  (victim,) = [p for p in copy.rglob("*array_record*") if "train" in p.name]
  data = victim.read_bytes()
  victim.write_bytes(data[: len(data) // 2])
  message = error_of(tfds_config(copy))
  assert "\n" not in message
  assert "'tiny_notes': example 0 of 'train' has no content: its file may be damaged" in message
  assert "holds no text" in error_of(tfds_config(copy, bad_files="skip"))


def test_tfds_in_a_format_that_needs_tensorflow_says_so(prepared, tmp_path):
  copy = tmp_path / "tiny_notes" / "1.0.0"
  copy.mkdir(parents=True)
  for path in (prepared / "tiny_notes" / "1.0.0").iterdir():
    content = path.read_bytes().replace(b"array_record", b"tfrecord")
    (copy / path.name.replace("array_record", "tfrecord")).write_bytes(content)
  assert "only TensorFlow reads" in error_of(tfds_config(tmp_path))


def test_no_tensorflow(prepared):
  """In a fresh interpreter, so that other tests' imports prove nothing either way."""
  code = f"""
import sys
from adaptive.config import DataConfig
from adaptive.data import pipeline
config = DataConfig(source="tfds", tfds_name="tiny_notes", tfds_data_dir={str(prepared)!r}, seq_len=8, batch_size=2)
pipeline.load(config, 257)
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
  root = pathlib.Path(sources.__file__).parents[2]
  env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr

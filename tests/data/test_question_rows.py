"""Questions as rows: against the text they come from, what a scorer makes of them, and through the pipeline."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
import tiny
import tokenizers as hf

from adaptive import losses, sharding
from adaptive.config import ConfigError, DataConfig, MeshConfig
from adaptive.data import pipeline, question_rows
from adaptive.data.labels import Header, Label, LabelWriter
from adaptive.data.pieces import continuation
from adaptive.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, prefix_of
from adaptive.evaluation.likelihood import Scorer
from adaptive.methods import METHODS

LAYERS, SEQ_LEN, NUMBER = 3, 24, 40
FIELDS = {"inputs", "targets", "segment_ids", "positions", "scored"}


def question(i):
  if i % 2:
    return {"id": f"q/{i}", "prompt": f"{i} or?\nAnswer:", "options": [" no", f" é{i}"], "answer": 1}
  return {"id": f"q/{i}", "prompt": "x" * (i % 5) + f"{i} ->", "answer": f" {i * i}\n", "level": i % 3}


QUESTIONS = [question(i) for i in range(NUMBER)]
HELD_OUT = [{**question(i), "id": f"h/{i}"} for i in range(6)]


def write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def answer_of(line):
  return line["options"][line["answer"]] if "options" in line else line["answer"]


@pytest.fixture
def config(tmp_path):
  paths = write(tmp_path / "train.jsonl", QUESTIONS), write(tmp_path / "held_out.jsonl", HELD_OUT)
  return DataConfig(source="questions", path=paths[0], validation_path=paths[1], seq_len=SEQ_LEN, batch_size=8)


def label(i, visits=None):
  return Label(f"q/{i}", 0.0, visits or (i % 3, 1, (i + 1) % 3), 1.0, 5, i)


def labelled(config, tmp_path, labels, num_layers=LAYERS):
  with LabelWriter(str(tmp_path / "labels.jsonl"), Header(num_layers, "m", "q", "s", 5, "r", 0)) as writer:
    for one in labels:
      writer.write(one)
  return dataclasses.replace(config, labels=str(tmp_path / "labels.jsonl"))


def test_a_row_is_one_question_and_its_answer_is_scored(config):
  dataset = pipeline.load(config, 257)
  assert len(dataset.train) == NUMBER
  for row, line in zip(dataset.train, QUESTIONS):
    assert set(row) == FIELDS
    assert all(values.shape == (SEQ_LEN,) and values.dtype == np.int32 for values in row.values())
    prompt, answer = line["prompt"].encode(), answer_of(line).encode()
    tokens, size = [256, *prompt, *answer], len(prompt) + len(answer)
    assert row["inputs"].tolist() == tokens[:-1] + [0] * (SEQ_LEN - size)
    assert row["targets"].tolist() == tokens[1:] + [0] * (SEQ_LEN - size)
    assert row["segment_ids"].tolist() == [1] * size + [0] * (SEQ_LEN - size)
    assert row["positions"].tolist() == [*range(size)] + [0] * (SEQ_LEN - size)
    assert bytes(row["targets"][row["scored"] > 0].tolist()) == answer
    assert not np.any(row["targets"][row["scored"] > 0] == dataset.tokenizer.eos)


def test_no_token_of_an_answer_is_in_the_prompt(config):
  rows = pipeline.load(config, 257).train
  batch = {name: np.stack([row[name] for row in rows]) for name in FIELDS}
  prompt = np.asarray(losses.prompt(batch))
  for inputs, given, line in zip(batch["inputs"], prompt, QUESTIONS):
    assert [256, *line["prompt"].encode()] == inputs[given].tolist()


def test_sizes_are_those_of_the_answers(config):
  rows = pipeline.load(config, 257).validation
  answers = [answer_of(line).encode() for line in HELD_OUT]
  assert rows.num_bytes == rows.num_predictions == sum(map(len, answers))
  assert rows.bytes_per_prediction == 1
  with pytest.raises(IndexError, match="row 6 of 6"):
    rows[6]
  assert not any(values.any() for values in rows.padding_row().values())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A tokenizer of words with the blanks before them, whose template puts <s> before a text."""
  texts = [line["prompt"] + answer_of(line) for line in QUESTIONS + HELD_OUT] * 3
  made = hf.Tokenizer(hf.models.BPE())
  made.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = hf.decoders.ByteLevel()
  letters = hf.pre_tokenizers.ByteLevel.alphabet()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=letters, show_progress=False
  )
  made.train_from_iterator(texts, trainer)
  made.post_processor = hf.processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
  path = tmp_path_factory.mktemp("words") / "tokenizer.json"
  made.save(str(path))
  return str(path)


@pytest.mark.parametrize("prefix", ["bos", "template"])
@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_rows_hold_what_a_scorer_scores(config, words, tokenizer, prefix):
  config = dataclasses.replace(config, tokenizer=words if tokenizer == "words" else "bytes", prefix=prefix)
  rows = pipeline.load(config, 400).train
  tokens = HuggingFaceTokenizer(words) if tokenizer == "words" else ByteTokenizer()
  before = {("bytes", "bos"): (256,), ("bytes", "template"): (), ("words", "bos"): (0,), ("words", "template"): (0,)}
  assert prefix_of(tokens, config) == before[tokenizer, prefix]
  encode, mesh = lambda text: tokens.encode(text).tolist(), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  pieces = [
    continuation(encode, before[tokenizer, prefix], line["prompt"], answer_of(line), SEQ_LEN) for line in QUESTIONS
  ]
  scored = Scorer(METHODS["dense"], None, None, 0, mesh, rows=len(pieces))._batch(pieces)
  for name in FIELDS:
    mine = np.stack([row[name] for row in rows])
    np.testing.assert_array_equal(np.asarray(scored[name])[:, :SEQ_LEN], mine, err_msg=name)
    assert not np.any(np.asarray(scored[name])[:, SEQ_LEN:])


def test_questions_are_held_out_by_their_ids_where_they_have_no_file(config):
  config = dataclasses.replace(config, validation_path="", validation_fraction=0.25)
  out = [hashlib.sha256(line["id"].encode()).digest()[0] < 64 for line in QUESTIONS]
  dataset = pipeline.load(config, 257)
  for rows, side in ((dataset.train, False), (dataset.validation, True)):
    texts = [dataset.tokenizer.decode(row["inputs"][row["segment_ids"] > 0]) for row in rows]
    wanted = [line["prompt"] + answer_of(line) for line, is_out in zip(QUESTIONS, out) if is_out == side]
    assert texts == [ByteTokenizer().decode([*text.encode()][:-1]) for text in wanted]
  assert 0 < len(dataset.validation) < NUMBER / 2


def test_labels_go_with_the_questions_that_have_one(config, tmp_path):
  labels = [label(i) for i in (7, 3, 11, 12, 20, 21, 22, 23, 30)]
  config = labelled(config, tmp_path, [*labels, label(1000)])
  dataset = pipeline.load(config, 257, LAYERS)
  order = sorted(int(one.id[2:]) for one in labels)  # as in the file of questions
  assert len(dataset.train) == len(labels)
  found = [one.visits for i in order for one in labels if one.id == f"q/{i}"]
  counts = [sum(visits.count(c) for visits in found) for c in range(3)]
  for row, i, visits in zip(dataset.train, order, found):
    assert row["visits"].tolist() == list(visits)
    assert row["label_counts"].tolist() == counts
    assert row["visits"].dtype == row["label_counts"].dtype == np.int32
    assert bytes(row["targets"][row["scored"] > 0].tolist()) == answer_of(QUESTIONS[i]).encode()
  assert "9 to learn from (31 without a label left out), 6 held out" in dataset.description
  assert set(dataset.validation[0]) == FIELDS


def test_the_fingerprint_sees_questions_labels_and_split(config, tmp_path):
  labels = [label(i) for i in range(NUMBER)]
  made = [config, dataclasses.replace(config, validation_path=""), labelled(config, tmp_path, labels)]
  prints = [pipeline.load(one, 257).fingerprint for one in made]
  assert prints[0] == pipeline.load(config, 257).fingerprint
  (tmp_path / "other").mkdir()
  labels[-1] = label(NUMBER - 1, (2, 2, 2))
  prints.append(pipeline.load(labelled(config, tmp_path / "other", labels), 257).fingerprint)
  assert len(set(prints)) == 4
  dataset = pipeline.load(config, 257)
  prints = {"fingerprint": dataset.fingerprint, "tokens": dataset.tokens_fingerprint}
  assert dataset.position(7, 8) == {**prints, "batch": 7, "epoch": 1, "row_of_epoch": 16}


@pytest.mark.parametrize("tensor", [1, 2])
def test_batches_on_eight_devices(config, tmp_path, tensor):
  config = labelled(config, tmp_path, [label(i) for i in range(NUMBER)])
  dataset, mesh = pipeline.load(config, 257, LAYERS), tiny.mesh(fsdp=2, tensor=tensor)
  assert mesh.size == 8
  for step, batch in enumerate(pipeline.train_batches(dataset.train, 8, 0, 0, 6, mesh)):
    shapes = {name: values.shape for name, values in batch.items()}
    assert shapes == {name: (8, *shape) for name, shape in pipeline.row_shapes(config, LAYERS).items()}
    want = pipeline.host_batch(dataset.train, 8, 0, step, np.arange(8))
    for name, values in batch.items():
      assert values.sharding == sharding.batch_sharding(mesh)
      np.testing.assert_array_equal(values, want[name])
    parts = sharding.split_rows(batch, 2)
    assert {name: values.shape for name, values in parts.items()} == {n: (2, 4, *s[1:]) for n, s in shapes.items()}
    np.testing.assert_array_equal(parts["visits"][1], want["visits"][1::2])
  batches = list(pipeline.validation_batches(dataset.validation, 100, 8, mesh))
  assert len(batches) == 1
  assert set(batches[0]) == FIELDS
  assert int(np.sum(np.any(batches[0]["scored"], axis=1))) == len(HELD_OUT)


def test_row_shapes_are_those_of_rows_without_labels_and_of_text(config):
  shapes = {name: values.shape for name, values in pipeline.load(config, 257).train[0].items()}
  assert pipeline.row_shapes(config, LAYERS) == shapes
  assert pipeline.row_shapes(DataConfig(seq_len=9), LAYERS) == dict.fromkeys(FIELDS - {"scored"}, (9,))


def test_what_cannot_work_is_refused(config, tmp_path):
  def refuse(num_layers=None, **changes):
    with pytest.raises(ConfigError) as caught:
      pipeline.load(dataclasses.replace(config, **changes), 257, num_layers)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  longest = max(len(line["prompt"].encode() + answer_of(line).encode()) for line in QUESTIONS)
  said = refuse(seq_len=longest - 1)
  assert f"of {NUMBER} questions are longer than data.seq_len={longest - 1}: the longest" in said
  assert f"has {longest} tokens to predict" in said
  assert "data.batch_size=41 is more than the 40 training rows" in refuse(batch_size=41)
  assert "cannot read 'nowhere'" in refuse(validation_path="nowhere")
  assert "0 are held out; name others" in refuse(validation_path="", validation_fraction=0.001)
  labels = labelled(config, tmp_path, [label(i) for i in range(NUMBER)]).labels
  assert "a model of 3 layers, not of model.num_layers=4" in refuse(4, labels=labels)
  (tmp_path / "other").mkdir()
  others = labelled(config, tmp_path / "other", [label(1000)]).labels
  assert "has no label of a question" in refuse(labels=others)
  with pytest.raises(ConfigError, match="data.source='questions' needs data.path"):
    DataConfig(source="questions")
  with pytest.raises(ConfigError, match="data.labels is for data.source='questions', not for 'stdlib'"):
    DataConfig(labels="labels.jsonl")


def test_ids_outside_the_vocabulary_are_refused(config, monkeypatch):
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
  lines = question_rows.read_questions(config.path)
  with pytest.raises(ConfigError, match="'q/0': token ids .* lie outside 0 .. 99"):
    question_rows.pack(lines, ByteTokenizer(), config)

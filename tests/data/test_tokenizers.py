"""Bytes, and a real tokenizer.json trained on the spot."""

import json

import hypothesis
import numpy as np
import pytest
import tokenizers as hf
from hypothesis import strategies as st

from adaptive.config import ConfigError, DataConfig
from adaptive.data import sources, tokenizers


def train_bpe(specials, vocab_size=400):
  """Byte-level BPE on a little of the standard library."""
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=specials,
    initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = [d.text for d in sources.load_documents(DataConfig()).train[:5]]
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


@pytest.fixture(scope="module")
def trained():
  return train_bpe(["<s>", "</s>"])


@pytest.fixture
def path(trained, tmp_path):
  trained.save(str(tmp_path / "tokenizer.json"))
  return str(tmp_path / "tokenizer.json")


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
  tokenizer = tokenizers.ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert bytes(ids.tolist()) == text.encode()
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text


def test_bytes_decode_replaces_half_a_character():
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizer.decode(tokenizer.encode("aé")[:-1]) == "a\N{REPLACEMENT CHARACTER}"


def test_trained_tokenizer_round_trips_and_merges(path, trained):
  tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer=path))
  text = "def f(self):\n  return 'é€😀'\n"
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert len(ids) < len(text.encode())
  assert tokenizer.vocab_size == trained.get_vocab_size() == 400
  assert (tokenizer.bos, tokenizer.eos) == (trained.token_to_id("<s>"), trained.token_to_id("</s>"))
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
  assert tokenizer.encode("").shape == (0,)


def test_a_document_cannot_forge_a_boundary(path):
  tokenizer = tokenizers.HuggingFaceTokenizer(path)
  ids = tokenizer.encode("a</s><s>b")
  assert not {tokenizer.bos, tokenizer.eos} & set(ids.tolist())
  assert tokenizer.decode(ids) == "a</s><s>b"


def test_templates_truncation_and_padding_of_the_file_are_off(trained, tmp_path):
  configured = hf.Tokenizer.from_str(trained.to_str())
  configured.enable_truncation(3)
  configured.enable_padding(length=50)
  configured.post_processor = hf.processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  configured.save(str(tmp_path / "t.json"))
  text = "import os, sys, re"
  ids = tokenizers.HuggingFaceTokenizer(str(tmp_path / "t.json")).encode(text)
  assert ids.tolist() == trained.encode(text, add_special_tokens=False).ids
  assert len(ids) > 3


@pytest.mark.parametrize(
  ("specials", "bos", "eos"),
  [
    (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),
    (["<|begin_of_text|>", "<|end_of_text|>"], "<|begin_of_text|>", "<|end_of_text|>"),
    (["<pad>", "<bos>"], "<bos>", "<bos>"),
    (["</s>"], "</s>", "</s>"),
  ],
)
def test_boundaries_are_found_by_their_usual_names(trained, tmp_path, specials, bos, eos):
  model = json.loads(trained.to_str())
  model["added_tokens"] = []
  for name in ("<s>", "</s>"):
    del model["model"]["vocab"][name]
  renamed = hf.Tokenizer.from_str(json.dumps(model))
  renamed.add_special_tokens(specials)
  renamed.save(str(tmp_path / "t.json"))
  tokenizer = tokenizers.HuggingFaceTokenizer(str(tmp_path / "t.json"))
  assert (tokenizer.bos, tokenizer.eos) == (renamed.token_to_id(bos), renamed.token_to_id(eos))


def test_vocab_size_bounds_ids_where_they_have_gaps(tmp_path):
  vocab = {"a": 0, "<s>": 7}
  hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="a")).save(str(tmp_path / "t.json"))
  assert tokenizers.HuggingFaceTokenizer(str(tmp_path / "t.json")).vocab_size == 8


def bad_tokenizer(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ConfigError) as caught:
    tokenizers.make_tokenizer(DataConfig(tokenizer=str(path)))
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_bad_tokenizer_files(tmp_path):
  assert "no such file" in bad_tokenizer(tmp_path, None)
  assert "not a valid tokenizer.json" in bad_tokenizer(tmp_path, "{}\n")
  assert "not a valid tokenizer.json" in bad_tokenizer(tmp_path, "not json")
  no_boundary = hf.Tokenizer(hf.models.WordLevel({"a": 0}, unk_token="a")).to_str()
  assert "no token that marks a document" in bad_tokenizer(tmp_path, no_boundary)


def test_vocabulary_must_fit_the_model():
  tokenizers.check_vocab(tokenizers.ByteTokenizer(), 257)
  with pytest.raises(ConfigError, match=r"^model.vocab_size=100 is smaller than the tokenizer's 257$"):
    tokenizers.check_vocab(tokenizers.ByteTokenizer(), 100)

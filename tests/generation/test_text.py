"""Text that comes a token at a time says what all tokens decoded together say."""

import hypothesis
import pytest
import tokenizers as hf
from hypothesis import strategies as st

from adaptive.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from adaptive.generation.text import RowText

LOST = "\N{REPLACEMENT CHARACTER}"
TEXTS = ["the lazy dog", "é€😀 naïve 😀😀", " two  blanks", "tab\tline\n"]


def pieces(tokenizer, ids, after=()):
  stream = tokenizer.stream(after)
  return [*(stream.feed(token) for token in ids), stream.end()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def byte_level(folder):
  """Merges only ASCII, so every other character is several tokens."""
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
  tokenizer.save(str(folder / "byte_level.json"))
  return HuggingFaceTokenizer(str(folder / "byte_level.json"))


@pytest.fixture(scope="module")
def words(folder):
  """Sentencepiece's way: a token carries its word's blank, which the first word of a text loses."""
  vocab = {name: i for i, name in enumerate(["<s>", "</s>", "<unk>", "▁the", "▁lazy", "▁dog", "s"])}
  tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="<unk>"))
  tokenizer.add_special_tokens(["<s>", "</s>"])
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
  tokenizer.decoder = hf.decoders.Metaspace()
  tokenizer.save(str(folder / "words.json"))
  return HuggingFaceTokenizer(str(folder / "words.json"))


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.integers(0, 300)))
def test_bytes_of_any_kind(ids):
  tokenizer = ByteTokenizer()
  assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_byte_waits_only_for_its_character():
  assert pieces(ByteTokenizer(), [*"aé€".encode(), 0xFF, 0x62, 0xE2]) == [
    "a",
    "",
    "é",
    "",
    "",
    "€",
    LOST,
    "b",
    "",
    LOST,
  ]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_byte_level_tokenizer(byte_level, text):
  ids = byte_level.encode(text).tolist()
  found = pieces(byte_level, ids)
  assert "".join(found) == text
  assert LOST not in "".join(found)
  assert found[-1] == "", "nothing was held back to the end"
  assert len([piece for piece in found if piece]) >= min(len(text), len(ids)) // 2


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=LOST)))
def test_any_text_in_a_byte_level_tokenizer(byte_level, text):
  assert "".join(pieces(byte_level, byte_level.encode(text).tolist())) == text


def test_what_never_becomes_a_character_comes_after_four_tokens(byte_level):
  first, last = byte_level.encode("😀")[0], byte_level.encode("a")[0]
  found = pieces(byte_level, [first] * 9 + [last])
  assert found[:4] == ["", "", "", LOST * 4]
  assert "".join(found).endswith("a")


def test_a_word_keeps_its_blank_after_a_prompt_and_after_boundaries(words):
  the, lazy, dog, s = 3, 4, 5, 6
  assert pieces(words, [lazy, dog, s], after=[words.bos, the]) == [" lazy", " dog", "s", ""]
  assert pieces(words, [the, words.eos, lazy]) == ["the", "", " lazy", ""]


def test_a_text_ends_before_the_stop_text_and_shows_none_of_its_beginning():
  text = RowText(ByteTokenizer(), [], stop="\n\ne")
  found = [text.feed(token) for token in b"a\nb\n\n\nec"]
  assert found == ["a", "", "\nb", "", "", "\n", "", ""]
  assert text.stopped
  assert text.end() == ""


def test_a_beginning_of_the_stop_text_comes_out_at_the_end():
  text = RowText(ByteTokenizer(), [], stop="END")
  assert [text.feed(token) for token in b"xEN"] == ["x", "", ""]
  assert not text.stopped
  assert text.end() == "EN"


def test_a_stop_text_within_one_token(words):
  text = RowText(words, [3], stop="az")
  assert text.feed(4) == " l"
  assert text.stopped
  assert text.feed(5) == text.end() == ""


def test_a_stop_text_of_several_bytes():
  text = RowText(ByteTokenizer(), [], stop="€")
  assert "".join(text.feed(token) for token in "aé€b".encode()) == "aé"
  assert text.stopped

"""Label files: what was written is read, a killed search goes on, and damage is named."""

import dataclasses
import json
import math

import pytest

from adaptive.config import ConfigError
from adaptive.data.labels import Header, Label, LabelWriter, read_labels

HEADER = Header(3, "models/some", "piqa_train.jsonl", "mcts", 50, "answer", 7)
LABELS = [
  Label("piqa/0", 0.0, (1, 0, 2), 1.0, 50, 11),
  Label("piqa/1", -1.5, (1, 1, 1), -1.5, 1, 12),
  Label("pi\nqa/2", 1.0, (0, 0, 0), 1.0, 3, 13),
]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "folder" / "labels.jsonl"


def write(path, labels=LABELS, header=HEADER):
  with LabelWriter(str(path), header) as writer:
    for label in labels:
      writer.write(label)
      assert json.loads(path.read_bytes().splitlines()[-1])["id"] == label.id, "it is there before the next is sought"
  return path


def refused(path, header=HEADER):
  with pytest.raises(ConfigError) as caught, LabelWriter(str(path), header):
    pass
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_what_is_written_is_read(path):
  assert read_labels(str(write(path))) == (HEADER, LABELS)
  first = json.loads(path.read_text().splitlines()[0])
  assert (first["format"], first["version"], first["num_layers"]) == ("adaptive layer visits", 1, 3)


def test_a_search_goes_on_after_the_labels_that_are_there(path):
  write(path, LABELS[:2])
  with LabelWriter(str(path), HEADER) as writer:
    assert writer.done == {"piqa/0", "piqa/1"}
    with pytest.raises(ValueError, match="'piqa/0' has its label"):
      writer.write(LABELS[0])
    writer.write(LABELS[2])
    assert "pi\nqa/2" in writer.done
  assert read_labels(str(path)) == (HEADER, LABELS)


def test_a_killed_search_resumes_wherever_it_was_cut(path):
  whole = write(path).read_bytes()
  first, ends = whole.index(b"\n") + 1, [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
  for cut in range(len(whole)):
    path.write_bytes(whole[:cut])
    left = sum(end <= cut for end in ends) - 1
    if cut >= first:
      assert read_labels(str(path))[1] == LABELS[:left]
    with LabelWriter(str(path), HEADER) as writer:
      assert writer.done == {label.id for label in LABELS[: max(left, 0)]}
      for label in LABELS[max(left, 0) :]:
        writer.write(label)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Header)])
def test_labels_of_another_search_are_refused(path, field):
  before = write(path).read_bytes()
  other = dataclasses.replace(HEADER, **{field: 9 if field in ("num_layers", "budget", "seed") else "other"})
  assert f"another search: {field} is" in refused(path, other)
  assert path.read_bytes() == before


def test_two_searches_do_not_write_one_file(path):
  write(path, LABELS[:1])
  before = path.read_bytes()
  with LabelWriter(str(path), HEADER) as writer:
    assert "another search is writing" in refused(path)
    assert path.read_bytes() == before
    writer.write(LABELS[1])
  write(path, LABELS[2:])
  assert read_labels(str(path))[1] == LABELS


def test_somebody_s_file_stays_as_it_is(tmp_path):
  for content in (b"a diary", b"a diary\n", b'{"id": "piqa/17"}\n', b"[]\n"):
    (tmp_path / "file").write_bytes(content)
    refused(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


DAMAGE = {
  "is not JSON": b'{"id": "pi\n',
  "is not a JSON object": b"3\n",
  "there is no 'id'": b'{"visits": [1, 1, 1]}\n',
  "'visits' must be 3 numbers of 0 .. 2": b'{"id": "a", "visits": [1, 1]}\n',
  "not [1, 3, 1]": b'{"id": "a", "visits": [1, 3, 1]}\n',
  "not [1, True, 1]": b'{"id": "a", "visits": [1, true, 1]}\n',
  "there is no 'reward'": b'{"id": "a", "visits": [1, 1, 1], "default_reward": 1, "evaluations": 1, "seed": 1}\n',
  "an earlier label of the question": json.dumps(dataclasses.asdict(LABELS[0])).encode() + b"\n",
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_within_the_file_is_named_by_its_line(path, message):
  write(path, LABELS[:1])
  path.write_bytes(path.read_bytes() + DAMAGE[message] + b"{")
  with pytest.raises(ConfigError, match="labels.jsonl', line 3") as caught:
    read_labels(str(path))
  assert message in str(caught.value)
  assert str(caught.value) == refused(path)


def test_files_that_hold_no_labels_are_refused(path, tmp_path):
  for content, message in ((b"", "first line is missing"), (b'{"format": "x"}\n', "this is no label file")):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
      read_labels(str(tmp_path / "a"))
  newer = write(path).read_text().replace('"version": 1', '"version": 2')
  path.write_text(newer)
  with pytest.raises(ConfigError, match="'version' is 2, not 1"):
    read_labels(str(path))
  with pytest.raises(ConfigError, match="cannot read"):
    read_labels(str(tmp_path / "none"))
  assert "cannot write" in refused(tmp_path / "a" / "b")


def test_labels_that_could_not_be_read_are_not_written(path):
  with LabelWriter(str(path), HEADER) as writer:
    for wrong in (dict(visits=(1, 1)), dict(visits=(1, 1, 3)), dict(reward=math.inf), dict(reward="1")):
      with pytest.raises((ValueError, TypeError), match="piqa/0|str"):
        writer.write(dataclasses.replace(LABELS[0], **wrong))
  assert read_labels(str(path)) == (HEADER, [])

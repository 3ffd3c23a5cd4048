"""Multiple choice from JSONL with `question`, `options` ("A. ...\nB. ...", one to a line) and `answer`, one of them.

`passage` may stand before the question. Rows whose answer is none of their options are left out.
"""


def _lines(doc: dict) -> list[str]:
  return [line.strip() for line in doc["options"].split("\n")]


def options(doc: dict) -> list[str]:
  """The texts to choose from, without their letters."""
  return [line.split(".", 1)[-1].strip() for line in _lines(doc)]


def gold(doc: dict) -> int:
  """Which of them is right."""
  return _lines(doc).index(doc["answer"].strip())


def is_answered(doc: dict) -> bool:
  """Whether one of them is right."""
  return (doc.get("answer") or "").strip() in _lines(doc)


def answered(docs):
  """Those that have a right answer."""
  return docs.filter(is_answered)

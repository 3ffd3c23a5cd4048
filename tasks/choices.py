"""Multiple choice from JSONL with `question`, `options` ("A. ...\nB. ...", one to a line) and `answer`, one of them.

`passage` may stand before the question. Rows whose answer is none of their options are left out.
"""


def options(doc: dict) -> list[str]:
  """The texts to choose from, without their letters."""
  return [line.split(".", 1)[-1].strip() for line in doc["options"].split("\n")]


def gold(doc: dict) -> int:
  """Which of them is right."""
  return [line.strip() for line in doc["options"].split("\n")].index(doc["answer"].strip())


def answered(docs):
  """Those that have a right answer."""
  return docs.filter(lambda doc: doc["answer"].strip() in [line.strip() for line in doc["options"].split("\n")])

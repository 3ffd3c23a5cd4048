"""Collectives of a compiled program, read from its HLO text: which, over how many devices, how often, how many bytes.

A collective inside a loop (the scan over layers) counts once per iteration, since that is what it costs. Of a
conditional (a sub-model's switch) only the branch that moves most bytes counts, because only one branch runs.
"""

import collections
import dataclasses
import functools
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\]})]) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of transfer between groups of `devices` (0: the text does not say).

  `bytes` are those of the whole array on one device: what an all-gather returns, and what the others are given. They
  are the size of the problem, not of the traffic, which depends on the algorithm.
  """

  kind: str
  devices: int


@dataclasses.dataclass
class Totals:
  """What a step does of one kind: `count` transfers of `bytes` in all."""

  count: int = 0
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Collectives:
  """Everything sent in one execution of a program; `unknown_loops` have bodies that were counted once."""

  totals: dict[Collective, Totals]
  unknown_loops: int

  @property
  def bytes(self) -> int:
    return sum(total.bytes for total in self.totals.values())


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str

  def called(self, attribute: str) -> list[str]:
    """Names of computations in `attribute=%name` or `attribute={%name, ...}`."""
    found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%?([\w.-]+))", self.rest)
    return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []

  @property
  def operands(self) -> list[str]:
    """Names of what it is given, in order."""
    depth, end = 1, len(self.rest)
    for i, character in enumerate(self.rest):
      depth += {"(": 1, ")": -1}.get(character, 0)
      if depth == 0:
        end = i
        break
    return re.findall(r"%([\w.-]+)", self.rest[:end])


def collectives(text: str) -> Collectives:
  """Counts the collectives of `compiled.as_text()`."""
  return _Program(text).collectives()


def array_bytes(type_text: str) -> int:
  """Bytes of all arrays in a type such as `(f32[2,3]{1,0}, bf16[])`."""
  bits = 0
  for dtype, dims in _ARRAY.findall(type_text):
    width = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0] if re.search(r"\d+", dtype) else 0)
    bits += width * math.prod(int(d) for d in dims.split(",") if d)
  return bits // 8


class _Program:
  """The computations of a module by name, each a list of instructions."""

  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.entry, self.unknown = "", set()
    body: list[_Instruction] = []
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        body = self.computations[header[2]] = []
        self.entry = header[2] if header[1] else self.entry
      elif found := _INSTRUCTION.match(line):
        body.append(_Instruction(*found.groups()))

  def collectives(self) -> Collectives:
    totals = self._totals(self.entry)
    return Collectives({key: Totals(*totals[key]) for key in sorted(totals, key=str)}, len(self.unknown))

  @functools.cache  # noqa: B019 (lives as long as one parse)
  def _totals(self, name: str) -> dict[Collective, tuple[int, int]]:
    """(count, bytes) by kind of one execution of a computation."""
    found: dict[Collective, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for pieces, times in self._parts(name):
      for key, (count, size) in pieces.items():
        found[key] = (found[key][0] + times * count, found[key][1] + times * size)
    return dict(found)

  def _parts(self, name: str):
    """What each instruction sends, and how many times."""
    chains = set()
    for instruction in self.computations[name]:
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS:
        yield {_key(instruction, kind): (1, self._size(name, instruction, kind))}, 1
      elif kind == "while":
        yield self._totals(instruction.called("body")[0]), self._trips(instruction)
      elif kind == "conditional":
        names = instruction.called("branch_computations") or [
          *instruction.called("true_computation"), *instruction.called("false_computation")
        ]  # fmt: skip
        yield max((self._totals(n) for n in names), key=lambda t: sum(size for _, size in t.values())), 1
      elif kind in ("fusion", "call", "async"):
        (callee, *_) = instruction.called("calls") or instruction.called("to_apply")
        chain = self._chain(callee)
        if chain not in chains:
          yield self._fused(callee), 1
        chains |= {chain} if chain else set()

  def _chain(self, callee: str) -> str | None:
    """Names the transfer that a fusion belongs to: on TPU one transfer is spread over several fusions."""
    for instruction in self.computations[callee]:
      if instruction.opcode in KINDS and (chain := re.search(r'chain_id="(\d+)"', instruction.rest)):
        return chain[1]
    return None

  def _fused(self, callee: str) -> dict[Collective, tuple[int, int]]:
    """TPUs have no reduce-scatter instruction, but a fusion of this name around an all-reduce."""
    totals = self._totals(callee)
    if not callee.startswith("all-reduce-scatter"):
      return totals
    return {dataclasses.replace(key, kind="reduce-scatter"): value for key, value in totals.items()}

  def _size(self, name: str, instruction: _Instruction, kind: str) -> int:
    types = {i.name: i.type for i in self.computations[name]}
    given = sum(array_bytes(types[operand]) for operand in instruction.operands if operand in types)
    if kind != "all-gather":
      return given
    # The started form returns its operands beside its results.
    return array_bytes(instruction.type) - (given if instruction.opcode.endswith("-start") else 0)

  def _trips(self, loop: _Instruction) -> int:
    """Iterations of a loop: as the compiler noted, or the constant that its counter, starting at 0, is held against."""
    if noted := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
      return int(noted[1])
    condition = self.computations[loop.called("condition")[0]]
    constants = [i.rest for i in condition if i.opcode == "constant" and i.type.startswith("s32[]")]
    bounds = [int(found[1]) for rest in constants if (found := re.match(r"(\d+)\)", rest))]
    compared = any(i.opcode == "compare" and "direction=LT" in i.rest for i in condition)
    if compared and len(bounds) == 1:
      return bounds[0]
    if self._totals(loop.called("body")[0]):
      self.unknown.add(loop.name)
    return 1


def _key(instruction: _Instruction, kind: str) -> Collective:
  return Collective(kind, _group_size(instruction.rest))


def _group_size(rest: str) -> int:
  """Devices that take part in one group, in any of the three notations; of a permutation, 2."""
  if "source_target_pairs" in rest:
    return 2
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return found[1].count(",") + 1
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
    return int(found[1])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
  return 0

"""The text of a compiled program's optimised HLO (XLA:CPU's, GPU's and TPU's): instructions, and how often they run."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computation)=(%[\w.\-]+)")
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)={([^}]*)}")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, metadata and the backend's configuration, as they stand; of a constant and a parameter that too."""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        listed = [name.strip() for names in _LISTED.findall(self.rest) for name in names.split(",")]
        return *_CALLED.findall(self.rest), *(name for name in listed if name)

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""


class Module:
    """A program's computations, each its instructions in the order of the schedule.

    turns: how often a loop runs whose count is no constant, from its scope.
    """

    def __init__(self, text: str, turns: Callable[[str], int] = lambda scope: 1):
        self._turns = turns
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        current, name, last, self.entry = {}, "", "", ""
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0]
                current, last = self.computations.setdefault(name, {}), ""
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif name and (found := _INSTRUCTION.match(line)):
                current[last := found[2]] = _instruction(found[2], found[3])
                if found[1]:
                    self.roots[name] = last
            elif last and line != "}":  # a kernel's metadata may have lines of its own
                current[last] = dataclasses.replace(current[last], rest=current[last].rest + line)
        if not self.entry:
            raise ValueError("no HLO module: there is no ENTRY computation in the text")
        self.partitions = int((re.search(r"num_partitions=(\d+)", text[:100_000]) or [0, "1"])[1])
        self._loops: dict[str, tuple[str, Instruction]] = {}  # by their bodies
        for outer, one in self.instructions():
            if one.opcode == "while":
                self._loops[_attribute(one, "body")] = (outer, one)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """All of them, with their computations' names."""
        for name, instructions in self.computations.items():
            for one in instructions.values():
                yield name, one

    def times(self) -> dict[str, int]:
        """How often each computation runs; each branch of a choice counts."""
        found = dict.fromkeys(self.computations, 0) | {self.entry: 1}
        for name in reversed(self.computations):  # callers stand behind what they call
            for one in self.computations[name].values():
                for called in one.called if found[name] else ():
                    if called in found:
                        found[called] += found[name] * (self.trips(name, one) if one.opcode == "while" else 1)
        return found

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often a loop's body runs, from the compiler's note or from counter, limit and step; else ``turns``."""
        if known := re.search(r'"known_trip_count":{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition, body = _attribute(loop, "condition"), _attribute(loop, "body")
        test, direction = self._compared(condition)
        for here, other in ((0, 1), (1, 0)):
            place = self._place(condition, test[here]) if test else None
            if test is None or place is None:
                continue
            start = self._carried(computation, loop, place)
            limit = self._number(condition, test[other], (computation, loop))
            after = self._number(body, self._passed(body, place), counter=(place, 0))
            if start is None or limit is None or not after:
                continue
            steps = (limit - start) / after
            return max(0, math.floor(steps) + 1 if direction in ("LE", "GE") else math.ceil(steps))
        return self._turns(loop.scope)

    def _compared(self, computation: str) -> tuple[tuple[str, str] | None, str]:
        """The two operands of a condition's comparison, by their names in the condition, and its direction."""
        root = self.computations[computation][self.roots[computation]]
        operands = root.operands
        if root.opcode == "fusion":
            inner = self.computations[root.called[0]]
            names = {one.name: int(one.rest.split(")")[0]) for one in inner.values() if one.opcode == "parameter"}
            compared = inner[self.roots[root.called[0]]]
            if compared.opcode != "compare" or not all(name in names for name in compared.operands):
                return None, ""
            operands, root = tuple(operands[names[name]] for name in compared.operands), compared
        if root.opcode != "compare":
            return None, ""
        return (operands[0], operands[1]), (re.search(r"direction=(\w+)", root.rest) or ["", ""])[1]

    def _place(self, computation: str, name: str) -> int | None:
        """Which element of the loop's tuple this is."""
        one = self.computations[computation][name]
        if one.opcode in ("copy", "bitcast"):
            return self._place(computation, one.operands[0])
        if one.opcode != "get-tuple-element":
            return None
        source = self.computations[computation][one.operands[0]]
        return int(_attribute(one, "index")) if source.opcode == "parameter" else None

    def _passed(self, body: str, place: int) -> str:
        root = self.computations[body][self.roots[body]]
        return root.operands[place] if root.opcode == "tuple" else root.name

    def _carried(self, computation: str, loop: Instruction, place: int) -> int | None:
        """The number that a loop begins with at this place of its tuple."""
        given = self.computations[computation].get(loop.operands[0])
        if given is None or given.opcode != "tuple":
            return None
        return self._number(computation, given.operands[place])

    def _number(
        self,
        computation: str,
        name: str,
        loop: tuple[str, Instruction] | None = None,
        *,
        counter: tuple[int, int] | None = None,
        given: dict[int, int | None] | None = None,
    ) -> int | None:
        """The integer that an instruction gives, if the text says it.

        loop: whose tuple the computation's parameter is, if not the one whose body it is. counter: an element of that
        tuple, and a value for it. given: the values of a fused computation's parameters.
        """
        one = self.computations[computation].get(name)
        if one is None:
            return None
        of = lambda name: self._number(computation, name, loop, counter=counter, given=given)  # noqa: E731
        if one.opcode == "constant":
            value = one.rest.split(")")[0]
            return int(value) if re.fullmatch(r"-?\d+", value) else None
        if one.opcode == "parameter":
            return (given or {}).get(int(one.rest.split(")")[0]))
        if one.opcode in ("copy", "bitcast", "convert", "reshape", "broadcast") and one.operands:
            return of(one.operands[0])
        if one.opcode in ("add", "subtract", "multiply"):
            a, b = (of(operand) for operand in one.operands)
            if a is None or b is None:
                return None
            return a + b if one.opcode == "add" else a - b if one.opcode == "subtract" else a * b
        if one.opcode == "fusion":
            inner = one.called[0]
            values = {index: of(operand) for index, operand in enumerate(one.operands)}
            return self._number(inner, self.roots[inner], given=values)
        place = self._place(computation, name) if one.opcode == "get-tuple-element" else None
        if place is None:
            return None
        if counter is not None and counter[0] == place:
            return counter[1]
        if (around := loop or self._loops.get(computation)) is None:
            return None
        body = _attribute(around[1], "body")
        if self._place(body, self._passed(body, place)) != place:  # it changes from turn to turn
            return None
        return self._carried(*around, place)


def shape_bytes(shape: str) -> int:
    """Of an array or a tuple, without what a layout pads.

    >>> shape_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3])")
    2050
    """
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or (0 if dtype in _BITS else int((re.search(r"\d+", dtype) or ["0"])[0]))
        total += -(-bits * math.prod(int(size) for size in sizes.split(",") if size) // 8)
    return total


def arrays(shape: str) -> list[str]:
    """The arrays of a shape's text, each with its layout."""
    return re.findall(r"[a-z]\w*\[[\d,]*\](?:{[^}]*})?", shape)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:]
    opcode = _OPCODE.match(rest)
    assert opcode, text[:200]
    begin = opcode.end() - 1
    if opcode[1] in ("constant", "parameter"):  # what stands there may be anything
        return Instruction(name, opcode[1], shape, (), rest[begin + 1 :])
    close = _closing(rest, begin)
    operands = tuple(re.findall(r"%[\w.\-]+", rest[begin:close]))
    return Instruction(name, opcode[1], shape, operands, rest[close + 1 :])


def _closing(text: str, begin: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"no HLO: unbalanced parentheses in {text[:200]!r}")


def _attribute(one: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=([%\w.\-]+)", one.rest)
    assert found, (name, one)
    return found[1]

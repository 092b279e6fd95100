"""What a compiled program sends between devices, from the text of its optimised HLO (XLA:CPU's, GPU's and TPU's)."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

KINDS = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all"
# What takes no time of a device's units, so that nothing hides behind it.
IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
IDLE |= {"copy-start", "copy-done", "async-start", "async-update", "async-done", "opt-barrier"}
IDLE |= {kind + part for kind in KINDS for part in ("-start", "-done")}

_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|\w+_computation)=(%[\w.\-]+)")
_LISTED = re.compile(r"\b(?:branch_computations|called_computations)={([^}]*)}")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that devices take part in together."""

    kind: str
    """Of ``KINDS``."""
    shape_bytes: int
    """What a device holds of the whole: of an all-gather the result, of the others the operand."""
    group_size: int
    """Devices that take part together; of a collective-permute 2."""
    groups: tuple[tuple[int, ...], ...]
    """The devices of each group, by their places in the mesh; of a collective-permute (source, target)."""
    times: int
    """How often the program executes it: the product of the trip counts of the loops around it."""
    asynchronous: bool
    """Whether the schedule has work between its start and its end."""
    scope: str
    """The ``op_name`` of its metadata: jax's functions and named scopes."""

    @property
    def sent_bytes(self) -> float:
        """What must leave a device each time: all but its own share, of an all-reduce twice."""
        if self.kind == "collective-permute":
            return self.shape_bytes
        share = (self.group_size - 1) / self.group_size
        return self.shape_bytes * share * (2 if self.kind == "all-reduce" else 1)


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


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised module (``compiled.as_text()``), in the order of the text.

    Raises ValueError where the text is no HLO module.
    """
    module = Module(text)
    times, apart = module.times(), _asynchronous(module)
    found, outer = [], {name: one.scope for _, one in module.instructions() for name in one.called}
    for computation, instructions in module.computations.items():
        if not times[computation]:
            continue
        for one in instructions.values():
            if (kind := kind_of(one, computation)) is None:
                continue
            groups = groups_of(one, module.partitions)
            asynchronous = apart.get(computation, apart.get(one.name, False))
            size = operand_bytes(one, instructions) * (len(groups[0]) if kind == "all-gather" else 1)
            scope = one.scope or outer.get(computation, "")
            found.append(Collective(kind, size, len(groups[0]), groups, times[computation], asynchronous, scope))
    return found


def sent_between_slices(module: Module) -> float:
    """Bytes that leave a device's slice by libtpu's MegaScale, whose sends are no collectives of the program."""
    times, total = module.times(), 0.0
    for name, instructions in module.computations.items():
        for one in instructions.values() if times[name] else ():
            found = re.search(r'_xla_megascale_target="{([\d,]+)}.*_xla_megascale_transfer_type="(\w+)"', one.rest)
            if one.opcode == "send" and found:
                slices = found[1].count(",") + 1
                copies = {"ALL_GATHER": slices - 1, "ALL_REDUCE": 2 * (slices - 1) / slices}
                share = copies.get(found[2], (slices - 1) / slices)
                total += times[name] * share * shape_bytes(instructions[one.operands[0]].shape)
    return total


def kind_of(one: Instruction, computation: str = "") -> str | None:
    """Of a collective or its start, else None. A TPU's reduce-scatter is a fusion of an all-reduce with a slice."""
    opcode = one.opcode.removesuffix("-start")
    if opcode == "all-reduce" and computation.startswith("%all-reduce-scatter"):
        return "reduce-scatter"
    return opcode if opcode in KINDS else None


def operand_bytes(one: Instruction, instructions: dict[str, Instruction]) -> int:
    """Of a collective's operands; a ragged one's are its data, then the result's place and the sizes."""
    names = one.operands[:1] if one.opcode.startswith("ragged") else one.operands
    return sum(shape_bytes(instructions[name].shape) for name in names)


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


def _asynchronous(module: Module) -> dict[str, bool]:
    """Of starts by their names, and of computations that run apart by theirs: whether work stands before their end."""
    found = {}
    for instructions in module.computations.values():
        pending: dict[str, str] = {}  # a start, or an update of it, to the start
        for one in instructions.values():
            if one.opcode.endswith("-start"):
                pending[one.name] = one.name
                for name in (one.name, *one.called):
                    found[name] = False
            elif one.opcode == "async-update" and one.operands[0] in pending:
                pending[one.name] = pending[one.operands[0]]
            elif one.opcode.endswith("-done"):
                start = pending.get(one.operands[0])
                pending = {name: its for name, its in pending.items() if its != start}
            elif one.opcode not in IDLE:
                for start in pending.values():
                    if '"is_sync":true' not in instructions[start].rest:
                        for name in (start, *instructions[start].called):
                            found[name] = True
    return found


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


# {{0,1},{2,3}}; [2,2]<=[4], [2,2]<=[2,2]T(1,0): numbers, transposed, cut; mesh['a'=2,'b'=4] {'b'}: along axes.
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"({(?:{[\d,]*},?)*}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[[^\]]*\][^{]*{[^}]*})"
)


def groups_of(one: Instruction, partitions: int) -> tuple[tuple[int, ...], ...]:
    """The devices that take part together in a collective; of a collective-permute (source, target).

    Raises ValueError where they are written in a way that is not known.
    """
    found = _GROUPS.search(one.rest)
    if not found and "replica_groups=" in one.rest:
        raise ValueError(f"replica groups of {one.name} in an unknown form: {one.rest[:200]}")
    return (_parsed(found[1]) if found else ()) or (tuple(range(partitions)),)


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> tuple[tuple[int, ...], ...]:
    if text.startswith("{"):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"{([\d,]+)}", text))
    if text.startswith("mesh"):
        return _along_axes(text)
    parts = re.fullmatch(r"\[([\d,]+)\]<=(.*)", text)
    assert parts, text
    return tuple(tuple(group) for group in _numbered(parts[2]).reshape(_sizes(parts[1])).tolist())


def _along_axes(text: str) -> tuple[tuple[int, ...], ...]:
    parts = re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? {((?:'[^']+',?)*)}", text)
    if not parts:  # parts of axes, perhaps
        raise ValueError(f"replica groups in an unknown form: {text}")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", parts[1])}
    along = re.findall(r"'([^']+)'", parts[3])
    places = _numbered(parts[2] or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
    order = [list(sizes).index(name) for name in (*(name for name in sizes if name not in along), *along)]
    groups = places.transpose(order).reshape(-1, math.prod(sizes[name] for name in along))
    return tuple(tuple(group) for group in groups.tolist())


def _numbered(text: str) -> np.ndarray:
    """``[4,2]T(1,0)``: numbers from 0 in an array of that shape, transposed."""
    parts = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not parts:
        raise ValueError(f"replica groups in an unknown form: {text}")
    places = np.arange(math.prod(_sizes(parts[1]))).reshape(_sizes(parts[1]))
    return places.transpose(_sizes(parts[2])) if parts[2] else places


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def totals(found: list[Collective]) -> Iterator[tuple[str, int, float]]:
    """(kind, how often, bytes that leave a device) of each kind that is there."""
    for kind in KINDS:
        if of := [one for one in found if one.kind == kind]:
            yield kind, sum(one.times for one in of), sum(one.times * one.sent_bytes for one in of)

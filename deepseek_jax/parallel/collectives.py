"""What a compiled program sends between devices: its collectives, from the text of its HLO."""

import dataclasses
import functools
import math
import re

import numpy as np

from deepseek_jax.parallel.hlo import Instruction, Module, shape_bytes

KINDS = "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all"
# What takes no time of a device's units, so that nothing hides behind it.
_IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_IDLE |= {"copy-start", "copy-done", "async-start", "async-update", "async-done", "opt-barrier"}
_IDLE |= {kind + part for kind in KINDS for part in ("-start", "-done")}


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
            elif one.opcode not in _IDLE:
                for start in pending.values():
                    if '"is_sync":true' not in instructions[start].rest:
                        for name in (start, *instructions[start].called):
                            found[name] = True
    return found


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

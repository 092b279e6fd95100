"""How long a compiled program takes at the rates of its chip, walked through in the order of its schedule."""

import dataclasses
import re
from collections.abc import Callable

from deepseek_jax.parallel.collectives import groups_of, kind_of, operand_bytes, sent_between_slices
from deepseek_jax.parallel.hlo import Instruction, Module
from deepseek_jax.parallel.hlo_work import Moved, convolution_flops, dot_flops, grouped_flops, rows_and_matrices
from deepseek_jax.parallel.topology import Links

# Of no time of their own: names for what is there, or (waits) seen to where they start and end.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
_FREE |= {"replica-id", "opt-barrier", "reshape", "async-update", "domain", "add-dependency"}
# (scope) -> FLOPs of a kernel that the text says nothing of, None where it is unknown.
KernelFlops = Callable[[str], float | None]
# (rows, groups) of a grouped product -> of how many rows tiles are multiplied.
GroupedRows = Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a kind along the same axes of the mesh and out of the same place in the program."""

    kind: str
    axes: tuple[str, ...]
    crosses: bool
    """Whether it goes between slices or nodes."""
    scope: str
    times: int
    sent: float
    """Bytes that leave a device."""
    seconds: float
    """On the links."""
    exposed: float
    """Seconds in which nothing else is done."""
    asynchronous: bool


@dataclasses.dataclass
class Estimate:
    """Of one device and one run of the program."""

    seconds: float = 0.0
    compute: float = 0.0
    """Seconds of products, kernels and whatever else is read and written."""
    exposed: float = 0.0
    """Seconds in which a device waits for collectives."""
    flops: float = 0.0
    """Of products and kernels, those done again included."""
    memory_bytes: float = 0.0
    """Read from and written to memory."""
    unknown: dict[str, int] = dataclasses.field(default_factory=dict)
    """Kernels whose FLOPs nothing tells, by their scopes: they count for what they read and write alone."""
    traffic: list[Traffic] = dataclasses.field(default_factory=list)
    between_slices: float = 0.0
    """Bytes that leave a device's slice of TPUs, which no collective of the program tells of: not in the time."""


def estimate(
    text: str,
    links: Links,
    kernel_flops: KernelFlops = lambda scope: None,
    turns: Callable[[str], int] = lambda scope: 1,
    grouped_rows: GroupedRows = lambda rows, groups: rows,
) -> Estimate:
    """The time of an optimised module (``compiled.as_text()``) on ``links``' chips.

    Instructions follow one another as the schedule has them, each at the larger of FLOPs / peak and bytes / bandwidth
    (``Chip.attained``, where that was measured). A collective waits for its links, and all else for it; one that the
    schedule makes asynchronous delays what comes after its end alone. Loops count as often as they turn,
    those of which the text does not tell as ``turns`` says of their scopes. Grouped products on TPUs, which pass over
    tiles of no group, are counted for ``grouped_rows``.
    """
    walk = _Walk(Module(text, turns), links, kernel_flops, grouped_rows)
    walk.total.seconds = walk.run(walk.module.entry, 1)
    walk.total.between_slices = sent_between_slices(walk.module)
    walk.total.traffic = sorted(walk.traffic.values(), key=lambda one: -one.exposed)
    return walk.total


class _Walk:
    def __init__(self, module: Module, links: Links, kernel_flops: KernelFlops, grouped_rows: GroupedRows):
        self.module, self.links, self.kernel_flops, self.grouped_rows = module, links, kernel_flops, grouped_rows
        self.chip = links.topology.chip
        self.total, self.traffic = Estimate(), {}
        self.moved = Moved(module)

    def run(self, computation: str, times: int) -> float:
        """Seconds of one run, of ``times``, which the totals count."""
        instructions = self.module.computations[computation]
        now, network = 0.0, 0.0  # network: when its links are free
        ends: dict[str, tuple[float, Instruction, str]] = {}  # by starts and their updates
        for one in instructions.values():
            started = self._started(one, computation)
            if started is not None:
                collective, inside = started
                if collective is None:  # a copy, or a call apart
                    ends[one.name] = (now + (self._apart(one, times) if inside else 0.0), one, "")
                    continue
                seconds = self._seconds(collective, inside)
                network = max(now, network) + seconds
                if one.opcode.endswith("-start") and '"is_sync":true' not in one.rest:
                    ends[one.name] = (network, collective, inside)
                else:
                    self._count(collective, inside, times, seconds, network - now, False)
                    now = network
            elif one.opcode == "async-update":
                ends[one.name] = ends.pop(one.operands[0], (0.0, one, ""))
            elif one.opcode.endswith("-done"):
                end, collective, inside = ends.pop(one.operands[0], (0.0, one, ""))
                waited = max(0.0, end - now)
                if kind_of(collective, inside):
                    self._count(collective, inside, times, self._seconds(collective, inside), waited, True)
                now += waited
            elif one.opcode == "while":
                turns = self.module.trips(computation, one)
                body = next(name for name in one.called if f"body={name}" in one.rest)
                now += turns * self.run(body, times * turns) if turns else 0.0
            elif one.opcode == "conditional":
                now += max((self.run(name, times) for name in one.called), default=0.0)
            elif one.opcode == "call":
                now += sum(self.run(name, times) for name in one.called)
            elif one.opcode not in _FREE:
                now += self._work(one, instructions, times)
        return now

    def _started(self, one: Instruction, computation: str) -> tuple[Instruction | None, str] | None:
        """(A collective and where its operands are, which begins here); (None, …) of what else runs apart."""
        if kind_of(one):
            return one, computation
        if one.opcode in ("async-start", "call-start", "copy-start", "fusion", "fusion-start"):
            for name in one.called:
                for inner in self.module.computations[name].values():
                    if kind_of(inner, name):
                        named = inner if inner.scope else dataclasses.replace(inner, rest=inner.rest + one.rest)
                        return named, name
            if one.opcode != "fusion":
                return None, next(iter(one.called), "")
        return None

    def _apart(self, one: Instruction, times: int) -> float:
        return sum(self.run(name, times) for name in one.called)

    def _seconds(self, one: Instruction, computation: str) -> float:
        kind = kind_of(one, computation)
        assert kind
        groups = groups_of(one, self.module.partitions)
        return self.links.seconds(kind, self._size(one, computation), groups)

    def _size(self, one: Instruction, computation: str) -> int:
        groups = groups_of(one, self.module.partitions)
        size = operand_bytes(one, self.module.computations[computation])
        return size * (len(groups[0]) if kind_of(one, computation) == "all-gather" else 1)

    def _count(
        self, one: Instruction, computation: str, times: int, seconds: float, waited: float, apart: bool
    ) -> None:
        kind, groups = kind_of(one, computation), groups_of(one, self.module.partitions)
        assert kind
        members = len(groups[0])
        share = 1.0 if kind == "collective-permute" else (members - 1) / members * (2 if kind == "all-reduce" else 1)
        key = kind, self.links.axes(groups), self.links.crosses(groups), short(one.scope), apart
        old = self.traffic.get(key) or Traffic(*key[:4], 0, 0.0, 0.0, 0.0, apart)
        self.traffic[key] = dataclasses.replace(
            old,
            times=old.times + times,
            sent=old.sent + times * share * self._size(one, computation),
            seconds=old.seconds + times * seconds,
            exposed=old.exposed + times * waited,
        )
        self.total.exposed += times * waited

    def _work(self, one: Instruction, instructions: dict[str, Instruction], times: int) -> float:
        flops, moved = self._flops(one, instructions), self.moved.of(one, instructions)
        seconds = max(
            flops / (self.chip.flops * self._share(one)), moved / self.chip.bandwidth / self.chip.attained_bandwidth
        )
        self.total.flops += times * flops
        self.total.memory_bytes += times * moved
        self.total.compute += times * seconds
        return seconds

    def _share(self, one: Instruction) -> float:
        """Of the peak, what such work attains."""
        if one.opcode != "custom-call" or "matmul" in one.rest[:200]:
            return self.chip.attained
        return self.chip.attention if "attention" in one.scope else self.chip.experts

    def _flops(self, one: Instruction, instructions: dict[str, Instruction]) -> float:
        if one.opcode == "fusion":
            inner = self.module.computations[one.called[0]]
            return sum(self._flops(each, inner) for each in inner.values())
        if one.opcode in ("dot", "convolution"):
            operands = [instructions[name].shape for name in one.operands[:2]]
            return dot_flops(one, *operands) if one.opcode == "dot" else convolution_flops(one, *operands)
        if one.opcode != "custom-call":
            return 0.0
        return self._kernel(one, instructions)

    def _kernel(self, one: Instruction, instructions: dict[str, Instruction]) -> float:
        target = (re.search(r'custom_call_target="([^"]*)"', one.rest) or ["", ""])[1]
        if "matmul" in target or "gemm" in target:
            return dot_flops(one, *(instructions[name].shape for name in one.operands[:2]))
        if target not in ("tpu_custom_call", "mosaic_gpu_v2") and "cudnn" not in target:
            return 0.0  # a name for memory, or a sort
        grouped = rows_and_matrices(one, instructions)
        if "gmm" in one.scope and grouped is not None:
            (rows, *_), (_, terms, columns) = grouped
            return 2.0 * min(rows, self.grouped_rows(rows, grouped[1][0])) * terms * columns
        if found := re.search(r'"cost_estimate":{"flops":"(\d+)"', one.rest):
            return float(found[1])
        known = self.kernel_flops(one.scope)
        known = grouped_flops(one, instructions) if known is None else known
        if known is None:
            self.total.unknown[short(one.scope)] = self.total.unknown.get(short(one.scope), 0) + 1
        return known or 0.0


def short(scope: str) -> str:
    """A scope without what jax puts around names: whether it is of the backward pass, and the names.

    >>> short("jit(step)/transpose(jvp())/while/body/closed_call/checkpoint/mlp/experts/shard_map/all_to_all")
    'backward mlp/experts/all_to_all'
    """
    first, *merged = scope.split(":")  # of several that the compiler made one
    if merged:
        return f"{short(first.replace('/(', '/').lstrip('('))} and {len(merged)} more"
    noise = {"while", "body", "closed_call", "checkpoint", "shard_map", "cond", "jvp()", "transpose(jvp())", ""}
    parts = [part for part in scope.split("/") if part not in noise and not part.startswith("jit(")]
    names = [part for part in parts if part != "rematted_computation"]
    again = "again " if len(names) < len(parts) else "backward " if "transpose(" in scope else ""
    return again + "/".join(names)

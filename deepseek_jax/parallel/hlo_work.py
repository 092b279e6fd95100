"""What one instruction of a program's HLO computes and moves: FLOPs of products, bytes of memory."""

import functools
import math
import re

import numpy as np

from deepseek_jax.parallel.hlo import Instruction, Module, arrays, shape_bytes

_SLICES = "dynamic-slice", "slice", "gather"


class Moved:
    """The bytes that a module's instructions read from memory and write to it."""

    def __init__(self, module: Module):
        self.module = module

    def of(self, one: Instruction, instructions: dict[str, Instruction]) -> float:
        """Of one of them: of operands of which a slice is read that slice, of updates in place what is written."""
        if one.opcode in _SLICES:
            return 2.0 * memory_bytes(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2.0 * memory_bytes(instructions[one.operands[1]].shape)
        if one.opcode != "fusion":
            given = (memory_bytes(instructions[name].shape) for name in one.operands if name in instructions)
            return float(sum(given)) + memory_bytes(one.shape)
        return self._fused(one.called[0], [instructions[name].shape for name in one.operands]) + self._written(one)

    @functools.cache  # noqa: B019
    def _reads(self, computation: str) -> dict[int, int | None]:
        """Of a fusion's parameters the bytes that are read, None: all."""
        inner = self.module.computations[computation]
        given = [one for one in inner.values() if one.opcode == "parameter"]
        return {int(one.rest.split(")")[0]): self._read(computation, one.name) for one in given}

    def _read(self, computation: str, name: str) -> int | None:
        """The same of any value in it, through what XLA lays out anew inside fusions, of which only the part that is
        used is ever made."""
        inner, total = self.module.computations[computation], 0
        if name == self.module.roots[computation]:
            return None
        for user in inner.values():
            for place in (place for place, operand in enumerate(user.operands) if operand == name):
                if user.opcode in _SLICES and place == 0:
                    part = shape_bytes(user.shape)
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    part = 0
                elif self._same(user):
                    part = self._read(computation, user.name)
                else:
                    part = self._reads(user.called[0]).get(place) if user.opcode == "fusion" else None
                if part is None:
                    return None
                total += part
        return total

    def _same(self, one: Instruction) -> bool:
        """Whether it holds the numbers of its operand, in whatever layout."""
        if one.opcode != "fusion":
            return one.opcode in ("bitcast", "convert", "copy")
        inner = self.module.computations[one.called[0]]
        return len(one.operands) == 1 and all(each.opcode == "parameter" or self._same(each) for each in inner.values())

    def _fused(self, computation: str, shapes: list[str]) -> float:
        reads = self._reads(computation)
        total = 0.0
        for place, shape in enumerate(shapes):
            part, whole = reads.get(place), memory_bytes(shape)
            total += whole if part is None else min(part, whole)
        return total

    def _written(self, one: Instruction) -> float:
        inner = self.module.computations[one.called[0]]
        root = inner[self.module.roots[one.called[0]]]
        parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total, outputs = 0.0, arrays(one.shape)
        for part, output in zip(parts, outputs, strict=False):
            while self._same(part) and part.operands[0] in inner:
                part = inner[part.operands[0]]
            if part.opcode == "dynamic-update-slice":
                total += min(memory_bytes(output), shape_bytes(inner[part.operands[1]].shape))
            else:
                total += memory_bytes(output)
        return total


def memory_bytes(shape: str) -> int:
    """Of an array or tuple, but for parts in a chip's own memory (S(1) and higher in a layout)."""
    return sum(shape_bytes(part) for part in arrays(shape) if not re.search(r"S\([1-9]\d*\)", part))


def dot_flops(one: Instruction, lhs: str, rhs: str) -> float:
    """2 × the numbers of the result × the terms of each, also of cuBLAS's calls."""
    found = re.search(r'lhs_contracting_dim(?:s=|ensions":\[)"?([\d,{}"]*)', one.rest)
    sizes = _sizes(lhs)
    contracted = [int(number) for number in re.findall(r"\d+", found[1])] if found else []
    return 2.0 * math.prod(_sizes(one.shape)) * math.prod(sizes[place] for place in contracted)


def convolution_flops(one: Instruction, lhs: str, rhs: str) -> float:
    """2 × batch × features in and out × the pairs of places in which input and kernel meet, along each dimension."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", one.rest)
    assert labels, one.rest[:200]
    of = lambda shape, names: dict(zip(names, _sizes(shape), strict=True))  # noqa: E731
    given, kernel, out = of(lhs, labels[1]), of(rhs, labels[2]), of(one.shape, labels[3])
    window = re.search(r"window={([^}]*)}", one.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    dimensions = sum(name.isdigit() for name in out)
    option = lambda name, default: options.get(name, "x".join([default] * dimensions)).split("x")  # noqa: E731
    for place in (name for name in out if name.isdigit()):
        low = int(option("pad", "0_0")[int(place)].split("_")[0])
        how = (int(option(name, "1")[int(place)]) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        stride, spread, dilated = how
        begin = np.arange(out[place])[:, None] * stride + np.arange(kernel[place]) * spread - low
        inside = (begin >= 0) & (begin <= (given[place] - 1) * dilated) & (begin % dilated == 0)
        pairs *= int(inside.sum())
    return 2.0 * out.get("b", 1) * out.get("f", 1) * kernel.get("i", 1) * pairs


def grouped_flops(one: Instruction, instructions: dict[str, Instruction]) -> float | None:
    """Of rows (R A) by matrices (E A B), and of its gradients: 2 R A B. None for other operands."""
    found = rows_and_matrices(one, instructions)
    return None if found is None else 2.0 * found[0][0] * found[1][1] * found[1][2]


def rows_and_matrices(one: Instruction, instructions: dict[str, Instruction]) -> tuple[list[int], list[int]] | None:
    """The sizes of its rows and its matrices."""
    shapes = [instructions[name].shape for name in one.operands] + [one.shape]
    found = [_sizes(part) for shape in shapes for part in arrays(shape) if not part.startswith(("s32", "s8", "u8"))]
    matrices, rows = [x for x in found if len(x) == 3], [x for x in found if len(x) == 2]
    return (rows[0], matrices[-1]) if matrices and rows else None


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []

"""Weights as int8 or int4 in groups: ``W = q · scale`` with a scale for each ``group`` terms that one output sums.

Symmetric, without zero points; scales are bfloat16, and the numbers are rounded against what the scale became. A
``BlockScaled`` holds them, as it holds FP8: what differs is the dtype of its values, and that each output has scales of
its own. XLA keeps two int4 to a byte on CPUs, GPUs and TPUs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu
from deepseek_kernels.block_fp8 import BlockScaled, split_shape
from deepseek_kernels.target import Target
from deepseek_kernels.weights import InStack, Weight, block_scaled

DTYPES = {8: jnp.dtype(jnp.int8), 4: jnp.dtype(jnp.int4)}
GROUP = 128
# What the largest number of a group may become, of which the one with the smallest squared error is taken: with 4 bits
# it pays to cut the largest off for finer steps.
_LARGEST = {8: (127.0,), 4: (7.0, 7.5, 8.0, 8.75, 9.5, 10.5)}


def bits_of(dtype: Any) -> int:
    """8 or 4; 0 for a dtype that is neither."""
    return next((bits for bits, known in DTYPES.items() if dtype == known), 0)


def in_integers(w: Any) -> bool:
    """Whether it is a BlockScaled in int8 or int4."""
    return isinstance(w, BlockScaled) and bits_of(w.dtype) > 0


def refuses_c(
    target: Target, dtype: Any, *, weight: Weight = None, devices: int = 1, rows: int = 0, groups: int = 1, **_: Any
) -> str:
    """Why the C kernel cannot multiply with this weight; "" where it can."""
    scaled = block_scaled(weight)
    if scaled is None or not in_integers(scaled) or target.platform != "cpu" or dtype != jnp.float32 or devices > 1:
        return "it needs float32 rows on one CPU and a weight in integers"
    depth, group = split_shape(scaled.shape, scaled.groups)[1][0], scaled.groups[0][1]
    if not scaled.terms_last or depth % 32 or group % 32:
        return (
            f"it needs terms last, and those of a product and of a group by 32, not groups of {group} in {scaled.shape}"
        )
    if rows > _FEW * groups:
        return f"it is for {_FEW} rows of a matrix, not {rows} of {groups}"
    return "" if cpu.available() else "it needs Linux and a C compiler"


_FEW = 64  # rows up to which reading the numbers counts more than arithmetic
_TILE = 2**24  # numbers of a matrix that are dequantised at once


def matrices(w: Weight) -> tuple[Any, Any, Any]:
    """All matrices (E, F, D), their scales (E, K, F), and the number of w's first."""
    scaled = block_scaled(w)
    assert scaled is not None
    scaled = scaled.with_terms_last()
    lead, (depth, *_) = split_shape(scaled.shape, scaled.groups)
    count, mine = math.prod(lead), math.prod(lead[1:]) if isinstance(w, InStack) else 0
    values = scaled.values.reshape(count, -1, depth)
    scales = scaled.scales.reshape(count, -1, values.shape[1])
    return values, scales, w.layer * mine if isinstance(w, InStack) else 0


def grouped_c(x_TD: Float[Array, "T D"], w: Weight, sizes_E: Int[Array, "E"]) -> Float[Array, "T F"]:
    """Rows sorted by group times each group's matrix, by the C kernel."""
    values, scales, first = matrices(w)
    scaled = block_scaled(w)
    assert scaled is not None
    numbers = jnp.stack([jnp.int32(scaled.groups[0][1]), jnp.int32(first), jnp.int32(bits_of(scaled.dtype))])
    shapes = [(len(x_TD), values.shape[1])]
    return cpu.call("integers_forward", shapes, x_TD, values, scales, sizes_E.astype(jnp.int32), numbers)[0]


def dequantised_product(x_TD: Float[Array, "T D"], w: Weight, number: Any = 0) -> Float[Array, "T F"]:
    """``x @ W`` in x's dtype with float32 sums, of matrix ``number``: some of its outputs' numbers are dequantised at a
    time, as many as ``_TILE`` holds."""
    values, scales, first = matrices(w)
    width, depth = values.shape[1:]
    scaled, number = block_scaled(w), number + first
    assert scaled is not None
    group = scaled.groups[0][1]
    each = next((parts for parts in range(-(-width * depth // _TILE), width + 1) if width % parts == 0), 1)
    size = width // each

    def part(j: Any) -> jax.Array:
        q_FD = jax.lax.dynamic_slice(values, (number, j * size, 0), (1, size, depth))[0]
        scale_KF = jax.lax.dynamic_slice(scales, (number, 0, j * size), (1, scales.shape[1], size))[0]
        scale_FD = jnp.repeat(scale_KF.T, group, axis=1)[:, :depth]
        w_FD = (q_FD.astype(jnp.float32) * scale_FD).astype(x_TD.dtype)
        sides = ((1,), (1,)), ((), ())
        return jax.lax.dot_general(x_TD, w_FD, sides, preferred_element_type=jnp.float32).astype(x_TD.dtype)

    if each == 1:
        return part(0)
    return jnp.moveaxis(jax.lax.map(part, jnp.arange(each)), 0, 1).reshape(len(x_TD), width)


def grouped_by_matrix(
    x_TD: Float[Array, "T D"], w: Weight, group_N: Int[Array, "N"], groups: int
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ W[g]`` for ``g`` the group of t's block of T/N rows, block after block, so that one matrix at a
    time is dequantised; zero where that is no group."""
    width = matrices(w)[0].shape[1]

    def block(operands):
        x_MD, g = operands
        nothing = lambda: jnp.zeros((len(x_MD), width), x_MD.dtype)  # noqa: E731
        return jax.lax.cond(g < groups, lambda: dequantised_product(x_MD, w, g), nothing)

    blocks = x_TD.reshape(len(group_N), -1, x_TD.shape[1])
    return jax.lax.map(block, (blocks, group_N)).reshape(len(x_TD), width)


def quantise_groups(w_IO: Any, bits: int, group: int = GROUP, *, xp: Any = jnp) -> tuple[Any, Any]:
    """(Numbers (I, O) of ``bits``, bfloat16 scales (G, O)) of a matrix whose rows are the terms; the last group may be
    shorter.

    A group of zeros has scale 1. xp: ``jnp``, or ``numpy`` to work in host memory.

    Raises:
      ValueError: bits that are not 8 or 4.
    """
    if bits not in DTYPES:
        raise ValueError(f"bits={bits}: expected one of {', '.join(map(str, DTYPES))}")
    rows, columns = w_IO.shape
    padded = xp.pad(w_IO.astype(xp.float32), ((0, -rows % group), (0, 0)))
    blocks_GNO = padded.reshape(-1, group, columns)
    largest_GO = xp.max(xp.abs(blocks_GNO), axis=1, keepdims=True)
    found: Any = None
    for most in _LARGEST[bits]:
        scale_GO = (largest_GO / most).astype(jnp.bfloat16)
        scale_GO = xp.where(scale_GO > 0, scale_GO, xp.ones_like(scale_GO))
        wide = scale_GO.astype(xp.float32)
        q_GNO = xp.clip(xp.round(blocks_GNO / wide), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error_GO = xp.sum((q_GNO * wide - blocks_GNO) ** 2, axis=1, keepdims=True)
        if found is None:
            found = q_GNO, scale_GO, error_GO
        else:
            better = error_GO < found[2]
            found = tuple(
                xp.where(better, new, old) for new, old in zip((q_GNO, scale_GO, error_GO), found, strict=True)
            )
    q_IO = found[0].reshape(padded.shape)[:rows].astype(xp.int8).astype(DTYPES[bits])
    return q_IO, found[1][:, 0]


def pack(q_OI: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers (O, I) as compressed-tensors' ``pack-quantized`` has them: int32 (O, ⌈I · bits / 32⌉), in each the
    numbers of 32 / bits terms in a row from the lowest bits on, 2^(bits - 1) added to them."""
    each = 32 // bits
    shifted = q_OI.astype(np.int8).astype(np.int32) + 2 ** (bits - 1)
    padded = np.pad(shifted, ((0, 0), (0, -q_OI.shape[1] % each))).astype(np.uint32)
    packed = np.zeros((len(padded), padded.shape[1] // each), np.uint32)
    for i in range(each):
        packed |= padded[:, i::each] << np.uint32(bits * i)
    return packed.view(np.int32)


def unpack(packed_OJ: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of ``pack``, for rows of ``columns`` numbers: int8, or ml_dtypes' int4."""
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    numbers = packed_OJ.view(np.uint32)[:, :, None] >> shifts & np.uint32(2**bits - 1)
    numbers = numbers.astype(np.int16).reshape(len(packed_OJ), -1)[:, :columns] - 2 ** (bits - 1)
    return numbers.astype(np.int8).astype(DTYPES[bits])

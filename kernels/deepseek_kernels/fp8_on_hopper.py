"""Weights in FP8 or integers as Hopper's kernels read them: which fit, and where the matrices of one, or of a stack's
layer, lie."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_fp8, hopper_quantise, hopper_sizes
from deepseek_kernels.block_fp8 import BLOCK, BlockScaled, quantise_rows, split_shape
from deepseek_kernels.integers import in_integers
from deepseek_kernels.target import Target, devices
from deepseek_kernels.weights import InStack, Weight, block_scaled


def facts(w: Weight) -> dict[str, Any]:
    """What ``refuses`` is to know of a dense product: the weight, and over how many devices it may be split."""
    return {"weight": w, "devices": devices()}


def refuses(target: Target, dtype: Any, *, weight: Weight = None, devices: int = 1, **_: Any) -> str:
    """Why the kernels cannot run; "" where they can."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if devices > 1:
        return f"it needs a whole weight on one device, not a mesh of {devices}"
    return does_not_fit(weight)


def refuses_fp8_rows(target: Target, dtype: Any, **facts: Any) -> str:
    """The same where rows are brought to FP8 too."""
    if in_integers(block_scaled(facts.get("weight"))):
        return "it needs a weight in FP8, not in integers"
    return refuses(target, dtype, **facts)


def does_not_fit(w: Weight) -> str:
    """Why the kernels do not take this weight, "" where they do: FP8 in blocks of 128 × 128 of one matrix (D, F), or
    integers in groups of 128."""
    scaled = block_scaled(w)
    if scaled is None:
        return "it needs a weight in FP8 with scales for its blocks, or in integers"
    (_, first), *others = scaled.groups
    depth, *sizes = split_shape(scaled.shape, scaled.groups)[1]
    if in_integers(scaled):
        if first != BLOCK or depth % BLOCK or (width := math.prod(sizes)) % 64 or width < BLOCK:
            wanted = f"it needs groups of {BLOCK}, D of a multiple of that, F of {BLOCK} and further multiples of 64"
            return f"{wanted}, not groups of {first} in {scaled.shape}"
        return ""
    # Blocks of the last axis must not reach over its end where others are merged with it.
    whole = len(sizes) == 1 or sizes[-1] % BLOCK == 0
    if first != BLOCK or [block for _, block in others] != [1] * (len(others) - 1) + [BLOCK] or not whole:
        return f"it needs blocks of {BLOCK} × {BLOCK} of a matrix, not {scaled.groups} of {scaled.shape}"
    # What is handed over is 64 columns wide: where that reached over a row's end, it was written to the next one.
    if depth % BLOCK or (width := math.prod(sizes)) % 64 or width < BLOCK:
        return f"it needs D of a multiple of {BLOCK}, F of that and further multiples of 64, not {scaled.shape}"
    return ""


def laid_out(w: BlockScaled, target: Target) -> BlockScaled:
    """The weight as the target's kernels read it; of many layers too."""
    ours = (target.platform, target.chip) == ("cuda", "9.0") and not does_not_fit(w)
    return w.with_terms_last() if ours or in_integers(w) else w  # integers' portable products want it too


def multiply(
    x_TD: Float[Array, "T D"], w: Weight, group_N: Int[Array, "N"], *, cores: int, quantised: bool
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ W[g]`` on Hopper for ``g`` the group of t's tile of T/N rows, 16, 32, 64 or 128; zero where that
    is not a group. quantised: x too is brought to FP8."""
    values_EFD, scales_EJK, groups, layer = _matrices(w)
    group_N = jnp.where(group_N < groups, group_N + layer * groups, len(values_EFD))
    if not quantised:  # of integers scales_EKF
        return hopper_fp8.few(x_TD, None, values_EFD, scales_EJK, group_N, cores=cores)
    many = len(x_TD) == BLOCK * len(group_N)
    kernel, rows = (hopper_fp8.many, hopper_quantise.quantise_rows) if many else (hopper_fp8.few, quantise_rows)
    return kernel(*rows(x_TD), values_EFD, scales_EJK, group_N, cores=cores)


def _matrices(w: Weight) -> tuple[jax.Array, jax.Array, int, Any]:
    """All matrices as (E, F, D), their scales as (E, F/128, D/128), of integers (E, D/128, F), how many are of one
    layer, and w's layer."""
    scaled = block_scaled(w)
    assert scaled is not None
    if isinstance(w, InStack) and not scaled.terms_last:  # one layer is transposed, not all
        w = scaled = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, w.layer, keepdims=False), scaled)
    lead, (depth, *sizes) = split_shape(scaled.shape, scaled.groups)
    laid = scaled.with_terms_last()
    values = laid.values.reshape(-1, math.prod(sizes), depth)
    ends = (depth // BLOCK, -1) if laid.own_scales else (-1, depth // BLOCK)
    scales = laid.scales.reshape(len(values), *ends)
    in_stack = isinstance(w, InStack)
    return values, scales, math.prod(lead[in_stack:]), w.layer if in_stack else 0

"""Grouped products on TPUs by jax's megablox: forward and both gradients at the FLOPs that the rows need.

A tile is rows by terms by columns. Groups lie as they come: a tile of rows in which groups meet is multiplied once for
each, and each stores its own rows. So tiles of rows are a small part of a mean group.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from deepseek_kernels import tpu
from deepseek_kernels.target import Target


def refuses(target: Target, dtype: Any, *, widths: tuple[int, ...] = (), **_: Any) -> str:
    """Why the kernels cannot run; "" where they can."""
    if why := tpu.refuses(target, dtype):
        return why
    if any(width < tpu.LANES for width in widths):
        return f"it needs widths of at least {tpu.LANES}, not {widths}"
    return ""


def grouped_product(
    x_TD: Float[Array, "T D"],
    w: Float[Array, "G _ _"],
    group_sizes_E: Int[Array, "E"],
    first: Any = 0,
    *,
    chip: str,
    transpose: bool = False,
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[first + e]``, or ``x[t] @ w[first + e]ᵀ``, for ``e`` the group of t; zero past the last."""
    (T, D), F, chosen = x_TD.shape, w.shape[1 if transpose else 2], tpu.CHIPS[chip]
    rows, tile = tpu.row_tile(T, len(group_sizes_E), chosen.rows), tpu.matrix_tile(D, F, chosen.matrix, chosen.cores)
    y_TF = gmm(
        _whole(x_TD, rows),
        w,
        group_sizes_E,
        preferred_element_type=x_TD.dtype,
        tiling=(rows, *tile),
        group_offset=-jnp.asarray(first, jnp.int32),  # which it takes from a group's number to find the matrix
        transpose_rhs=transpose,
    )[:T]
    # What belongs to no group was not written at all.
    return jnp.where(jnp.arange(T)[:, None] < jnp.sum(group_sizes_E), y_TF, 0)


def grouped_weight_gradient(
    x_TD: Float[Array, "T D"], dy_TF: Float[Array, "T F"], group_sizes_E: Int[Array, "E"], *, chip: str, dtype: Any
) -> Float[Array, "E D F"]:
    """``dw[e] = Σ x[t]ᵀ dy[t]`` over the rows of group e: sums in float32, written in ``dtype``."""
    (T, D), F, chosen = x_TD.shape, dy_TF.shape[1], tpu.CHIPS[chip]
    rows = tpu.row_tile(T, len(group_sizes_E), chosen.rows)
    return tgmm(
        _whole(x_TD, rows).T,
        _whole(dy_TF, rows),
        group_sizes_E,
        preferred_element_type=dtype,
        tiling=(rows, *tpu.matrix_tile(D, F, chosen.dw, chosen.cores)),
    )


def _whole(x, rows):
    return jnp.pad(x, ((0, -len(x) % rows), (0, 0)))

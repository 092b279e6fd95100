"""Grouped products on NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, rows of a group on multiples of ``ROWS``.

Tiles of 128 × 256 are sums of products over steps of 64 terms; of two warp groups each multiplies half of the columns.
A tile's rows are of one group, so that its matrix is read where it lies: no masks, no copies.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_sizes
from deepseek_kernels.hopper_sizes import HOPPER, Sizes
from deepseek_kernels.hopper_tiles import step, tiled
from deepseek_kernels.target import Target

ROWS = 128  # of a tile; what a group's rows are padded to
GATED = HOPPER["grouped"].columns // 2  # what gate and up have of a tile in ``gated_product``
STEP = 64  # terms of a sum that one product takes
_STORE = 128  # bytes of a row that a warp group hands over at once: 2 · 128 · 128 = 32 KiB of shared memory


def refuses(target: Target, dtype: Any, *, widths: tuple[int, ...] = (), **_: Any) -> str:
    """Why the kernels cannot run; "" where they can. Narrower than a tile, an H200 gave zeros for a width of 64."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if any(width % STEP or width < HOPPER["grouped"].columns for width in widths):
        return f"it needs widths of {HOPPER['grouped'].columns} and further multiples of {STEP}, not {widths}"
    return ""


@functools.partial(jax.jit, static_argnames=("cores", "transpose", "sizes"))  # lowered once for all layers
def grouped_product(
    x_TD: Float[Array, "T D"],
    w: Float[Array, "E _ _"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    transpose: bool = False,
    sizes: Sizes | None = None,
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]``, or ``x[t] @ w[g]ᵀ``, for ``g`` the group of t's tile of rows; zero where that is E.

    cores: of the target, 0 for an H100's. sizes: the tuner's.
    """
    (rows, depth), groups, columns = x_TD.shape, len(w), w.shape[1 if transpose else 2]
    sizes = sizes or (HOPPER["grouped"] if transpose else _sizes(columns))  # a transposed one gains nothing

    def tile(position, group_N, x, w, y):
        _, i, j = position
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * sizes.columns, sizes.columns)
        w = w.at[jnp.minimum(group_N[i], groups - 1)]
        steps = jnp.where(group_N[i] < groups, depth // STEP, 0)
        return x.at[down], w.at[across] if transpose else w.at[:, across], y.at[down, across], steps

    out = jax.ShapeDtypeStruct((rows, columns), x_TD.dtype)
    grid = 1, rows // ROWS, pl.cdiv(columns, sizes.columns)
    return _tiled(tile, grid, out, cores, sizes, transpose_rhs=transpose)(group_N.astype(jnp.int32), x_TD, w)


@functools.partial(jax.jit, static_argnames="cores")
def gated_product(
    x_TD: Float[Array, "T D"], w: Float[Array, "E D G"], group_N: Int[Array, "N"], *, cores: int
) -> Float[Array, "T F"]:
    """``silu(x[t] @ gate) · (x[t] @ up)`` for gate and up the halves of ``w[g]``, g as in ``grouped_product``: what is
    summed in float32 is never written. F is a multiple of ``GATED``.

    A tile has as many columns of each; of two warp groups each multiplies half of the rows, and so has both.
    """
    (rows, depth), groups, columns, sizes = x_TD.shape, len(w), w.shape[2] // 2, HOPPER["grouped"]
    half, width = ROWS // 2, GATED
    assert columns % width == 0, columns

    def tile(position, warpgroup, group_N, x, w, y):
        i, j = plgpu.planar_snake(position[0], (rows // ROWS, columns // width), 0, sizes.band)
        w = w.at[jnp.minimum(group_N[i], groups - 1)]
        parts = tuple(w.at[:, pl.ds(first + j * width, width)] for first in (0, columns))
        mine = y.at[pl.ds(i * ROWS + warpgroup * half, half), pl.ds(j * width, width)]
        return x.at[pl.ds(i * ROWS, ROWS)], parts, mine, jnp.where(group_N[i] < groups, depth // STEP, 0)

    def products(warpgroup, x, parts):
        return tuple((x.at[pl.ds(warpgroup * half, half)], part) for part in parts)

    kernel = tiled(
        tile,
        products,
        (step((ROWS, STEP), False), (step((STEP, width), True),) * 2),
        (half, width),
        jax.ShapeDtypeStruct((rows, columns), x_TD.dtype),
        grid=(rows // ROWS * (columns // width),),
        cores=cores,
        stages=sizes.stages,
        stored=_STORE // x_TD.dtype.itemsize,
        joined=lambda gate, up: gate * up * jnp.square(jax.lax.rsqrt(1 + jnp.exp(-gate))),  # faster than a division
    )
    return kernel(group_N.astype(jnp.int32), x_TD, w)


def _sizes(columns: int) -> Sizes:
    """Tiles half as wide take 6 % longer for the same, where as much of them is filled."""
    wide, narrow = HOPPER["grouped"], HOPPER["grouped_narrow"]
    takes = lambda sizes: pl.cdiv(columns, sizes.columns) * sizes.columns  # noqa: E731
    return narrow if 1.06 * takes(narrow) < takes(wide) else wide


def grouped_weight_gradient(
    x_TD: Float[Array, "T D"],
    dy_TF: Float[Array, "T F"],
    group_sizes_E: Int[Array, "E"],
    *,
    cores: int,
    dtype: Any = jnp.float32,
    sizes: Sizes = HOPPER["grouped"],
) -> Float[Array, "E D F"]:
    """``dw[e] = Σ x[t]ᵀ dy[t]`` over the rows of group e; sizes are multiples of ``ROWS``. The sums, float32, are
    written in ``dtype``: as they are, or rounded once to bfloat16."""
    (rows, width), hidden, groups = x_TD.shape, dy_TF.shape[1], len(group_sizes_E)

    def tile(position, ends_E, x, dy, dw):
        e, i, j = position
        start = pl.multiple_of(jnp.where(e > 0, ends_E[jnp.maximum(e - 1, 0)], 0), ROWS)
        mine = pl.ds(start, rows)  # reaches past the end, where no step goes
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * sizes.columns, sizes.columns)
        return x.at[mine, down], dy.at[mine, across], dw.at[e, down, across], (ends_E[e] - start) // STEP

    out = jax.ShapeDtypeStruct((groups, width, hidden), dtype)
    grid = groups, pl.cdiv(width, ROWS), pl.cdiv(hidden, sizes.columns)
    return _tiled(tile, grid, out, cores, sizes, transpose_lhs=True)(
        jnp.cumsum(group_sizes_E, dtype=jnp.int32), x_TD, dy_TF
    )


def _tiled(
    tile: Callable[..., tuple],
    grid: tuple[int, int, int],
    out: jax.ShapeDtypeStruct,
    cores: int,
    sizes: Sizes,
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> Callable[..., jax.Array]:
    """The kernel of ``(index, lhs, rhs) -> out`` over a grid of tiles.

    ``tile(position, index, lhs, rhs, out)`` gives for a place in the grid its rows of lhs, columns of rhs, part of out
    and the number of steps, 0 for a tile of zeros. What sticks out of an array is read as zero and not written.
    """
    half = sizes.columns // 2

    def place(index, warpgroup, *operands):
        position = index[0], *plgpu.planar_snake(index[1], grid[1:], 0, sizes.band)
        lhs, rhs, out, steps = tile(position, *operands)
        return lhs, rhs, out.at[:, pl.ds(warpgroup * half, half)], steps

    def product(warpgroup, lhs, rhs):
        mine = pl.ds(warpgroup * half, half)
        rhs = rhs.at[mine].transpose((1, 0)) if transpose_rhs else rhs.at[:, mine]
        return lhs.transpose((1, 0)) if transpose_lhs else lhs, rhs

    blocks = [
        (STEP, size) if first else (size, STEP)
        for size, first in ((ROWS, transpose_lhs), (sizes.columns, not transpose_rhs))
    ]
    return tiled(
        place,
        product,
        (step(blocks[0], transpose_lhs), step(blocks[1], not transpose_rhs)),
        (ROWS, half),
        out,
        grid=(grid[0], grid[1] * grid[2]),
        cores=cores,
        stages=sizes.stages,
        stored=_STORE // out.dtype.itemsize,
    )

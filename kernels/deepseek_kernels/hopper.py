"""Grouped products on NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, rows of a group on multiples of ``ROWS``.

Tiles of 128 × 256 are computed one by one, each as a sum of products over steps of 64 terms: one warp group streams
both operands to shared memory, two multiply, half of the columns each. As many blocks as the GPU has processors take
the tiles in turn. A tile's rows are of one group, so that its matrix is read where it lies: no masks, no copies.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.target import Target

ROWS = 128  # of a tile; what a group's rows are padded to
_COLUMNS = 256  # of a tile
_HALF = _COLUMNS // 2  # what one warp group multiplies
_STEP = 64  # terms of a sum that one product takes
_STAGES = 4  # steps in shared memory at once: 4 · (128 + 256) · 64 · 2 bytes = 192 of 227 KiB
_STORE = 128  # bytes of a row that a warp group hands over at once: 2 · 128 · 128 = 32 KiB more
_BAND = 8  # tiles of rows taken side by side: what they read of a matrix stays in the second-level cache
CORES = 132  # of an H100 and an H200


def refuses(target: Target, dtype: Any, *, widths: tuple[int, ...] = (), **_: Any) -> str:
    """Why the kernels cannot run; "" where they can. Narrower than a tile, an H200 gave zeros for a width of 64."""
    if (target.platform, target.chip) != ("cuda", "9.0"):
        return f"it needs cuda of capability 9.0, not {target.platform} {target.chip}".rstrip()
    if dtype != jnp.bfloat16:
        return f"it needs bfloat16, not {dtype.name}"
    if any(width % _STEP or width < _COLUMNS for width in widths):
        return f"it needs widths of {_COLUMNS} and further multiples of {_STEP}, not {widths}"
    return ""


@functools.partial(jax.jit, static_argnames=("cores", "transpose"))  # lowered once for all layers
def grouped_product(
    x_TD: Float[Array, "T D"],
    w: Float[Array, "E _ _"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    transpose: bool = False,
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]``, or ``x[t] @ w[g]ᵀ``, for ``g`` the group of t's tile of rows; zero where that is E.

    cores: of the target, 0 for an H100's.
    """
    (rows, depth), groups, columns = x_TD.shape, len(w), w.shape[1 if transpose else 2]

    def tile(position, group_N, x, w, y):
        _, i, j = position
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * _COLUMNS, _COLUMNS)
        w = w.at[jnp.minimum(group_N[i], groups - 1)]
        steps = jnp.where(group_N[i] < groups, depth // _STEP, 0)
        return x.at[down], w.at[across] if transpose else w.at[:, across], y.at[down, across], steps

    out = jax.ShapeDtypeStruct((rows, columns), x_TD.dtype)
    grid = 1, rows // ROWS, pl.cdiv(columns, _COLUMNS)
    return _tiled(tile, grid, out, cores, transpose_rhs=transpose)(group_N.astype(jnp.int32), x_TD, w)


def grouped_weight_gradient(
    x_TD: Float[Array, "T D"],
    dy_TF: Float[Array, "T F"],
    group_sizes_E: Int[Array, "E"],
    *,
    cores: int,
    dtype: Any = jnp.float32,
) -> Float[Array, "E D F"]:
    """``dw[e] = Σ x[t]ᵀ dy[t]`` over the rows of group e; sizes are multiples of ``ROWS``. The sums, float32, are
    written in ``dtype``: as they are, or rounded once to bfloat16."""
    (rows, width), hidden, groups = x_TD.shape, dy_TF.shape[1], len(group_sizes_E)

    def tile(position, ends_E, x, dy, dw):
        e, i, j = position
        start = pl.multiple_of(jnp.where(e > 0, ends_E[jnp.maximum(e - 1, 0)], 0), ROWS)
        mine = pl.ds(start, rows)  # reaches past the end, where no step goes
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * _COLUMNS, _COLUMNS)
        return x.at[mine, down], dy.at[mine, across], dw.at[e, down, across], (ends_E[e] - start) // _STEP

    out = jax.ShapeDtypeStruct((groups, width, hidden), dtype)
    grid = groups, pl.cdiv(width, ROWS), pl.cdiv(hidden, _COLUMNS)
    return _tiled(tile, grid, out, cores, transpose_lhs=True)(jnp.cumsum(group_sizes_E, dtype=jnp.int32), x_TD, dy_TF)


def _tiled(
    tile: Callable[..., tuple],
    grid: tuple[int, int, int],
    out: jax.ShapeDtypeStruct,
    cores: int,
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> Callable[..., jax.Array]:
    """The kernel of ``(index, lhs, rhs) -> out`` over a grid of tiles.

    ``tile(position, index, lhs, rhs, out)`` gives for a place in the grid its rows of lhs, columns of rhs, part of out
    and the number of steps, 0 for a tile of zeros. What sticks out of an array is read as zero and not written.
    """
    columns = _STORE // out.dtype.itemsize
    operands = [
        plgpu.BlockSpec(block, step, transforms=_swizzled(jnp.bfloat16), delay_release=1)
        for block, step in (_step_of(ROWS, transpose_lhs), _step_of(_COLUMNS, not transpose_rhs))
    ]

    def pipeline(steps, multiply, compute):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=operands,
            max_concurrent_steps=_STAGES,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=compute,
        )

    def kernel(index, lhs, rhs, out_ref):
        stages = pipeline(_STAGES, lambda *_: None, lambda _: None).get_allocations(lhs, rhs)
        stored = plgpu.SMEM((2, ROWS, columns), out.dtype, transforms=_swizzled(out.dtype))
        multiplied = plgpu.Barrier(num_arrivals=2)
        body = functools.partial(tiles, index, lhs, rhs, out_ref)
        pl.run_scoped(body, stages, stored, multiplied, collective_axes="warpgroup")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def tiles(index, lhs, rhs, out_ref, stages, stored, multiplied):
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * _HALF, _HALF)

        def multiply(_, lhs, rhs, sums):
            lhs = lhs.transpose((1, 0)) if transpose_lhs else lhs
            rhs = rhs.at[mine].transpose((1, 0)) if transpose_rhs else rhs.at[:, mine]
            plgpu.wgmma(sums, lhs, rhs)
            plgpu.wgmma_wait(1)  # for the step before, whose place in shared memory is released now
            return sums

        @plgpu.nd_loop((grid[0], grid[1] * grid[2]), collective_axes="block")
        def _(loop):
            position = loop.index[0], *plgpu.planar_snake(loop.index[1], grid[1:], 0, _BAND)
            lhs_part, rhs_part, out_part, steps = tile(position, index, lhs, rhs, out_ref)

            def compute(run):
                pl.run_scoped(functools.partial(store, run), plgpu.WGMMAAccumulatorRef((ROWS, _HALF)))

            def store(run, sums):
                run(sums)
                values = sums[...].astype(out.dtype)
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(multiplied))
                for first in range(0, _HALF, columns):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    stored[warpgroup] = values[:, first : first + columns]
                    plgpu.commit_smem()
                    target = out_part.at[:, mine].at[:, first : first + columns]
                    plgpu.copy_smem_to_gmem(stored.at[warpgroup], target)

            pipeline(steps, multiply, compute)(lhs_part, rhs_part, allocations=stages)

            @pl.when((warpgroup == 2) & (steps > 0))
            def _():  # the last step's place is not released: the next tile must not be streamed over it
                plgpu.barrier_wait(multiplied)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(cores or CORES,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _step_of(size: int, terms_first: bool):
    """Block of one step, and which, of an operand whose terms lie along the first or the second axis."""
    return ((_STEP, size), lambda k: (k, 0)) if terms_first else ((size, _STEP), lambda k: (0, k))


def _swizzled(dtype: Any):
    """Rows of 128 bytes, in tiles of 8 rows: what products read and copies write without two lanes in one bank."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)

"""Grouped products on NVIDIA Hopper, in Pallas' Mosaic GPU: bfloat16, rows of a group on multiples of ``ROWS``.

Each output tile of 128 × 256 is a chain of products that one block computes: a warp group streams both operands to
shared memory, two others multiply, each half of the columns. As many blocks as the GPU has processors take the tiles
in turn. A tile's rows are of one group, so its matrix is read where it lies: nothing is masked or copied.
"""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS = 128  # of a tile; what a group's rows are padded to
_COLUMNS = 256  # of a tile, half for each multiplying warp group
_STEP = 64  # terms of a sum that one product takes
_STAGES = 4  # steps in shared memory at once: 4 · (128 + 256) · 64 · 2 bytes = 192 of 227 KiB
_STORE = 64  # columns that a warp group hands over at once
_BAND = 8  # tiles of rows computed side by side, that share a matrix' columns in the second-level cache
_LAYOUT = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of 64 bfloat16, 128 bytes, in a row


def usable(dtype: jnp.dtype, *widths: int) -> bool:
    """Whether the kernels take matrices of these widths: bfloat16, multiples of 64, on a GPU of capability 9.0."""
    return dtype == jnp.bfloat16 and all(width % _STEP == 0 for width in widths) and _available()


@functools.cache
def _available() -> bool:
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability == "9.0"


def grouped_product(
    x_TD: Float[Array, "T D"], w: Float[Array, "E M N"], group_N: Int[Array, "N"], *, transpose: bool = False
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]``, or ``x[t] @ w[g]ᵀ``, for ``g`` the group of t's tile; zero where that is E or more."""
    rows, depth = x_TD.shape
    groups, columns = len(w), w.shape[1 if transpose else 2]

    def tile(position, group_N, x, w, y):
        _, i, j = position
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * _COLUMNS, _COLUMNS)
        group = group_N[i]
        w = w.at[jnp.minimum(group, groups - 1)]
        steps = jnp.where(group < groups, depth // _STEP, 0)
        return x.at[down], w.at[across] if transpose else w.at[:, across], y.at[down, across], steps

    out = jax.ShapeDtypeStruct((rows, columns), x_TD.dtype)
    return _tiled(tile, out, (1, rows // ROWS, pl.cdiv(columns, _COLUMNS)), transpose_rhs=transpose)(
        group_N.astype(jnp.int32), x_TD, w
    )


def grouped_weight_gradient(
    x_TD: Float[Array, "T D"], dy_TF: Float[Array, "T F"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """``dw[e] = Σ x[t]ᵀ dy[t]`` over the rows of group e."""
    (rows, width), hidden, groups = x_TD.shape, dy_TF.shape[1], len(group_sizes_E)

    def tile(position, ends_E, x, dy, dw):
        e, i, j = position
        start = jnp.where(e > 0, ends_E[jnp.maximum(e - 1, 0)], 0)
        mine = pl.ds(pl.multiple_of(start, ROWS), rows)
        down, across = pl.ds(i * ROWS, ROWS), pl.ds(j * _COLUMNS, _COLUMNS)
        return x.at[mine, down], dy.at[mine, across], dw.at[e, down, across], (ends_E[e] - start) // _STEP

    out = jax.ShapeDtypeStruct((groups, width, hidden), x_TD.dtype)
    return _tiled(tile, out, (groups, pl.cdiv(width, ROWS), pl.cdiv(hidden, _COLUMNS)), transpose_lhs=True)(
        jnp.cumsum(group_sizes_E, dtype=jnp.int32), x_TD, dy_TF
    )


def _tiled(
    tile: Callable[..., tuple],
    out: jax.ShapeDtypeStruct,
    grid: tuple[int, int, int],
    *,
    transpose_lhs: bool = False,
    transpose_rhs: bool = False,
) -> Callable[..., jax.Array]:
    """Compute ``out`` tile by tile from (index, lhs, rhs).

    ``tile(position, index, lhs, rhs, out)`` gives, for a position of the grid, the tile's rows of lhs, columns of rhs
    and place in out, and of how many steps of 64 terms it is the sum, 0 for a tile of zeros.
    """
    lhs_block, lhs_step = _along(ROWS, transpose_lhs)
    rhs_block, rhs_step = _along(_COLUMNS, not transpose_rhs)
    half = _COLUMNS // 2

    def pipeline(steps, multiply, around):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(lhs_block, lhs_step, transforms=_LAYOUT, delay_release=1),
                plgpu.BlockSpec(rhs_block, rhs_step, transforms=_LAYOUT, delay_release=1),
            ],
            max_concurrent_steps=_STAGES,
            memory_registers=40,
            wg_axis="warps",
            num_compute_wgs=2,
            compute_context=around,
        )

    def kernel(index, lhs, rhs, out_ref):
        room = pipeline(_STAGES, lambda *_: None, lambda _: None).get_allocations(lhs, rhs)
        store = plgpu.SMEM((2, ROWS, _STORE), out.dtype, transforms=_LAYOUT)

        @functools.partial(pl.run_scoped, room=room, store=store, collective_axes="warps")
        def _(room, store):
            warps = jax.lax.axis_index("warps")
            mine = pl.ds(warps * half, half)

            @plgpu.nd_loop((grid[0], grid[1] * grid[2]), collective_axes="blocks")
            def _(loop):
                position = loop.index[0], *plgpu.planar_snake(loop.index[1], grid[1:], 0, _BAND)
                lhs_part, rhs_part, out_part, steps = tile(position, index, lhs, rhs, out_ref)

                def multiply(_, lhs, rhs, sums):
                    lhs = plgpu.transpose_ref(lhs, (1, 0)) if transpose_lhs else lhs
                    rhs = plgpu.transpose_ref(rhs.at[mine], (1, 0)) if transpose_rhs else rhs.at[:, mine]
                    plgpu.wgmma(sums, lhs, rhs)
                    plgpu.wgmma_wait(1)  # the one before: its operands may be overwritten
                    return sums

                def around(run):
                    @functools.partial(pl.run_scoped, sums=plgpu.ACC((ROWS, half), jnp.float32))
                    def _(sums):
                        run(sums)
                        values = sums[...].astype(out.dtype)
                        for first in range(0, half, _STORE):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            store[warps] = values[:, first : first + _STORE]
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(store.at[warps], out_part.at[:, mine].at[:, first : first + _STORE])

                pipeline(steps, multiply, around)(lhs_part, rhs_part, allocations=room)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(jax.local_devices()[0].core_count,),
        grid_names=("blocks",),
        num_threads=3,
        thread_name="warps",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _along(size: int, terms_first: bool):
    """Block of one step and its place, for an operand whose terms lie along the first or the second axis."""
    return ((_STEP, size), lambda k: (k, 0)) if terms_first else ((size, _STEP), lambda k: (0, k))

"""Grouped products of few rows each on NVIDIA Hopper, as decoding has them: the matrices' bandwidth is all that counts.

The product is transposed, ``yᵀ = wᵀ xᵀ``, so that a matrix' columns fill the 64 rows that a tensor-core product takes
and the group's rows are its short side. Tiles of 128 columns and of 16 or 32 rows of a group are computed one by one;
180 KiB of a matrix are on their way at any time. Only matrices of groups with rows are read.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper import CORES

_COLUMNS = 128  # of a tile, 64 for each of two warp groups
_STEP = 64  # terms of a sum that one product takes
_BYTES = 180 * 1024  # of shared memory for steps under way
TILES = 16, 32  # rows of a tile; with 64 what is read of x slows it below the kernel for many


def tile(rows: int, groups: int) -> int:
    """What a group's rows should start on multiples of: about twice the mean; 0 where they are too many for this."""
    return next((tile for tile in TILES if 2 * rows <= tile * max(groups, 1)), 0)


@functools.partial(jax.jit, static_argnames="cores")  # lowered once for all layers
def grouped_product(
    x_TD: Float[Array, "T D"], w: Float[Array, "E D F"], group_N: Int[Array, "N"], *, cores: int
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]`` for ``g`` the group of t's tile of T/N rows, 16 or 32; zero where that is E. Tiles of no
    group are the last. cores: of the target, 0 for an H100's."""
    (size, depth), groups, width, tiles = x_TD.shape, len(w), w.shape[2], len(group_N)
    tile_rows, across = size // tiles, pl.cdiv(width, _COLUMNS)
    stages = min(depth // _STEP, _BYTES // (2 * _STEP * (_COLUMNS + tile_rows)))
    # Those with a group come first, a group's tiles side by side; the rest are filled with zeros.
    index = jnp.concatenate([group_N, jnp.sum(group_N < groups)[None]]).astype(jnp.int32)
    swizzled = lambda columns: (  # noqa: E731
        plgpu.TilingTransform((8, columns)),
        plgpu.SwizzleTransform(2 * columns),
    )
    operands = [
        plgpu.BlockSpec((_STEP, _COLUMNS), lambda k: (k, 0), transforms=swizzled(64), delay_release=1),
        plgpu.BlockSpec((tile_rows, _STEP), lambda k: (0, k), transforms=swizzled(64), delay_release=1),
    ]

    def pipeline(steps, multiply, compute):
        return plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(steps,),
            in_specs=operands,
            max_concurrent_steps=stages,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            compute_context=compute,
        )

    def kernel(index, x, w, out):
        allocations = pipeline(stages, lambda *_: None, lambda _: None).get_allocations(w.at[0], x)
        stored = plgpu.SMEM((2, 64, tile_rows), x_TD.dtype, transforms=swizzled(tile_rows))
        body = functools.partial(each_tile, index, x, w, out)
        pl.run_scoped(body, allocations, stored, plgpu.Barrier(num_arrivals=2), collective_axes="warpgroup")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def each_tile(index, x, w, out, allocations, stored, multiplied):
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * 64, 64)
        used = index[tiles]

        def multiply(_, w_step, x_step, sums):
            plgpu.wgmma(sums, w_step.at[:, mine].transpose((1, 0)), x_step.transpose((1, 0)))
            plgpu.wgmma_wait(1)  # for the step before, whose place in shared memory is released now
            return sums

        @plgpu.nd_loop((tiles * across,), collective_axes="block")
        def _(loop):
            (place,) = loop.index
            full = place < used * across
            place, start, count = (
                jnp.where(full, yes, no)
                for yes, no in (
                    (place, place - used * across),
                    (0, used),
                    (jnp.maximum(used, 1), jnp.maximum(tiles - used, 1)),
                )
            )
            i, j = start + jax.lax.rem(place, count), place // count
            steps = jnp.where(full, depth // _STEP, 0)
            columns = pl.ds(j * _COLUMNS, _COLUMNS)
            matrix = w.at[jnp.minimum(index[i], groups - 1), :, columns]

            def compute(run):
                pl.run_scoped(functools.partial(store, run), plgpu.WGMMAAccumulatorRef((64, tile_rows)))

            def store(run, sums):
                run(sums)
                values = sums[...].astype(x_TD.dtype)
                pl.when(full)(lambda: plgpu.barrier_arrive(multiplied))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stored[warpgroup] = values
                plgpu.commit_smem()
                part = out.at[columns, pl.ds(i * tile_rows, tile_rows)]
                plgpu.copy_smem_to_gmem(stored.at[warpgroup], part.at[mine])

            pipeline(steps, multiply, compute)(matrix, x.at[pl.ds(i * tile_rows, tile_rows)], allocations=allocations)

            @pl.when((warpgroup == 2) & full)
            def _():  # the last step's place is not released: the next tile must not be streamed over it
                plgpu.barrier_wait(multiplied)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((width, size), x_TD.dtype),
        grid=(cores or CORES,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(index, x_TD, w).T

"""Products of few rows with large matrices on NVIDIA Hopper, as decoding has them: the matrices' bandwidth is all that
counts. Each group of rows has a matrix of its own, or all rows have one, which then is split over its sums' terms.

The product is transposed, ``yᵀ = wᵀ xᵀ``, so that a matrix' columns fill the 64 rows that a tensor-core product takes
and the rows are its short side; a result is turned again on its way to shared memory. Tiles of 128 columns and of a few
rows are computed one by one; 180 KiB of a matrix are on their way at any time. Only matrices with rows are read.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper import STEP, refuses
from deepseek_kernels.hopper_sizes import CORES, HOPPER, Sizes
from deepseek_kernels.target import Target

_COLUMNS = 128  # of a tile, 64 for each of two warp groups
_BYTES = 180 * 1024  # of shared memory for steps under way
TILES = 16, 32  # rows of a group's tile; with 64 what is read of x slows it below the kernel for many
ROWS = 64  # that one matrix takes at most
_PARTS = 16  # of a sum, at most
_WIDEST = 32768  # columns of one matrix's product


def tile(rows: int, groups: int) -> int:
    """What a group's rows should start on multiples of: about twice the mean; 0 where they are too many for this."""
    return next((tile for tile in TILES if 2 * rows <= tile * max(groups, 1)), 0)


@functools.partial(jax.jit, static_argnames=("cores", "sizes"))  # lowered once for all layers
def grouped_product(
    x_TD: Float[Array, "T D"],
    w: Float[Array, "E D F"],
    blocks_M: Int[Array, "M"],
    *,
    cores: int,
    sizes: Sizes = HOPPER["few"],
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]`` for ``g`` the group of t's tile, one of M - 1 of 16 or 32 rows; zero where that is E.

    blocks_M: each tile's group, then how many have one: they are the first. cores: of the target, 0 for an H100's."""
    return _product(x_TD, w, blocks_M, parts=1, dtype=x_TD.dtype, cores=cores, sizes=sizes)[0]


@functools.partial(jax.jit, static_argnames="cores")
def dense_product(
    x_TD: Float[Array, "T D"], w_LDF: Float[Array, "L D F"], layer: Any, *, cores: int
) -> Float[Array, "T F"]:
    """``y = x @ w[layer]`` of at most ``ROWS`` rows. The sums' parts, float32, are added up by what reads them."""
    (rows, depth), width = x_TD.shape, w_LDF.shape[2]
    tile_rows = next(size for size in (8, 16, 32, 64) if rows <= size)
    x_RD = jnp.pad(x_TD, ((0, tile_rows - rows), (0, 0)))
    blocks_M = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.int32(1)])
    parts = _parts(pl.cdiv(width, _COLUMNS), depth // STEP, cores or CORES)
    dtype = x_TD.dtype if parts == 1 else jnp.dtype(jnp.float32)
    y_PRF = _product(x_RD, w_LDF, blocks_M, parts=parts, dtype=dtype, cores=cores)[:, :rows]
    return functools.reduce(jnp.add, y_PRF).astype(x_TD.dtype)


def refuses_dense(
    target: Target, dtype: Any, *, rows: int = 0, widths: tuple[int, ...] = (0, 0), devices: int = 1, **_: Any
) -> str:
    """Why ``dense_product`` cannot compute a product; "" where it can. widths: of x and of the result, 0 where it is no
    plain product of one dtype. Wide results need no splitting: XLA's products read them as fast."""
    if why := refuses(target, dtype, widths=()):
        return why
    if not (0 < rows <= ROWS and widths[0] % STEP == 0 and widths[1] % 8 == 0 and _COLUMNS <= widths[1] <= _WIDEST):
        return (
            f"it needs 1 to {ROWS} rows of a multiple of {STEP} numbers, and {_COLUMNS} to {_WIDEST} columns by 8: "
            f"not {rows} of {widths[0]}, {widths[1]} columns"
        )
    return "" if devices == 1 else f"it needs one device, not {devices}"


def _parts(across: int, steps: int, cores: int) -> int:
    """Into how many parts a sum is split, so that all cores have some, and few have more than others: a core's tiles
    one after another times what each takes, two steps more than its share."""
    cost = lambda parts: -(-across * parts // cores) * (-(-steps // parts) + 2)  # noqa: E731
    return min(range(1, min(steps, _PARTS) + 1), key=cost)


def _product(x_TD, w, blocks_M, *, parts: int, dtype: Any, cores: int, sizes: Sizes = HOPPER["few"]) -> jax.Array:
    """(parts, T, F)"""
    (size, depth), groups, width, tiles = x_TD.shape, len(w), w.shape[2], len(blocks_M) - 1
    tile_rows, across, all_steps = size // tiles, pl.cdiv(width, _COLUMNS), depth // STEP
    fitting = sizes.stages or _BYTES // (2 * STEP * (_COLUMNS + tile_rows))
    stages = min(max(pl.cdiv(all_steps, parts), 2), fitting)
    swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    operands = [
        plgpu.BlockSpec((STEP, _COLUMNS), lambda k: (k, 0), transforms=swizzled, delay_release=1),
        plgpu.BlockSpec((tile_rows, STEP), lambda k: (0, k), transforms=swizzled, delay_release=1),
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

    def kernel(blocks, x, w, out):
        allocations = pipeline(stages, lambda *_: None, lambda _: None).get_allocations(w.at[0], x)
        columns = 128 // dtype.itemsize
        transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)
        stored = plgpu.SMEM((2, tile_rows, 64), dtype, transforms=transforms)
        body = functools.partial(each_tile, blocks, x, w, out)
        pl.run_scoped(body, allocations, stored, plgpu.Barrier(num_arrivals=2), collective_axes="warpgroup")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def each_tile(blocks, x, w, out, allocations, stored, multiplied):
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * 64, 64)
        used = blocks[tiles]

        def multiply(_, w_step, x_step, sums):
            plgpu.wgmma(sums, w_step.at[:, mine].transpose((1, 0)), x_step.transpose((1, 0)))
            plgpu.wgmma_wait(1)  # for the step before, whose place in shared memory is released now
            return sums

        @plgpu.nd_loop((tiles * across * parts,), collective_axes="block")
        def _(loop):
            (place,) = loop.index
            full = place < used * across * parts
            place, start, count = (
                jnp.where(full, yes, no)
                for yes, no in (
                    (place, place - used * across * parts),
                    (0, used),
                    (jnp.maximum(used, 1), jnp.maximum(tiles - used, 1)),
                )
            )
            i, rest = start + jax.lax.rem(place, count), place // count
            part, j = jax.lax.rem(rest, parts), rest // parts
            first, last = (part * all_steps) // parts, ((part + 1) * all_steps) // parts
            steps = jnp.where(full, last - first, 0)
            rows, columns = pl.ds(i * tile_rows, tile_rows), pl.ds(j * _COLUMNS, _COLUMNS)
            # What reaches past the end: no step goes there.
            terms = pl.ds(pl.multiple_of(first * STEP, STEP), depth) if parts > 1 else slice(None)
            matrix = w.at[jnp.minimum(blocks[i], groups - 1), terms, columns]

            def compute(run):
                pl.run_scoped(functools.partial(store, run), plgpu.WGMMAAccumulatorRef((64, tile_rows)))

            def store(run, sums):
                run(sums)
                values = plgpu.layout_cast(sums[...].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                pl.when(full)(lambda: plgpu.barrier_arrive(multiplied))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stored.at[warpgroup].transpose((1, 0))[...] = values
                plgpu.commit_smem()
                target = out.at[part, rows, columns]
                plgpu.copy_smem_to_gmem(stored.at[warpgroup], target.at[:, mine])

            pipeline(steps, multiply, compute)(matrix, x.at[rows, terms], allocations=allocations)

            @pl.when((warpgroup == 2) & full)
            def _():  # the last step's place is not released: the next tile must not be streamed over it
                plgpu.barrier_wait(multiplied)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, size, width), dtype),
        grid=(cores or CORES,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(blocks_M, x_TD, w)

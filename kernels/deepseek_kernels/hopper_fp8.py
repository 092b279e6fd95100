"""Grouped products with FP8 matrices on NVIDIA Hopper, in Pallas' Mosaic GPU, scaled as DeepSeek-V3's report has it
(section 3.3): a matrix by blocks of 128 × 128; x, where it is FP8 too, by 128 terms of a row.

The tensor cores multiply 128 terms; what they give is scaled and added to float32 sums in registers, since their own
sums of FP8 keep some 14 bits. They take FP8 with the terms along rows: matrices lie as (E, F, D). One warp group
streams to a ring of steps in shared memory, over the ends of tiles too; two multiply, half of a tile each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.block_fp8 import BLOCK, FP8
from deepseek_kernels.hopper_sizes import CORES, HOPPER, Sizes
from deepseek_kernels.hopper_tiles import swizzled

_HALF = BLOCK // 2  # of a tile's 128 rows of its left operand: a warp group's
_BYTES = 224 * 1024  # of shared memory, for steps under way and the result's way out


class _Tile(NamedTuple):
    """Of both operands and of the scales of x the part of all steps, ``w_scale(step)``, the part of the result, and the
    number of steps, 0 for a tile of zeros."""

    lhs: Any
    rhs: Any
    x_scale: Any
    w_scale: Callable[..., jax.Array]
    out: Any
    steps: Any


def many(
    x_TD: Float[Array, "T D"],
    x_scale_KT: Float[Array, "K T"],
    w_EFD: Float[Array, "E F D"],
    w_scale_EJK: Float[Array, "E J K"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    dtype: Any = jnp.bfloat16,
    sizes: Sizes = HOPPER["fp8"],
) -> Float[Array, "T F"]:
    """``y[t] = Σ_k x_scale[k, t] (x[t, k] @ w[g, :, k]ᵀ) w_scale[g, :, k]`` for FP8 x, blocks k of 128 terms and the
    group ``g = group_N[t // 128]``; zero where that is E. Tiles of 128 × 128. cores: of the target, 0 for an H100's."""
    (rows, depth), (groups, width, _) = x_TD.shape, w_EFD.shape
    grid = rows // BLOCK, pl.cdiv(width, BLOCK)

    def tile(place, group_N, x, x_scale, w, w_scale, y):
        i, j = plgpu.planar_snake(place, grid, 0, sizes.band)
        down, across, g = pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK), jnp.minimum(group_N[i], groups - 1)
        steps = jnp.where(group_N[i] < groups, depth // BLOCK, 0)
        return _Tile(
            x.at[down], w.at[g, across], x_scale.at[:, down], lambda k: w_scale[g, j, k], y.at[down, across], steps
        )

    out = jax.ShapeDtypeStruct((rows, width), dtype)
    kernel = _tiled(tile, grid[0] * grid[1], out, BLOCK, x_TD.dtype, cores, sizes)
    return kernel(group_N.astype(jnp.int32), x_TD, x_scale_KT, w_EFD, w_scale_EJK)


def few(
    x_TD: Float[Array, "T D"],
    x_scale_KT: Float[Array, "K T"] | None,
    w_EFD: Float[Array, "E F D"],
    w_scale_EJK: Float[Array, "E J K"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    dtype: Any = jnp.bfloat16,
    sizes: Sizes = HOPPER["fp8"],
) -> Float[Array, "T F"]:
    """The same for tiles of T/N rows, 16 to 128: as ``w xᵀ``, 128 columns of a matrix by the rows. x: FP8, or bfloat16
    without scales, which is multiplied with the matrix' FP8 numbers as bfloat16, exactly."""
    (size, depth), (groups, width, _), tiles = x_TD.shape, w_EFD.shape, len(group_N)
    tile_rows, across = size // tiles, pl.cdiv(width, BLOCK)
    # Those with a group come first, a group's tiles side by side; the rest are filled with zeros.
    index = jnp.concatenate([group_N, jnp.sum(group_N < groups)[None]]).astype(jnp.int32)

    def tile(place, index, x, *refs):
        *x_scale, w, w_scale, y = refs
        used = index[tiles]
        if tile_rows < BLOCK:
            full = place < used * across
            place = jnp.where(full, place, place - used * across)
            start, count = jnp.where(full, 0, used), jnp.maximum(jnp.where(full, used, tiles - used), 1)
            i, j = start + jax.lax.rem(place, count), place // count
        else:  # rows that the second-level cache does not hold
            i, j = plgpu.planar_snake(place, (tiles, across), 0, sizes.band)
            full = i < used
        rows, columns, g = pl.ds(i * tile_rows, tile_rows), pl.ds(j * BLOCK, BLOCK), jnp.minimum(index[i], groups - 1)
        scales = x_scale[0].at[:, pl.ds(i * tile_rows, max(tile_rows, _LEAST))] if x_scale else None
        steps = jnp.where(full, depth // BLOCK, 0)
        return _Tile(w.at[g, columns], x.at[rows], scales, lambda k: w_scale[g, j, k], y.at[rows, columns], steps)

    out = jax.ShapeDtypeStruct((size, width), dtype)
    kernel = _tiled(tile, tiles * across, out, tile_rows, x_TD.dtype, cores, sizes, turned=True)
    scales = () if x_scale_KT is None else (jnp.pad(x_scale_KT, ((0, 0), (0, max(0, _LEAST - size)))),)
    return kernel(index, x_TD, *scales, w_EFD, w_scale_EJK)


_LEAST = 32  # float32 numbers that a copy takes


def _tiled(
    tile: Callable[..., _Tile],
    tiles: int,
    out: jax.ShapeDtypeStruct,
    columns: int,
    x_dtype: Any,
    cores: int,
    sizes: Sizes,
    *,
    turned: bool = False,
) -> Callable[..., jax.Array]:
    """The kernel of ``(index, x, x's scales if it is FP8, w, w's scales) -> out``.

    A tile is 128 rows of the left operand by ``columns`` rows of the right one. turned: x is the right one, and a tile
    of the result is transposed.
    """
    quantised, x_size = x_dtype == FP8, jnp.dtype(x_dtype).itemsize
    scaled = max(columns, _LEAST) if turned else BLOCK
    room = (columns, _HALF) if turned else (_HALF, min(columns, 128 // out.dtype.itemsize))
    left = _BYTES - 2 * room[0] * room[1] * out.dtype.itemsize
    stages = sizes.stages or min(16, left // ((BLOCK + columns * x_size) * BLOCK + 4 * scaled))

    def kernel(*refs):
        scratch = (
            plgpu.SMEM((stages, BLOCK, BLOCK), FP8, transforms=swizzled(BLOCK, FP8)),
            plgpu.SMEM((stages, columns, BLOCK), x_dtype, transforms=swizzled(128 // x_size, x_dtype)),
            plgpu.SMEM((stages, scaled), jnp.float32),
            plgpu.SMEM((2, *room), out.dtype, transforms=swizzled(room[1], out.dtype)),
            plgpu.Barrier(num_arrivals=3 if quantised else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        )
        pl.run_scoped(functools.partial(run, lambda n: tile(n, *refs)), *scratch, collective_axes="warpgroup")

    def run(tile, lhs, rhs, scales, stored, full, free):
        warpgroup = jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * _HALF, _HALF)

        def each_tile(body):
            return plgpu.nd_loop((tiles,), collective_axes="block", init_carry=jnp.int32(0))(
                lambda loop, carry: body(tile(loop.index[0]), carry)
            )

        def stream():
            plgpu.set_max_registers(40, action="decrease")
            number = each_tile(stream_tile)

            @pl.loop(jnp.maximum(number - stages, 0), number)
            def _(number):  # nothing is left pending
                plgpu.barrier_wait(free.at[jax.lax.rem(number, stages)])

        def stream_tile(tile, number):
            def step(k, number):
                slot, terms = jax.lax.rem(number, stages), pl.ds(k * BLOCK, BLOCK)
                pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(tile.lhs.at[:, terms], lhs.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(tile.rhs.at[:, terms], rhs.at[slot], full.at[slot])
                if quantised:
                    plgpu.copy_gmem_to_smem(tile.x_scale.at[k], scales.at[slot], full.at[slot])
                return number + 1

            return jax.lax.fori_loop(0, tile.steps, step, number)

        def multiply():
            plgpu.set_max_registers(232, action="increase")
            each_tile(multiply_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def multiply_tile(tile, number):
            def step(k, state):
                number, sums = state
                slot, scale = jax.lax.rem(number, stages), tile.w_scale(k)
                plgpu.barrier_wait(full.at[slot])
                sums += product(slot, scale) if quantised else _from_registers(lhs, rhs, slot, mine) * scale
                plgpu.barrier_arrive(free.at[slot])
                return number + 1, sums

            zeros = plgpu.layout_cast(jnp.zeros((_HALF, columns), jnp.float32), plgpu.Layout.WGMMA)
            number, sums = jax.lax.fori_loop(0, tile.steps, step, (number, zeros))
            store(tile.out, sums.astype(out.dtype))
            return number

        def product(slot, scale):
            def scaled_product(acc):
                plgpu.wgmma(acc, lhs.at[slot, mine], rhs.at[slot].transpose((1, 0)))
                along = 1 if turned else 0
                numbers = scales[slot, :columns] if turned else scales[slot, mine]
                numbers = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA.reduce(1 - along)) * scale
                return acc[...] * jax.lax.broadcast_in_dim(numbers, acc.shape, [along])

            return pl.run_scoped(scaled_product, plgpu.WGMMAAccumulatorRef((_HALF, columns)))

        def store(out_part, values):
            for first in range(0, columns, columns if turned else room[1]):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if turned:
                    turned_room = stored.at[warpgroup].transpose((1, 0))
                    turned_room[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
                    target = out_part.at[:, mine]
                else:
                    stored[warpgroup] = values[:, first : first + room[1]]
                    target = out_part.at[mine].at[:, first : first + room[1]]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stored.at[warpgroup], target)

        jax.lax.cond(warpgroup == 2, stream, multiply)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(cores or CORES,),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def _from_registers(w, x, slot, mine):
    """``w xᵀ`` of a step, w's FP8 numbers as bfloat16. A function of its own, since Mosaic GPU's interpreter multiplies
    what lies in shared memory alone."""

    def product(acc):
        numbers = plgpu.layout_cast(w[slot, mine], plgpu.Layout.WGMMA_UPCAST_2X)
        numbers = plgpu.layout_cast(numbers.astype(jnp.float32).astype(x.dtype), plgpu.Layout.WGMMA)
        plgpu.wgmma(acc, numbers, x.at[slot].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_HALF, x.shape[1])))

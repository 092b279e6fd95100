"""Grouped products with FP8, int8 or int4 matrices on NVIDIA Hopper, in Pallas' Mosaic GPU. FP8 is scaled as
DeepSeek-V3's report has it (section 3.3): a matrix by blocks of 128 × 128; x, where it is FP8 too, by 128 terms of a
row.

The tensor cores multiply 128 terms; what they give is scaled and added to float32 sums in registers, since their own
sums of FP8 keep some 14 bits. They take FP8 with the terms along rows: matrices lie as (E, F, D). One warp group
streams to a ring of steps in shared memory, over the ends of tiles too; two multiply, half of a tile each. Integers,
in groups of 128 terms with scales of each output, are multiplied as bfloat16, exactly, as FP8 is with rows in bfloat16.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from deepseek_kernels.block_fp8 import BLOCK, FP8
from deepseek_kernels.hopper_sizes import HOPPER, Sizes
from deepseek_kernels.hopper_tiles import swizzled, three_warp_groups
from deepseek_kernels.integers import bits_of

_HALF = BLOCK // 2  # of a tile's 128 rows of its left operand: a warp group's
_BYTES = 224 * 1024  # of shared memory, for steps under way and the result's way out


class _Tile(NamedTuple):
    """Of both operands and of the scales that are streamed, x's or those of integers, the part of all steps,
    ``w_scale(step)`` of FP8, the part of the result, and the number of steps, 0 for a tile of zeros."""

    lhs: Any
    rhs: Any
    scales: Any
    w_scale: Callable[..., Any]
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
    w_EFD: Shaped[Array, "E F D"],
    w_scale_EJK: Float[Array, "E _ _"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    dtype: Any = jnp.bfloat16,
    sizes: Sizes = HOPPER["fp8"],
) -> Float[Array, "T F"]:
    """The same for tiles of T/N rows, 16 to 128: as ``w xᵀ``, 128 columns of a matrix by the rows. x: FP8, or bfloat16
    without scales, which is multiplied with the matrix' FP8 numbers as bfloat16, exactly. Then w may be in integers
    too, with scales (E, K, F) of each group of 128 terms."""
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
        scales, of_w = None, lambda k: w_scale[g, j, k]
        if bits_of(w.dtype):
            scales, of_w = w_scale.at[g, :, columns], lambda k: None
        elif x_scale:
            scales = x_scale[0].at[:, pl.ds(i * tile_rows, max(tile_rows, _LEAST))]
        steps = jnp.where(full, depth // BLOCK, 0)
        return _Tile(w.at[g, columns], x.at[rows], scales, of_w, y.at[rows, columns], steps)

    out = jax.ShapeDtypeStruct((size, width), dtype)
    kernel = _tiled(tile, tiles * across, out, tile_rows, x_TD.dtype, cores, sizes, w_EFD.dtype, turned=True)
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
    w_dtype: Any = FP8,
    *,
    turned: bool = False,
) -> Callable[..., jax.Array]:
    """The kernel of ``(index, x, x's scales if it is FP8, w, w's scales) -> out``.

    A tile is 128 rows of the left operand by ``columns`` rows of the right one. turned: x is the right one, and a tile
    of the result is transposed.
    """
    quantised, x_size, bits = x_dtype == FP8, jnp.dtype(x_dtype).itemsize, bits_of(w_dtype)
    scaled = max(columns, _LEAST) if turned and not bits else BLOCK
    row = BLOCK * (bits or 8) // 8  # bytes of a step's terms
    as_bytes = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(row)
    room = (columns, _HALF) if turned else (_HALF, min(columns, 128 // out.dtype.itemsize))
    left = _BYTES - 2 * room[0] * room[1] * out.dtype.itemsize
    stages = sizes.stages or min(16, left // (BLOCK * row + columns * x_size * BLOCK + 4 * scaled))

    def kernel(*refs):
        scratch = (
            plgpu.SMEM((stages, BLOCK, BLOCK), w_dtype, transforms=as_bytes),
            plgpu.SMEM((stages, columns, BLOCK), x_dtype, transforms=swizzled(128 // x_size, x_dtype)),
            plgpu.SMEM((stages, scaled), jnp.bfloat16 if bits else jnp.float32),
            plgpu.SMEM((2, *room), out.dtype, transforms=swizzled(room[1], out.dtype)),
            plgpu.Barrier(num_arrivals=3 if quantised or bits else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        )
        pl.run_scoped(functools.partial(run, lambda n: tile(n, *refs)), *scratch, collective_axes="warpgroup")

    def run(tile, *scratch):
        warpgroup = jax.lax.axis_index("warpgroup")
        block = _Block(tile, tiles, turned, warpgroup, pl.ds(warpgroup * _HALF, _HALF), *scratch)
        jax.lax.cond(warpgroup == 2, block.stream, block.multiply)

    return three_warp_groups(kernel, out, cores, plgpu.LoweringSemantics.Lane)


class _Block(NamedTuple):
    """What a block of threads does: its share of the tiles, one after another.

    tile: of a number. mine: the left operand's rows that this warp group multiplies. lhs, rhs, scales: steps under way.
    stored: the result's way out. full, free: of each step.
    """

    tile: Callable[[Any], _Tile]
    tiles: int
    turned: bool
    warpgroup: Any
    mine: Any
    lhs: Any
    rhs: Any
    scales: Any
    stored: Any
    full: Any
    free: Any

    @property
    def stages(self) -> int:
        return self.lhs.shape[0]

    @property
    def columns(self) -> int:
        return self.rhs.shape[1]

    @property
    def quantised(self) -> bool:
        return self.rhs.dtype == FP8

    def each_tile(self, body):
        return plgpu.nd_loop((self.tiles,), collective_axes="block", init_carry=jnp.int32(0))(
            lambda loop, carry: body(self.tile(loop.index[0]), carry)
        )

    def stream(self) -> None:
        plgpu.set_max_registers(40, action="decrease")
        number = self.each_tile(self.stream_tile)

        @pl.loop(jnp.maximum(number - self.stages, 0), number)
        def _(number):  # nothing is left pending
            plgpu.barrier_wait(self.free.at[jax.lax.rem(number, self.stages)])

    def stream_tile(self, tile: _Tile, number):
        def step(k, number):
            slot, terms = jax.lax.rem(number, self.stages), pl.ds(k * BLOCK, BLOCK)
            pl.when(number >= self.stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))
            plgpu.copy_gmem_to_smem(tile.lhs.at[:, terms], self.lhs.at[slot], self.full.at[slot])
            plgpu.copy_gmem_to_smem(tile.rhs.at[:, terms], self.rhs.at[slot], self.full.at[slot])
            if tile.scales is not None:
                plgpu.copy_gmem_to_smem(tile.scales.at[k], self.scales.at[slot], self.full.at[slot])
            return number + 1

        return jax.lax.fori_loop(0, tile.steps, step, number)

    def multiply(self) -> None:
        plgpu.set_max_registers(232, action="increase")
        self.each_tile(self.multiply_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def multiply_tile(self, tile: _Tile, number):
        def step(k, state):
            number, sums = state
            slot, scale = jax.lax.rem(number, self.stages), tile.w_scale(k)
            plgpu.barrier_wait(self.full.at[slot])
            sums += self.product(slot, scale)
            plgpu.barrier_arrive(self.free.at[slot])
            return number + 1, sums

        zeros = plgpu.layout_cast(jnp.zeros((_HALF, self.columns), jnp.float32), plgpu.Layout.WGMMA)
        number, sums = jax.lax.fori_loop(0, tile.steps, step, (number, zeros))
        self.store(tile.out, sums.astype(self.stored.dtype))
        return number

    def product(self, slot, scale):
        """Of a step, scaled."""
        if bits_of(self.lhs.dtype):
            found = _from_registers(self.lhs, self.rhs, slot, self.mine)
            numbers = plgpu.layout_cast(self.scales[slot, self.mine], plgpu.Layout.WGMMA.reduce(1))
            return found * jax.lax.broadcast_in_dim(numbers.astype(jnp.float32), found.shape, [0])
        if not self.quantised:
            return _from_registers(self.lhs, self.rhs, slot, self.mine) * scale

        def scaled_product(acc):
            plgpu.wgmma(acc, self.lhs.at[slot, self.mine], self.rhs.at[slot].transpose((1, 0)))
            along = 1 if self.turned else 0
            numbers = self.scales[slot, : self.columns] if self.turned else self.scales[slot, self.mine]
            numbers = plgpu.layout_cast(numbers, plgpu.Layout.WGMMA.reduce(1 - along)) * scale
            return acc[...] * jax.lax.broadcast_in_dim(numbers, acc.shape, [along])

        return pl.run_scoped(scaled_product, plgpu.WGMMAAccumulatorRef((_HALF, self.columns)))

    def store(self, out, values) -> None:
        width = self.columns if self.turned else self.stored.shape[2]
        for first in range(0, self.columns, width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.turned:
                turned_room = self.stored.at[self.warpgroup].transpose((1, 0))
                turned_room[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
                target = out.at[:, self.mine]
            else:
                self.stored[self.warpgroup] = values[:, first : first + width]
                target = out.at[self.mine].at[:, first : first + width]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.stored.at[self.warpgroup], target)


def _from_registers(w, x, slot, mine):
    """``w xᵀ`` of a step, w's numbers as bfloat16. A function of its own, since Mosaic GPU's interpreter multiplies
    what lies in shared memory alone."""

    def product(acc):
        if bits := bits_of(w.dtype):  # moved between threads while they are narrow
            loaded = plgpu.Layout.WGMMA_UPCAST_2X if bits == 8 else plgpu.Layout.WGMMA_UPCAST_4X
            numbers = plgpu.layout_cast(plgpu.layout_cast(w[slot, mine], loaded), plgpu.Layout.WGMMA).astype(x.dtype)
        else:
            numbers = plgpu.layout_cast(w[slot, mine], plgpu.Layout.WGMMA_UPCAST_2X)
            numbers = plgpu.layout_cast(numbers.astype(jnp.float32).astype(x.dtype), plgpu.Layout.WGMMA)
        plgpu.wgmma(acc, numbers, x.at[slot].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_HALF, x.shape[1])))

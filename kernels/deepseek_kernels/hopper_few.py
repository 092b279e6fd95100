"""Grouped products of few rows each on NVIDIA Hopper, as decoding has them: the matrices' bandwidth is all that counts.

The product is transposed, ``yᵀ = wᵀ xᵀ``, so that a matrix' columns fill the 64 rows that a tensor-core product takes
and the group's rows are its short side. Tiles of 128 columns and of 16 or 32 rows of a group are computed one by one;
180 KiB of a matrix are on their way at any time. Only matrices of groups with rows are read.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper import STEP
from deepseek_kernels.hopper_sizes import HOPPER, Sizes
from deepseek_kernels.hopper_tiles import step, tiled

_COLUMNS = 128  # of a tile, 64 for each of two warp groups
_BYTES = 180 * 1024  # of shared memory for steps under way
TILES = 16, 32  # rows of a tile; with 64 what is read of x slows it below the kernel for many


def tile(rows: int, groups: int) -> int:
    """What a group's rows should start on multiples of: about twice the mean; 0 where they are too many for this."""
    return next((tile for tile in TILES if 2 * rows <= tile * max(groups, 1)), 0)


def grouped_product(
    x_TD: Float[Array, "T D"],
    w: Float[Array, "E D F"],
    group_N: Int[Array, "N"],
    *,
    cores: int,
    sizes: Sizes = HOPPER["few"],
) -> Float[Array, "T F"]:
    """``y[t] = x[t] @ w[g]`` for ``g`` the group of t's tile of T/N rows, 16 or 32; zero where that is E. Tiles of no
    group are the last. cores: of the target, 0 for an H100's."""
    (size, depth), groups, width, tiles = x_TD.shape, len(w), w.shape[2], len(group_N)
    tile_rows, across = size // tiles, pl.cdiv(width, _COLUMNS)
    stages = min(depth // STEP, sizes.stages or _BYTES // (2 * STEP * (_COLUMNS + tile_rows)))
    # Those with a group come first, a group's tiles side by side; the rest are filled with zeros.
    index = jnp.concatenate([group_N, jnp.sum(group_N < groups)[None]]).astype(jnp.int32)

    def place(index, warpgroup, groups_and_used, w, x, out):
        """The other way round for the tiles of no group."""
        (at,), used = index, groups_and_used[tiles]
        full = at < used * across
        at = jnp.where(full, at, at - used * across)
        start, count = jnp.where(full, 0, used), jnp.maximum(jnp.where(full, used, tiles - used), 1)
        i, j = start + jax.lax.rem(at, count), at // count
        matrix = w.at[jnp.minimum(groups_and_used[i], groups - 1), :, pl.ds(j * _COLUMNS, _COLUMNS)]
        rows = pl.ds(i * tile_rows, tile_rows)
        part = out.at[pl.ds(j * _COLUMNS, _COLUMNS), rows].at[pl.ds(warpgroup * 64, 64)]
        return matrix, x.at[rows], part, jnp.where(full, depth // STEP, 0)

    def product(warpgroup, w, x):
        return w.at[:, pl.ds(warpgroup * 64, 64)].transpose((1, 0)), x.transpose((1, 0))

    kernel = tiled(
        place,
        product,
        (step((STEP, _COLUMNS), True), step((tile_rows, STEP), False)),
        (64, tile_rows),
        jax.ShapeDtypeStruct((width, size), x_TD.dtype),
        grid=(tiles * across,),
        cores=cores,
        stages=stages,
        stored=tile_rows,
    )
    return kernel(index, w, x_TD).T

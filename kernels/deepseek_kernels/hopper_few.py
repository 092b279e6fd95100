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
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.hopper import STEP, refuses
from deepseek_kernels.hopper_sizes import CORES, HOPPER, Sizes
from deepseek_kernels.hopper_tiles import step, tiled
from deepseek_kernels.target import Target

COLUMNS = 128  # of a tile, 64 for each of two warp groups
_BYTES = 180 * 1024  # of shared memory for steps under way
TILES = 16, 32  # rows of a group's tile; with 64 what is read of x slows it below the kernel for many
ROWS = 256  # that one matrix takes at most, as tiles of
TILE = 128  # at most: cores side by side have the tiles of the same columns, so that memory is read once for both
_PARTS = 16  # of a sum, at most; of up to 8 rows 4: for them what adds the parts up counts
_LEFT = 4  # cores that such leave to small kernels beside them, which would wait for their end
_WIDEST = 32768  # columns of one matrix's product


def tile(rows: int, groups: int) -> int:
    """What a group's rows should start on multiples of: twice the mean, or of the largest tile four thirds, above which
    a second tile of a group reads what the first has just brought; 0 where they are too many for this."""
    small, large = TILES
    each = rows / max(groups, 1)
    return small if 2 * each <= small else large if 4 * each <= 3 * large else 0


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
    x_MRD = x_TD.reshape(len(blocks_M) - 1, -1, x_TD.shape[1])
    return _product(x_MRD, w, blocks_M, parts=1, dtype=x_TD.dtype, cores=cores, sizes=sizes).reshape(len(x_TD), -1)


@functools.partial(jax.jit, static_argnames="cores")
def product_of_each(
    x_KD: Float[Array, "_ D"], w: Float[Array, "E D F"], blocks_M: Int[Array, "M"], *, cores: int
) -> Float[Array, "K F"]:
    """``y[k] = x[k] @ w[g]``, or of the one row of x, for ``g`` one of M - 1 = K groups, each with a single row."""
    return _product(x_KD[:, None], w, blocks_M, parts=1, dtype=x_KD.dtype, cores=cores)[:, 0]


@functools.partial(jax.jit, static_argnames="cores")
def dense_product(
    x_TD: Float[Array, "T D"], w_LDF: Float[Array, "L D F"], layer: Any, *, cores: int
) -> Float[Array, "T F"]:
    """``y = x @ w[layer]`` of at most ``ROWS`` rows. The sums' parts, float32, are added up by what reads them."""
    (rows, depth), width = x_TD.shape, w_LDF.shape[2]
    x_RD, tiles = whole_rows(x_TD), pl.cdiv(rows, TILE)
    blocks_M = jnp.stack([*[jnp.asarray(layer, jnp.int32)] * tiles, jnp.int32(tiles)])
    most, left = (4, _LEFT) if rows <= 8 else (_PARTS, 0)
    parts = _parts(tiles * pl.cdiv(width, COLUMNS), depth // STEP, max((cores or CORES) - left, 1), most)
    dtype = x_TD.dtype if parts == 1 else jnp.dtype(jnp.float32)
    y_MPRF = _product(x_RD.reshape(tiles, -1, depth), w_LDF, blocks_M, parts=parts, dtype=dtype, cores=cores)
    y_PRF = y_MPRF.reshape(tiles, parts, -1, width).swapaxes(0, 1).reshape(parts, -1, width)[:, :rows]
    return functools.reduce(jnp.add, y_PRF).astype(x_TD.dtype)


def whole_rows(x_TD: Float[Array, "T D"]) -> Float[Array, "R D"]:
    """Up to 8 rows, whole groups of 8, or whole tiles: what copies take."""
    rows = len(x_TD)
    missing = 0 if rows <= 8 else -rows % (8 if rows <= TILE else TILE)
    return jnp.pad(x_TD, ((0, missing), (0, 0))) if missing else x_TD


def of_tile(rows: int) -> int:
    """The rows of a tile for so many, of which what is not there is read as zeros and not written."""
    return next(size for size in (8, 16, 32, 64, TILE) if min(rows, TILE) <= size)


def refuses_dense(
    target: Target, dtype: Any, *, rows: int = 0, widths: tuple[int, ...] = (0, 0), devices: int = 1, **_: Any
) -> str:
    """Why ``dense_product`` cannot compute a product; "" where it can. widths: of x and of the result, 0 where it is no
    plain product of one dtype. Wide results need no splitting: XLA's products read them as fast."""
    if why := refuses(target, dtype, widths=()):
        return why
    if not (0 < rows <= ROWS and widths[0] % STEP == 0 and widths[1] % 8 == 0 and COLUMNS <= widths[1] <= _WIDEST):
        return (
            f"it needs 1 to {ROWS} rows of a multiple of {STEP} numbers, and {COLUMNS} to {_WIDEST} columns by 8: "
            f"not {rows} of {widths[0]}, {widths[1]} columns"
        )
    return "" if devices == 1 else f"it needs one device, not {devices}"


def _parts(across: int, steps: int, cores: int, most: int) -> int:
    """Into how many parts a sum is split, so that many cores have some, and few have more than others: a core's tiles
    one after another times what each takes, two steps more than its share."""
    cost = lambda parts: -(-across * parts // cores) * (-(-steps // parts) + 2)  # noqa: E731
    return min(range(1, min(steps, most) + 1), key=cost)


def stages(steps: int, tile_rows: int, sizes: Sizes = HOPPER["few"]) -> int:
    """How many steps of a tile are in shared memory at once."""
    return min(max(steps, 2), sizes.stages or _BYTES // (2 * STEP * (COLUMNS + tile_rows)))


def _product(x_NRD, w, blocks_M, *, parts: int, dtype: Any, cores: int, sizes: Sizes = HOPPER["few"]) -> jax.Array:
    """(tiles · parts, R, F). x: the rows of each tile, or of all."""
    (each, size, depth), groups, width, tiles = x_NRD.shape, len(w), w.shape[2], len(blocks_M) - 1
    tile_rows = of_tile(size)
    across, all_steps = pl.cdiv(width, COLUMNS), depth // STEP

    def tile(place, warpgroup, blocks, w, x, out):
        (place,), used = place, blocks[tiles]
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
        rows, columns = pl.ds(0 * i, tile_rows), pl.ds(j * COLUMNS, COLUMNS)
        # What reaches past the end: no step goes there.
        terms = pl.ds(pl.multiple_of(first * STEP, STEP), depth) if parts > 1 else slice(None)
        matrix = w.at[jnp.minimum(blocks[i], groups - 1), terms, columns]
        mine = out.at[i * parts + part, rows, columns].at[:, half(warpgroup)]
        return matrix, x.at[jnp.minimum(i, each - 1), rows, terms], mine, jnp.where(full, last - first, 0)

    kernel = tiled(
        tile,
        lambda warpgroup, w, x: (w.at[:, half(warpgroup)].transpose((1, 0)), x.transpose((1, 0))),
        (step((STEP, COLUMNS), True), step((tile_rows, STEP), False)),
        (COLUMNS // 2, tile_rows),
        jax.ShapeDtypeStruct((tiles * parts, size, width), dtype),
        grid=(tiles * across * parts,),
        cores=cores,
        stages=stages(pl.cdiv(all_steps, parts), tile_rows, sizes),
        turned=True,
    )
    return kernel(blocks_M, w, x_NRD)


def half(warpgroup):
    """A warp group's columns of a tile."""
    return pl.ds(warpgroup * (COLUMNS // 2), COLUMNS // 2)

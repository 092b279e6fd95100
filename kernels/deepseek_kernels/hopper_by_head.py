"""Products of few rows with a matrix for each head on NVIDIA Hopper: what absorbed MLA does with the keys' and the
values' half of ``kv_b``, read where they lie. Tiles and pipeline are those of hopper_few.py."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.hopper import STEP, refuses
from deepseek_kernels.hopper_few import COLUMNS, ROWS, TILE, half, of_tile, stages, whole_rows
from deepseek_kernels.hopper_tiles import step, tiled
from deepseek_kernels.target import Target


@functools.partial(jax.jit, static_argnames=("columns", "transposed", "cores"))  # lowered once for all layers
def product_by_head(
    x_THD: Float[Array, "T H D"],
    w_LCHW: Float[Array, "L C H W"],
    layer: Any,
    columns: tuple[int, int],
    *,
    transposed: bool,
    cores: int,
) -> Float[Array, "T H F"]:
    """``y[:, h] = x[:, h] @ w[layer, :, h, slice(*columns)]``, or by that matrix transposed, of at most ``ROWS`` rows.

    A head's sums are not split: of V2-Lite's 16 heads 16 tiles at least, whose 128 KiB are on their way at once."""
    (rows, heads, depth), (layers, C, _, W) = x_THD.shape, w_LCHW.shape
    first, width = columns[0], C if transposed else columns[1] - columns[0]
    x_RD, tile_rows = whole_rows(x_THD.reshape(rows, heads * depth)), of_tile(rows)
    across, tiles = width // COLUMNS, pl.cdiv(rows, TILE)

    def tile(place, warpgroup, layer, w, x, out):
        place, i = place[0] // tiles, jax.lax.rem(place[0], tiles)
        head, j = place // across, jax.lax.rem(place, across)
        those = pl.ds(j * COLUMNS, COLUMNS)
        start = pl.multiple_of(head * W + first + (0 if transposed else j * COLUMNS), STEP)
        matrix = w.at[layer[0], *((those, pl.ds(start, depth)) if transposed else (slice(None), pl.ds(start, COLUMNS)))]
        few = pl.ds(i * TILE, tile_rows)  # reaches past the end
        mine = out.at[few, pl.ds(place * COLUMNS, COLUMNS)].at[:, half(warpgroup)]
        return matrix, x.at[few, pl.ds(pl.multiple_of(head * depth, STEP), depth)], mine, jnp.int32(depth // STEP)

    def of_step(warpgroup, w, x):
        return w.at[half(warpgroup)] if transposed else w.at[:, half(warpgroup)].transpose((1, 0)), x.transpose((1, 0))

    kernel = tiled(
        tile,
        of_step,
        (step((COLUMNS, STEP), False) if transposed else step((STEP, COLUMNS), True), step((tile_rows, STEP), False)),
        (COLUMNS // 2, tile_rows),
        jax.ShapeDtypeStruct((len(x_RD), heads * width), x_THD.dtype),
        grid=(heads * across * tiles,),
        cores=cores,
        stages=stages(depth // STEP, tile_rows),
        turned=True,
    )
    y_RF = kernel(jnp.asarray(layer, jnp.int32).reshape(1), w_LCHW.reshape(layers, C, -1), x_RD)
    return y_RF[:rows].reshape(rows, heads, width)


def refuses_by_head(
    target: Target,
    dtype: Any,
    *,
    rows: int = 0,
    head_widths: tuple[int, ...] = (0, 0),
    columns: tuple[int, ...] = (0, 0),
    devices: int = 1,
    **_: Any,
) -> str:
    """Why ``product_by_head`` cannot compute a product; "" where it can. head_widths: of a head's x and result, 0 where
    it is no such product of one dtype. columns: the first of the weight's, and how many a head has."""
    if why := refuses(target, dtype, widths=()):
        return why
    if not (0 < rows <= ROWS and head_widths[1] and head_widths[0] % STEP == head_widths[1] % COLUMNS == 0):
        return (
            f"it needs 1 to {ROWS} rows of heads of a multiple of {STEP} numbers, and results of one of {COLUMNS}: "
            f"not {rows} of {head_widths[0]}, {head_widths[1]}"
        )
    if any(number % STEP for number in columns):
        return f"it needs a head's columns, and those it takes, to begin at multiples of {STEP}, not {columns}"
    return "" if devices == 1 else f"it needs one device, not {devices}"

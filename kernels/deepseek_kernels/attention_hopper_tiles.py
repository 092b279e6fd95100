"""What the Hopper kernels of MLA's attention share: their tiles and the order of them, layouts, masks, products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 128  # queries or keys of a tile
HALF = BLOCK // 2  # what one warp group has of them: the rows of a product
TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # bfloat16 rows of 128 bytes
OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
Ids = tuple[Int[Array, "B P"], Int[Array, "B Q"]] | None  # the segments of queries and of keys, of whole blocks
_CACHE = 32 << 20  # bytes that the tiles which run side by side may read again and again: of a second-level cache of 50
_FOR_STREAMING, _FOR_PRODUCTS = 24, 240  # registers of a thread


class Plan(NamedTuple):
    """``attention_hopper.seen``'s, and the places that it was told."""

    of_queries: Int[Array, "_ I 2"]
    of_keys: Int[Array, "_ J X"]
    places_BI: Int[Array, "B I"] | None


class Operands(NamedTuple):
    """What both backward kernels read. logs: ``log2 Σ exp`` of the forward pass; along: ``Σ dout · out``, as long."""

    q_BSHK: Float[Array, "B S H K"]
    kv_BTHW: Float[Array, "B T H W"]
    pe_BTR: Float[Array, "B T R"]
    dout_BSHV: Float[Array, "B S H V"]
    logs_BHP: Float[Array, "B H P"]
    along_BHP: Float[Array, "B H P"]


def launch(
    name: str,
    body: Callable[..., None],
    out: Any,
    scratch: tuple,
    tiles: tuple[int, int, int],
    size: int,
    *,
    forwards: bool,
) -> Callable[..., Any]:
    """A kernel of a block of threads for each tile, ``body((row, head, tile), *refs, *scratch)``.

    tiles: rows of the batch, heads, tiles of a head. size: bytes that the tiles of a head read. As many heads run side
    by side as the second-level cache holds, their longest tiles before the others: the first ones if ``forwards``.
    """
    batch, heads, blocks = tiles
    most = max(1, _CACHE // size)
    band = max(n for n in range(1, min(batch * heads, most) + 1) if batch * heads % n == 0)

    def kernel(*refs):
        place, of_band = jax.lax.axis_index("tile"), band * blocks
        rest = jax.lax.rem(place, of_band)
        head, i = place // of_band * band + jax.lax.rem(rest, band), rest // band
        here = head // heads, jax.lax.rem(head, heads), i if forwards else blocks - 1 - i
        pl.run_scoped(lambda *scratch: body(here, *refs, *scratch), *scratch, collective_axes="warpgroup")

    kernel.__name__ = name  # in profiles
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(batch * heads * blocks,),
        grid_names=("tile",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # Every store to shared memory is followed by a barrier, so that none needs to be added.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def numbers(first: Int[Array, "..."], plan: Plan, ids_BP: Ids) -> tuple[Int[Array, "..."], ...]:
    """What a kernel reads in front of its operands: what it goes over, places, segments. In the stead of what there is
    not stands what is there."""
    return first, first if plan.places_BI is None else plan.places_BI, *(ids_BP or (first, first))


def share(stream: Callable[[], None], compute: Callable[[], None]) -> None:
    """The third warp group streams, two compute."""

    def streaming():
        plgpu.set_max_registers(_FOR_STREAMING, action="decrease")
        stream()

    def computing():
        plgpu.set_max_registers(_FOR_PRODUCTS, action="increase")
        compute()

    jax.lax.cond(jax.lax.axis_index("warpgroup") == 2, streaming, computing)


def product(fill: Callable[[Any], None], start, *, wait: int = 0):
    """``start``, or zeros of so many columns, and what ``fill`` adds to it. wait: products that may still run."""

    def body(acc):
        if not isinstance(start, int):
            acc[...] = start
        fill(acc)
        return plgpu.wgmma_accumulator_load(acc, wait_n=wait)

    columns = start if isinstance(start, int) else start.shape[1]
    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((HALF, columns)))


def times(acc, weights, b) -> None:
    """``acc += weights @ b`` with weights in registers. A function of its own: the interpreter has none of it."""
    plgpu.wgmma(acc, weights, b)


def free(barriers, t, count, slots: int) -> None:
    """Block t is done with: another may be copied to its place, if one of the ``count`` is to come there."""
    coming = (t >= 0) & (t + slots < count)
    pl.when(coming)(lambda: plgpu.barrier_arrive(barriers.at[jax.lax.rem(t, slots)]))


def hide(scores, seen_from, ids, *, keys_down: bool = False):
    """-∞ for keys that a query does not see. seen_from: the place of the first column behind that of the first row.
    ids: of rows and of columns, or None. keys_down: the rows are keys, and not queries."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA) for axis in range(2)
    )
    column += seen_from
    seen = row <= column if keys_down else column <= row
    if ids is not None:
        of_rows, of_columns = ids
        seen &= down(of_rows, scores.shape[1]) == across(of_columns)
    return jnp.where(seen, scores, -jnp.inf)


def down(of_rows, columns: int):
    return jax.lax.broadcast_in_dim(of_rows, (HALF, columns), [0])


def across(of_columns):
    return jax.lax.broadcast_in_dim(of_columns, (HALF, of_columns.shape[0]), [1])


def every_row(value: float):
    return plgpu.layout_cast(jnp.full((HALF,), value, jnp.float32), OF_ROWS)

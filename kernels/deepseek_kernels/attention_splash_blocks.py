"""Which blocks of scores splash attention computes: tables that the program makes, of the rows at hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """rows of the batch; queries and keys of a block; across: blocks of keys of a row; at_once: keys multiplied at a
    time. sums: whether a query may see no key, so that sums of weights are wanted even in prefill."""

    rows: int
    queries: int
    keys: int
    across: int
    at_once: int
    sums: bool


def visited(last_N: Int[Array, "N"], segments: Any, blocks: Blocks) -> Bool[Array, "B I J"]:
    """Of each row the blocks of queries I and of keys J in which a query may see a key.

    That is one not behind the query's ``last``, and of a segment between the lowest and the highest of the other block.
    Right for any numbers, exact where segments rise along the row, as in packed rows, where 0 is what follows them.
    """
    last_BI = jnp.max(last_N.reshape(blocks.rows, -1, blocks.queries), axis=2)
    first_BJ = blocks.keys * jnp.arange(blocks.rows * blocks.across, dtype=jnp.int32).reshape(blocks.rows, -1)
    seen_BIJ = first_BJ[:, None] <= last_BI[:, :, None]
    if segments is None:
        return seen_BIJ

    def ends(ids_N, block):
        ids = jnp.where(ids_N == 0, jnp.iinfo(jnp.int32).max, ids_N).reshape(blocks.rows, -1, block)
        return jnp.min(ids, axis=2), jnp.max(ids, axis=2)

    (q_low, q_high), (k_low, k_high) = ends(segments.q, blocks.queries), ends(segments.kv, blocks.keys)
    return seen_BIJ & (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])


def tables(last_N: Int[Array, "N"], segments: Any, blocks: Blocks) -> tuple[MaskInfo, MaskInfo]:
    """For kernels that go along rows of blocks, and for one that goes down columns.

    Numbers of blocks count through all rows of the batch. Where a block is not visited, there stands the one to be
    copied meanwhile: the next of the table, or, at the end of a column, the last, as another head begins behind it.
    """
    seen_BIJ = visited(last_N, segments, blocks)
    B, down, across = seen_BIJ.shape
    small = jnp.int8 if B * max(down, across) <= 128 else jnp.int16  # scalar memory is small

    def following(seen, axis, otherwise):
        number = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis)
        none = seen.shape[axis]
        found = jax.lax.cummin(jnp.where(seen, number, none), axis, reverse=True)
        return jnp.where(found < none, found, otherwise(jnp.where(seen, number, 0)))

    flat_N = seen_BIJ.reshape(-1)
    place = following(flat_N, 0, lambda number: number[jnp.argmax(flat_N)])  # behind the last, the first of all
    key_BIJ = (place // (down * across) * across + place % across).reshape(seen_BIJ.shape)
    query_BIJ = following(seen_BIJ, 1, lambda number: jax.lax.cummax(number, 1)) + down * jnp.arange(B)[:, None, None]

    rows = lambda x_BIJ: x_BIJ.reshape(1, B * down, across).astype(small)  # noqa: E731
    columns = lambda x_BIJ: jnp.swapaxes(x_BIJ, 0, 1).reshape(1, down, B * across).astype(small)  # noqa: E731
    by_rows = MaskInfo(rows(key_BIJ), None, rows(seen_BIJ), None, last_N)  # pyright: ignore[reportArgumentType]
    return by_rows, by_rows._replace(data_next=columns(query_BIJ), block_mask=columns(seen_BIJ))

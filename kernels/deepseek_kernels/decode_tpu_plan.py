"""Which keys a core of a TPU takes in decoding: blocks of pieces of pages, dealt out evenly whatever rows' lengths."""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Int

from deepseek_kernels import tpu


class Blocks(NamedTuple):
    """A block is ``parts`` pieces of ``piece`` keys, of which a page has ``of_page`` and a row ``of_row``. size: of a
    page; where it is no multiple of a piece, the last one of it sticks out: there a row has one page alone."""

    piece: int
    parts: int
    of_page: int
    of_row: int
    size: int

    @classmethod
    def of(cls, size: int, pages: int, most: int) -> "Blocks":
        if pages == 1:
            piece = most
        elif size <= most:
            piece = size
        else:
            piece = next(piece for piece in range(most // tpu.LANES * tpu.LANES, 0, -tpu.LANES) if size % piece == 0)
        of_page = pl.cdiv(size, piece)
        return cls(piece, max(1, min(most // piece, of_page * pages)), of_page, of_page * pages, size)

    @property
    def keys(self) -> int:
        return self.piece * self.parts

    def there(self, part: int, shape: tuple[int, ...], axis: int, block):
        """Which keys of part ``part`` of a row's block are some of the cache's; None where all are."""
        if self.size % self.piece == 0:
            return None
        first = block * self.keys + part * self.piece
        return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < self.size


class Plan(NamedTuple):
    """row_N: of the batch, that block n is of, over the blocks of all rows end to end, the last one's repeated.
    start_B: each row's first block. share: blocks of a core, and how many there are in all. parts_B2: the first of each
    row's parts, and their number.

    Part p of core c and row b is ``p = b + c``: from one part to the next either grows by one."""

    row_N: jax.Array
    start_B: jax.Array
    share: jax.Array
    parts_B2: jax.Array
    cores: int


def make_plan(limit_B: Int[Array, "B"], keys: int, most: int, cores: int) -> Plan:
    B = len(limit_B)
    blocks_B = jnp.maximum(-(-limit_B // keys), 1)  # one where nothing is seen, to write its zeros
    end_B = jnp.cumsum(blocks_B)
    start_B, every = end_B - blocks_B, end_B[-1]
    share = -(-every // cores)
    row_N = jnp.sum(jnp.arange(B * most + cores)[:, None] >= end_B, axis=1)
    core_B = start_B // share
    parts_B2 = jnp.stack([core_B + jnp.arange(B), (end_B - 1) // share - core_B + 1], axis=1)
    row_N, start_B, share, parts_B2 = (
        x.astype(jnp.int32) for x in (jnp.minimum(row_N, B - 1), start_B, jnp.stack([share, every]), parts_B2)
    )
    return Plan(row_N, start_B, share, parts_B2, cores)

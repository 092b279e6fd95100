"""Which keys a query of attention sees, described and never drawn: S × T masks exist in the references alone."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_positions_BS", "k_positions_BT", "q_segments_BS", "k_segments_BT", "lengths_B", "pages_BJ"],
    meta_fields=["causal", "q_run"],
)
@dataclasses.dataclass(frozen=True)
class Visible:
    """Query s of row b sees key t of the row where all of these hold; a query that sees no key gets zeros.

    causal: the key's position is at most the query's. q_positions_BS, k_positions_BT: None for 0, 1, 2, … along the
    row. q_segments_BS, k_segments_BT: both of one segment; None: there are none. lengths_B: the first ``lengths[b]``
    keys exist; None: all do. What is None is known while tracing, so that a plain causal kernel can be chosen.

    pages_BJ: where the keys lie, for ``mla_decode`` alone: of a cache of P pages of N tokens, key t of row b is token
    ``t % N`` of page ``pages[b, t // N]``, in any order; rows may share pages. None: row b's keys lie side by side.
    Entries beyond a row's length may be any number.

    q_run: where not 0, a promise: the positions of every so many queries, from the first on, go up one by one from a
    multiple of that number. Kernels that cannot take queries one by one anywhere in a row may take them so.
    """

    q_positions_BS: jax.Array | None = None
    k_positions_BT: jax.Array | None = None
    q_segments_BS: jax.Array | None = None
    k_segments_BT: jax.Array | None = None
    lengths_B: jax.Array | None = None
    causal: bool = True
    pages_BJ: jax.Array | None = None
    q_run: int = 0

    @classmethod
    def rows(cls, segment_ids_BS: Int[Array, "B S"] | None = None) -> Self:
        """Each token sees itself and what stands before it in its row, of its segment where there are any."""
        return cls(q_segments_BS=segment_ids_BS, k_segments_BT=segment_ids_BS)

    @property
    def in_row_order(self) -> bool:
        """Whether only the order within the row counts: causal, without positions, segments and lengths."""
        given = (self.q_positions_BS, self.k_positions_BT, self.q_segments_BS, self.k_segments_BT, self.lengths_B)
        return self.causal and all(value is None for value in given)

    @property
    def by_column(self) -> bool:
        """Whether a query sees the first so many keys of its row: their positions are their columns, no segments."""
        return self.k_positions_BT is None and self.q_segments_BS is None

    @property
    def in_columns(self) -> bool:
        """Whether a key's position is its column, whatever queries' positions, segments and lengths are."""
        return self.k_positions_BT is None

    @property
    def in_segments(self) -> bool:
        """Whether only the order within the row and segments count: causal, without positions and lengths."""
        given = (self.q_positions_BS, self.k_positions_BT, self.lengths_B)
        return self.causal and self.q_segments_BS is not None and all(value is None for value in given)

    @property
    def below_diagonal(self) -> bool:
        """Whether a query sees no key that stands behind it in the row, whatever segments and lengths say."""
        return self.causal and self.q_positions_BS is None and self.k_positions_BT is None

    def check(self, batch: int, queries: int, keys: int, *, paged: bool = False) -> None:
        """ValueError for arrays that are not of these sizes, one row may stand for all; for pages where nobody reads
        them."""
        if self.pages_BJ is not None and not paged:
            raise ValueError("visible.pages_BJ: only mla_decode reads keys from pages")
        sizes = {"q": queries, "k": keys}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in ("causal", "pages_BJ", "q_run"):
                continue
            shape = (batch, sizes[field.name[0]]) if field.name != "lengths_B" else (batch,)
            if value.shape not in (shape, (1, *shape[1:])):
                raise ValueError(f"visible.{field.name} {value.shape}: expected {shape}")
        if (self.q_segments_BS is None) != (self.k_segments_BT is None):
            raise ValueError("visible: segments of queries and of keys are given both or not at all")

    def limits(self, batch: int, queries: int, keys: int) -> Int[Array, "B S"]:
        """How many keys, from the first on, each query sees, where it is ``by_column``."""
        limit = jnp.full((1, 1), keys, jnp.int32)
        if self.lengths_B is not None:
            limit = jnp.minimum(limit, self.lengths_B[:, None])
        if self.causal:
            limit = jnp.minimum(limit, 1 + _or_order(self.q_positions_BS, queries))
        return jnp.broadcast_to(jnp.maximum(limit, 0), (batch, queries)).astype(jnp.int32)

    def mask(self, batch: int, queries: int, keys: int) -> Bool[Array, "B S T"]:
        """The definition, S × T: for references and tests."""
        q_BS1 = _or_order(self.q_positions_BS, queries)[:, :, None]
        k_B1T = _or_order(self.k_positions_BT, keys)[:, None, :]
        mask = jnp.broadcast_to(k_B1T <= q_BS1, (batch, queries, keys)) if self.causal else jnp.bool_(True)
        if self.q_segments_BS is not None and self.k_segments_BT is not None:
            mask &= self.q_segments_BS[:, :, None] == self.k_segments_BT[:, None, :]
        if self.lengths_B is not None:
            mask &= jnp.arange(keys) < self.lengths_B[:, None, None]
        return jnp.broadcast_to(mask, (batch, queries, keys))


def _or_order(positions: jax.Array | None, size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)[None] if positions is None else positions


def not_whole_rows(described: bool, queries: int, keys: int) -> str:
    """Why a kernel for causal rows cannot compute this attention, "" where it can. described: the keys are seen in row
    order, or in segments alone."""
    if described and queries == keys:
        return ""
    return "it needs causal rows without positions or lengths, and as many queries as keys"

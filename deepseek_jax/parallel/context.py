"""Rows that several devices share: which tokens each has, and attention over what all of them keep of theirs.

What attention needs of every token, MLA's latent or grouped keys and values, is gathered; queries stay. A causal query
sees what stands before it, so equal parts of a row one behind the other are unequal work. In *balanced* order a row is
cut into 2n pieces of which device i of n has i and 2n-1-i: all devices see equally many keys. The model brings tokens
into that order before the embedding and its last hidden states back, once a step; nothing between them but attention
and sums over segments knows of it.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import Axes, ShardingRules, constrain, per_device, split_by
from deepseek_kernels import Visible

logger = logging.getLogger(__name__)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["visible"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Balanced:
    """What rows in balanced order see: of a ``Visible`` the queries in that order, the keys in the row's own."""

    visible: Visible


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """In which order the tokens of rows go through the layers. ways: devices that share a row in balanced order, 1: in
    its own."""

    rules: ShardingRules
    ways: int = 1

    @classmethod
    def of(cls, rules: ShardingRules, visible: Visible | Balanced, shape: tuple[int, ...]) -> "RowOrder":
        """Of rows (B S): balanced where the mesh splits them and their tokens see what stands before them, and no more
        than that and segments are described. ValueError for a number of rows that the mesh does not divide."""
        ways, (rows, size) = _ways(rules, "sequence"), shape
        if rows % (split := _ways(rules, "batch")):
            raise ValueError(f"{rows} rows, which the mesh splits {split} ways: expected a multiple of {split}")
        if ways == 1 or isinstance(visible, Balanced):
            return cls(rules)
        if not (visible.in_row_order or visible.in_segments):
            return cls(rules)
        if size % (2 * ways):
            _say(f"rows of {size} tokens are not cut into {2 * ways} pieces: the last of {ways} devices has most work")
            return cls(rules)
        return cls(rules, ways)

    def spread(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """From the row's own order into this one, along an axis S behind that of the batch."""
        return self._moved(x, axis, _spread)

    def back(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """The inverse of ``spread``."""
        return self._moved(x, axis, _back)

    def seen(self, visible: Visible | Balanced) -> Visible | Balanced:
        """``visible`` of rows in this order."""
        if self.ways == 1 or isinstance(visible, Balanced):
            return visible
        q_BS, k_BT = visible.q_segments_BS, visible.k_segments_BT
        if q_BS is not None and k_BT is not None:  # the keys' gathered here, once for all layers
            q_BS, k_BT = self.spread(q_BS), constrain(k_BT, self.rules, "batch", None)
        return Balanced(dataclasses.replace(visible, q_segments_BS=q_BS, k_segments_BT=k_BT))

    def _moved(self, x, axis, move):
        if self.ways == 1:
            return x
        axes = (*[None] * (axis - 1), "batch", "sequence", *[None] * (x.ndim - axis - 1))
        local = functools.partial(move, names=self.rules.sequence, ways=self.ways, axis=axis)
        return per_device(local, self.rules, (x,), (axes,), axes)


def pieces(ways: int) -> list[int]:
    """The pieces of a row in balanced order: device i's are 2i and 2i + 1 of this list."""
    return [piece for i in range(ways) for piece in (i, 2 * ways - 1 - i)]


def _spread(x, names, ways, axis):
    """Each device has pieces 2i and 2i + 1. The even ones go to devices of which each gets one, and so do the odd."""
    even, odd = jnp.split(x, 2, axis)
    target = lambda piece: min(piece, 2 * ways - 1 - piece)  # noqa: E731
    even = jax.lax.ppermute(even, names, [(i, target(2 * i)) for i in range(ways)])
    odd = jax.lax.ppermute(odd, names, [(i, target(2 * i + 1)) for i in range(ways)])
    return jnp.concatenate(_swapped(even, odd, names), axis)


def _back(x, names, ways, axis):
    first, last = jnp.split(x, 2, axis)
    even, odd = _swapped(first, last, names)
    source = lambda piece: min(piece, 2 * ways - 1 - piece)  # noqa: E731
    even = jax.lax.ppermute(even, names, [(source(2 * i), i) for i in range(ways)])
    odd = jax.lax.ppermute(odd, names, [(source(2 * i + 1), i) for i in range(ways)])
    return jnp.concatenate([even, odd], axis)


def _swapped(one, other, names):
    """(other, one) on every second device: there the first of its pieces, i, is odd and the last even."""
    swap = jax.lax.axis_index(names) % 2 == 1
    return jnp.where(swap, other, one), jnp.where(swap, one, other)


def per_row_and_head(
    attend: Callable[..., jax.Array],
    rules: ShardingRules,
    operands: Sequence[jax.Array],
    visible: Visible | Balanced,
    *,
    expand: Callable[..., tuple[jax.Array, ...]] = lambda *kept: kept,
    weights: Mapping[str, tuple[Any, Axes]] = {},
) -> jax.Array:
    """``attend(q, *expand(*kept, **weights), visible)`` on each device's own rows, heads and queries.

    operands: queries (B S H …), then what is kept of each token: by head (B T G …) or for all heads (B T …). weights:
    with their logical axes, of which a device has its own ``heads`` and all of the others.

    Where the mesh splits rows a device has a part of the queries and is told their places; what is kept is gathered as
    it is and expanded behind that, so that the gradient of what was gathered, not of what it was expanded to, is added
    up over the devices and scattered; devices that share heads unevenly each attend with all. Elsewhere, where heads
    are split unevenly, it is a plain call, which the compiler splits if it can.
    """
    arrays, axes_of = ({name: pair[i] for name, pair in weights.items()} for i in range(2))
    (q, *kept), size, balanced = operands, operands[0].shape[1], isinstance(visible, Balanced)
    seen = visible.visible if isinstance(visible, Balanced) else visible
    ways, parts = _ways(rules, "sequence"), _ways(rules, "heads")
    by_head = all(x.shape[2] % parts == 0 for x in operands if x.ndim == 4)
    sequence, heads = "sequence" if ways > 1 and size % ways == 0 else None, "heads" if by_head else None
    if not (by_head or sequence):
        assert not balanced
        return attend(q, *expand(*kept, **arrays), seen)
    if not sequence or not all(isinstance(w, jax.Array) for w in arrays.values()):  # FP8 needs no gradient
        if sequence:
            kept = [constrain(x, rules, "batch", *[None] * (x.ndim - 1)) for x in kept]
        kept = [_in_row_order(x, ways) if balanced else x for x in kept]
        kept, expand, arrays, along = expand(*kept, **arrays), lambda *kept: kept, {}, None
    else:
        along = sequence if all(x.shape[1] == size for x in kept) else None  # a cache is whole on each device
    if sequence and seen.causal and seen.q_positions_BS is None:
        seen = _placed(seen, size, ways, balanced)

    def local(q, kept, arrays, seen):
        if along:
            kept = [jax.lax.all_gather(x, rules.sequence, axis=1, tiled=True) for x in kept]
            kept = [_in_row_order(x, ways) if balanced else x for x in kept]
        arrays = {name: _whole(w, axes_of[name], rules) for name, w in arrays.items()}
        return attend(q, *expand(*kept, **arrays), seen)

    def of_rows(path, x):
        return ("batch" if len(x) > 1 else None, *[sequence if path[0].name.startswith("q_") else None] * (x.ndim - 1))

    queries: Axes = ("batch", sequence, heads, None)
    of_kept = [("batch", along, heads, None) if x.ndim == 4 else ("batch", along, None) for x in kept]
    of_arrays = {name: tuple(heads if axis == "heads" else axis for axis in axes_of[name]) for name in arrays}
    axes = queries, of_kept, of_arrays, jax.tree_util.tree_map_with_path(of_rows, seen)
    return per_device(local, rules, (q, list(kept), arrays, seen), axes, queries)


def _whole(w, axes, rules):
    """A device's own heads of a weight, gathered along its other axes, along which its gradient is scattered."""
    for i, axis in enumerate(axes):
        if axis not in (None, "heads") and (names := split_by(getattr(rules, axis))):
            w = jax.lax.all_gather(w, names, axis=i, tiled=True)
    return w


def _in_row_order(x, ways):
    """Of all pieces of a row, as balanced order has them."""
    pairs = x.reshape(len(x), ways, 2, -1, *x.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)


def _placed(visible: Visible, size: int, ways: int, balanced: bool) -> Visible:
    """The queries' places, of which each device is handed its own."""
    places = jnp.arange(size, dtype=jnp.int32)
    if not balanced:
        return dataclasses.replace(visible, q_positions_BS=places[None], q_run=size // ways)
    places = places.reshape(2 * ways, -1)[jnp.array(pieces(ways))].reshape(1, -1)
    return dataclasses.replace(visible, q_positions_BS=places, q_run=size // (2 * ways))


def over_runs(
    sums: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    x_BSE: Float[Array, "B S E"],
    ids_BS: Int[Array, "B S"],
    rules: ShardingRules,
) -> tuple[Float[Array, "B S E"], Float[Array, "B S"]]:
    """``sums(x, ids)``: for each token the sum of ``x`` over the run of its id in the row, and the run's length.

    Where devices share rows, in whichever order, each id but 0 must have one run (``numbered``); what tokens of 0 get
    means nothing. Devices exchange the sums of the first and the last run of each piece: no other goes on elsewhere.
    """
    ways = _ways(rules, "sequence")
    if ways == 1 or ids_BS.shape[1] % ways:
        return sums(x_BSE, ids_BS)
    axes: Axes = ("batch", "sequence", None)
    local = functools.partial(_over_devices, sums, rules.sequence)
    both = per_device(local, rules, (x_BSE, ids_BS), (axes, axes[:2]), axes)
    return both[..., :-1], both[..., -1]


def numbered(ids_BS: Int[Array, "B S"], rules: ShardingRules) -> Int[Array, "B S"]:
    """The runs of ids along rows in their own order, numbered where devices share rows; 0 stays 0."""
    if _ways(rules, "sequence") == 1:
        return ids_BS
    starts_BS = ids_BS != jnp.pad(ids_BS, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(ids_BS == 0, 0, jnp.cumsum(starts_BS, axis=1, dtype=jnp.int32))


def _over_devices(sums, names, x_BSE, ids_BS):
    """The sums with the lengths behind them. A device's two pieces in balanced order are rows of their own here."""
    batch, size = ids_BS.shape
    ids_PS = ids_BS.reshape(batch * (1 if size % 2 else 2), -1)
    found, length = sums(x_BSE.reshape(*ids_PS.shape, -1), ids_PS)
    own_PSE = jnp.concatenate([found, length.astype(found.dtype)[..., None]], axis=2)
    ends = jnp.array([0, -1])
    ids_P2, sums_P2E = ids_PS[:, ends], own_PSE[:, ends]
    one_run = ids_P2[:, 0] == ids_P2[:, 1]
    ids_P2 = ids_P2.at[:, 1].set(jnp.where(one_run, 0, ids_P2[:, 1]))  # not to be counted twice
    ids_BI, sums_BIE = ids_P2.reshape(batch, -1), sums_P2E.reshape(batch, -1, own_PSE.shape[2])
    all_ids_BJ, all_sums_BJE = (jax.lax.all_gather(x, names, axis=1, tiled=True) for x in (ids_BI, sums_BIE))
    same_BIJ1 = (ids_BI[:, :, None] == all_ids_BJ[:, None])[..., None]
    total_P2E = jnp.sum(jnp.where(same_BIJ1, all_sums_BJE[:, None], 0), axis=2).reshape(sums_P2E.shape)
    for end in range(2):
        of_it = ids_PS == ids_P2[:, end, None]
        own_PSE = jnp.where(of_it[..., None], total_P2E[:, end, None], own_PSE)
    return own_PSE.reshape(batch, size, -1)


def _ways(rules: ShardingRules, axis: str) -> int:
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in getattr(rules, axis))


@functools.cache
def _say(what: str) -> None:
    logger.warning("%s", what)

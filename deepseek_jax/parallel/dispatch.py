"""Tokens to the devices that hold their experts, and the sums back, inside a ``shard_map``.

``by_gathering``: every token to every device of the group. ``by_copies``: one copy of a token to each device that holds
any of its experts, in a buffer of fixed size; forward and backward are all-to-alls and gathers (experts_sorted.py).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from deepseek_kernels.experts_sorted import Layout, gather_rows, sum_rows

Axes = tuple[str, ...]
# (x_TD, weights_TK, experts_TK) -> y_TD, experts numbered from the first of a device's own.
Local = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens come to their experts: three of ComputeConfig's fields, and the groups that the router chooses from.

    A token's experts all lie in ``chosen_groups`` of ``groups`` groups, of experts that follow one another.
    """

    how: Literal["gather", "all_to_all"] = "gather"
    capacity: float = 1.5
    nodes: int = 1
    groups: int = 1
    chosen_groups: int = 1

    def rows(self, tokens: int, top: int, parts: int) -> int:
        """Room for copies of ``tokens`` tokens to one of ``parts`` parts of the experts: the mean times capacity."""
        mean = tokens * reached(top, parts, self.groups, self.chosen_groups)
        return min(tokens, math.ceil(round(self.capacity * mean, 6)))


def reached(top: int, parts: int, groups: int = 1, chosen: int = 1) -> float:
    """The share of tokens with an expert in a given one of ``parts`` equal parts of them: ``1 - (1 - 1/parts)^top``, of
    experts that are drawn evenly from ``chosen`` of ``groups`` groups."""
    if parts >= groups:
        return chosen / groups * (1 - (1 - groups / (chosen * parts)) ** top)
    own, share = groups // parts, 0.0
    for drawn in range(1, min(own, chosen) + 1):  # of the chosen groups those that are the part's
        odds = math.comb(own, drawn) * math.comb(groups - own, chosen - drawn) / math.comb(groups, chosen)
        share += odds * (1 - (1 - drawn / chosen) ** top)
    return share


def by_gathering(local: Local, tokens: tuple[jax.Array, jax.Array, jax.Array], axes: Axes, first: jax.Array | int):
    """All tokens (x_TD, weights_TK, experts_TK) of the devices along ``axes``, by this device's experts, which begin
    with ``first`` -> y_TD of its own tokens. Exact. A device gets n - 1 others' tokens, and sends as many sums."""
    if axes:
        tokens = tuple(jax.lax.all_gather(x, axes, tiled=True) for x in tokens)
    x_TD, weights_TK, experts_TK = tokens
    y_TD = local(x_TD, weights_TK, experts_TK - first)
    return jax.lax.psum_scatter(y_TD, axes, tiled=True) if axes else y_TD


def by_copies(
    local: Local, tokens: tuple[jax.Array, jax.Array, jax.Array], axes: Axes, ways: int, own: int, dispatch: Dispatch
) -> tuple[jax.Array, jax.Array]:
    """A copy of each token (x_TD, weights_TK, experts_TK) to each of ``ways`` devices along ``axes`` with any of its
    experts, of which each device has ``own`` -> (y_TD, dropped choices).

    On average, of n devices, a device sends (n - 1)(1 - (1 - 1/n)^K) tokens' worth of copies, and as much comes back.
    Each has room for ``dispatch.rows`` copies from each other; what finds none, the last tokens' first, is dropped: the
    sum of its experts on that device is zero, and so are their gradients.

    Over several nodes in two hops: one copy to each node with any of a token's experts, to the device there of the
    sender's own place, which sends one to each device within the node and adds up what comes back.
    """
    count, top = tokens[2].shape
    place, inside = jax.lax.axis_index(axes), ways // dispatch.nodes

    def to_devices(x_TD, weights_TK, experts_TK):
        groups = [[node * inside + i for i in range(inside)] for node in range(dispatch.nodes)]
        rows = min(len(x_TD), dispatch.rows(count * dispatch.nodes, top, ways))
        hop = _Hop(axes, groups, place % inside, inside, own, rows)
        return hop(lambda *copies: (local(*copies), jnp.float32(0)), x_TD, weights_TK, experts_TK)

    if dispatch.nodes == 1:
        return to_devices(*tokens)
    groups = [[node * inside + i for node in range(dispatch.nodes)] for i in range(inside)]
    rows = dispatch.rows(count, top, dispatch.nodes)
    return _Hop(axes, groups, place // inside, dispatch.nodes, inside * own, rows)(to_devices, *tokens)


@dataclasses.dataclass(frozen=True)
class _Hop:
    """An exchange among the ``parts`` devices of each of ``groups`` along ``axes``, of which this one is number
    ``place``. Each has ``own`` experts, and takes ``rows`` copies from each."""

    axes: Axes
    groups: list[list[int]]
    place: jax.Array
    parts: int
    own: int
    rows: int

    def __call__(self, inner, x_TD, weights_TK, experts_TK):
        """``inner(x, weights, experts) -> (y, dropped)`` of the copies that come here; the sums of each token's."""
        copies, dropped = lay_out(experts_TK, self.parts, self.own, self.rows)
        token_P = copies.choice_P // copies.slot_TK.shape[1]
        # A row without a copy holds some token, and -1 for its experts.
        experts_PK = experts_TK.at[token_P].get(mode="fill", fill_value=-1)
        facts_PN = jnp.concatenate([gather_rows(weights_TK, copies), experts_PK.astype(jnp.float32)], axis=1)
        x_PD, facts_PN = self._swap(gather_rows(x_TD, copies)), self._swap(facts_PN)
        weights_PK, experts_PK = jnp.split(facts_PN, 2, axis=1)
        y_PD, later = inner(x_PD, weights_PK, experts_PK.astype(jnp.int32) - self.place * self.own)
        return sum_rows(self._swap(y_PD), copies), dropped + later

    def _swap(self, x_PN: jax.Array) -> jax.Array:
        """Each device's rows for the others, to them. Its own inverse, and so its transpose."""
        groups = None if len(self.groups) == 1 else self.groups
        x_NRN = x_PN.reshape(self.parts, self.rows, -1)
        return jax.lax.all_to_all(x_NRN, self.axes, 0, 0, axis_index_groups=groups).reshape(x_PN.shape)


def lay_out(experts_TK: jax.Array, parts: int, own: int, rows: int) -> tuple[Layout, jax.Array]:
    """Where each token's copies lie in a buffer of ``rows`` rows for each of ``parts`` parts of ``own`` experts, in the
    order of tokens -> (copies, how many choices of an expert have none because a part's rows are full).

    A copy's column is its part, or where there are more parts than choices the first choice that is the part's.
    """
    part_TK = jnp.where((experts_TK >= 0) & (experts_TK < parts * own), experts_TK // own, parts)
    if parts <= experts_TK.shape[1]:
        every = jnp.arange(parts, dtype=jnp.int32)
        part_TW = jnp.where(jnp.any(part_TK[:, :, None] == every, axis=1), every, parts)
    else:
        earlier = jnp.tril(part_TK[:, :, None] == part_TK[:, None, :], -1)
        part_TW = jnp.where(jnp.any(earlier, axis=2), parts, part_TK)
    (tokens, width), copies, room = part_TW.shape, part_TW.size, parts * rows
    assert (parts + 1) * copies < 2**31, "a sort key would overflow int32"
    order_N = jnp.arange(copies, dtype=jnp.int32)
    key_N = jnp.sort(part_TW.reshape(-1) * copies + order_N)
    part_N, copy_N = key_N // copies, key_N % copies
    sizes_E = jnp.sum(part_TW.reshape(-1)[:, None] == jnp.arange(parts), axis=0, dtype=jnp.int32)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    row_N = order_N - start_E.at[part_N].get(mode="clip")
    slot_N = jnp.where((part_N < parts) & (row_N < rows), part_N * rows + row_N, room)
    slot_TW = jnp.zeros(copies, jnp.int32).at[copy_N].set(slot_N, unique_indices=True).reshape(tokens, width)
    row_R = jnp.arange(rows, dtype=jnp.int32)
    copy_ER = copy_N.at[start_E[:, None] + row_R].get(mode="clip")
    copy_P = jnp.where(row_R < sizes_E[:, None], copy_ER, copies).reshape(-1)
    lost_TW = jnp.where((part_TW < parts) & (slot_TW == room), part_TW, -1)
    dropped = jnp.sum(lost_TW[:, :, None] == part_TK[:, None, :], dtype=jnp.float32)
    return Layout(slot_TW, copy_P, jnp.minimum(sizes_E, rows), 1), dropped

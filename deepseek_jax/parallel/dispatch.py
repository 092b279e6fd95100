"""Tokens to the devices that hold their experts, and the sums back, inside a ``shard_map``.

``by_gathering``: every token to every device of the group. ``by_copies``: one copy of a token to each device that holds
any of its experts, in a buffer of fixed size; forward and backward are gathers (experts_sorted.py) and all-to-alls, or
puts, which are both in one (puts_hopper.py).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from deepseek_kernels import puts_hopper
from deepseek_kernels.experts_sorted import Layout, gather_rows, sum_rows
from deepseek_kernels.target import Target

Axes = tuple[str, ...]
# (x_TD, weights_TK, experts_TK) -> y_TD, experts numbered from the first of a device's own.
Local = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens come to their experts: three of ComputeConfig's fields, the groups that the router chooses from, and
    what puts are for.

    A token's experts all lie in ``chosen_groups`` of ``groups`` groups, of experts that follow one another.
    """

    how: Literal["gather", "all_to_all", "puts"] = "gather"
    capacity: float = 1.5
    nodes: int = 1
    groups: int = 1
    chosen_groups: int = 1
    target: Target | None = None

    def rows(self, tokens: int, top: int, parts: int) -> int:
        """Room for copies of ``tokens`` tokens to one of ``parts`` parts of the experts: the mean times capacity."""
        mean = tokens * reached(top, parts, self.groups, self.chosen_groups)
        rows = min(tokens, math.ceil(round(self.capacity * mean, 6)))
        return rows if self.how != "puts" else -(-rows // puts_hopper.ROWS) * puts_hopper.ROWS

    def axis_of_puts(self, x_TD: jax.Array, axes: Axes) -> str:
        """The only one of ``axes`` with several devices. ValueError where rows of x cannot be put along it."""
        several = [name for name in axes if jax.lax.axis_size(name) > 1]
        why = puts_hopper.refuses(self.target or Target.here(), x_TD.shape[1] * x_TD.dtype.itemsize)
        if len(several) > 1:
            why = f"it needs experts that one mesh axis splits, not {', '.join(several)}"
        if why:
            raise ValueError(f"dispatch='puts': {why}; all_to_all sends the same")
        return several[0]


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
        rows = dispatch.rows(count * dispatch.nodes, top, ways)
        rows = rows if puts else min(len(x_TD), rows)
        hop = Hop(axes, groups, place % inside, inside, own, rows, puts)
        return hop(lambda *copies: (local(*copies), jnp.float32(0)), x_TD, weights_TK, experts_TK)

    puts = dispatch.axis_of_puts(tokens[0], axes) if dispatch.how == "puts" else ""
    if dispatch.nodes == 1:
        return to_devices(*tokens)
    groups = [[node * inside + i for node in range(dispatch.nodes)] for i in range(inside)]
    rows = dispatch.rows(count, top, dispatch.nodes)
    return Hop(axes, groups, place // inside, dispatch.nodes, inside * own, rows)(to_devices, *tokens)


@dataclasses.dataclass(frozen=True)
class Hop:
    """An exchange among the ``parts`` devices of each of ``groups`` along ``axes``, of which this one is number
    ``place``. Each has ``own`` experts, and takes ``rows`` copies from each. puts: the axis along which tokens and
    sums are put; what is small goes by an all-to-all."""

    axes: Axes
    groups: list[list[int]]
    place: jax.Array | int
    parts: int
    own: int
    rows: int
    puts: str = ""

    def __call__(self, inner, x_TD, weights_TK, experts_TK):
        """``inner(x, weights, experts) -> (y, dropped)`` of the copies that come here; the sums of each token's."""
        here, copies, dropped = self.there(x_TD, weights_TK, experts_TK)
        y_PD, later = inner(*here)
        return self.back(y_PD, copies), dropped + later

    def there(self, x_TD, weights_TK, experts_TK):
        """((x, weights, experts) of the copies that come here, where those that leave lie, dropped choices)."""
        copies, dropped = lay_out(experts_TK, self.parts, self.own, self.rows)
        token_P = copies.choice_P // copies.slot_TK.shape[1]
        # A row without a copy holds some token, and -1 for its experts.
        experts_PK = experts_TK.at[token_P].get(mode="fill", fill_value=-1)
        facts_PN = jnp.concatenate([gather_rows(weights_TK, copies), experts_PK.astype(jnp.float32)], axis=1)
        met: jax.Array | int = 0
        if self.puts:
            put: tuple[jax.Array, jax.Array] = _put_there(x_TD, copies, self.puts)
            x_PD, met = put
        else:
            x_PD = self.swap(gather_rows(x_TD, copies))
        weights_PK, experts_PK = jnp.split(self.swap(facts_PN), 2, axis=1)
        # Nothing reads a copy before it knows the copy's experts.
        return (x_PD, weights_PK, experts_PK.astype(jnp.int32) - self.place * self.own + met), copies, dropped

    def back(self, y_PD: jax.Array, copies: Layout) -> jax.Array:
        """Of each token the sum of what its copies became."""
        return _put_back(y_PD, copies, self.puts) if self.puts else sum_rows(self.swap(y_PD), copies)

    def swap(self, x_PN: jax.Array) -> jax.Array:
        """Each device's rows for the others, to them. Its own inverse, and so its transpose."""
        groups = None if len(self.groups) == 1 else self.groups
        x_NRN = x_PN.reshape(self.parts, self.rows, -1)
        return jax.lax.all_to_all(x_NRN, self.axes, 0, 0, axis_index_groups=groups).reshape(x_PN.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _put_there(x_TD: jax.Array, copies: Layout, axis: str) -> tuple[jax.Array, jax.Array]:
    """``swap(gather_rows(x))`` by puts, and 0 when all have put theirs."""
    token_P = jnp.minimum(copies.choice_P // copies.slot_TK.shape[1], len(x_TD) - 1)
    y_NRD, met = puts_hopper.put_rows(x_TD, token_P.reshape(jax.lax.axis_size(axis), -1), axis=axis)
    return y_NRD.reshape(-1, x_TD.shape[1]), met


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _put_back(y_PD: jax.Array, copies: Layout, axis: str) -> jax.Array:
    """``sum_rows(swap(y))`` by puts."""
    row_NR = jnp.arange(len(y_PD), dtype=jnp.int32).reshape(jax.lax.axis_size(axis), -1)
    came_NRD, met = puts_hopper.put_rows(y_PD, row_NR, axis=axis)
    return sum_rows(came_NRD.reshape(y_PD.shape), dataclasses.replace(copies, slot_TK=copies.slot_TK + met))


def _put_gradient(axis: str, copies: Layout, dy_TD: jax.Array) -> tuple[jax.Array, None]:
    put: tuple[jax.Array, jax.Array] = _put_there(dy_TD, copies, axis)
    dy_PD, met = put
    return dy_PD * (1 + met).astype(dy_PD.dtype), None  # one, and XLA waits for it


# Each is the other's transpose.
_put_there.defvjp(
    lambda x, copies, axis: (_put_there(x, copies, axis), copies),
    lambda axis, copies, gradients: (_put_back(gradients[0], copies, axis), None),
)
_put_back.defvjp(lambda y, copies, axis: (_put_back(y, copies, axis), copies), _put_gradient)


def lay_out(experts_TK: jax.Array, parts: int, own: int, rows: int) -> tuple[Layout, jax.Array]:
    """Where each token's copies lie in a buffer of ``rows`` rows for each of ``parts`` parts of ``own`` experts, in the
    order of tokens -> (copies, how many choices of an expert have none because a part's rows are full).

    A copy's column is its part, or where there are more parts than choices the first choice that is the part's.
    """
    (tokens, top), room = experts_TK.shape, parts * rows
    part_TK = jnp.where((experts_TK >= 0) & (experts_TK < parts * own), experts_TK // own, parts)
    every_E = jnp.arange(parts, dtype=jnp.int32)
    choices_ET = jnp.sum(part_TK[None] == every_E[:, None, None], axis=2, dtype=jnp.int32)
    wanted_ET = choices_ET > 0
    row_ET, sizes_E = counted(wanted_ET)
    slot_ET = jnp.where(wanted_ET & (row_ET < rows), every_E[:, None] * rows + row_ET, room)
    if parts <= top:
        slot_TW = slot_ET.T
    else:
        earlier = jnp.tril(part_TK[:, :, None] == part_TK[:, None, :], -1)
        slot_TW = slot_ET.at[part_TK, jnp.arange(tokens)[:, None]].get(mode="fill", fill_value=room)
        slot_TW = jnp.where(jnp.any(earlier, axis=2), room, slot_TW)
    copy_N = jnp.arange(slot_TW.size, dtype=jnp.int32)
    place_N = jnp.where(slot_TW.reshape(-1) < room, slot_TW.reshape(-1), room + copy_N)  # past it, each elsewhere
    copy_P = jnp.full(room, slot_TW.size, jnp.int32).at[place_N].set(copy_N, mode="drop", unique_indices=True)
    dropped = jnp.sum(jnp.where(slot_ET == room, choices_ET, 0), dtype=jnp.float32)
    return Layout(slot_TW, copy_P, jnp.minimum(sizes_E, rows), 1), dropped


def counted(some_ET: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each place of a row how many before it are true, and how many of the row are. By two small products with
    triangles, exact in float32: XLA:GPU makes two kernels for each doubling of a cumulative sum's length."""
    parts, size = some_ET.shape
    assert size < 2**24, "a count would overflow float32"
    block = 1 << (max(size - 1, 1).bit_length() + 1) // 2
    some_EBT = jnp.pad(some_ET.astype(jnp.float32), ((0, 0), (0, -size % block))).reshape(parts, -1, block)

    def before(x):
        return jnp.matmul(x, jnp.triu(jnp.ones((x.shape[-1],) * 2), 1), precision="highest")

    sums_EB = jnp.sum(some_EBT, axis=2)
    counts_EBT = before(some_EBT) + before(sums_EB)[:, :, None]
    return counts_EBT.reshape(parts, -1)[:, :size].astype(jnp.int32), jnp.sum(sums_EB, axis=1).astype(jnp.int32)

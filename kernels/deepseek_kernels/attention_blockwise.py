"""Attention in blocks of plain ``lax``, for every target and dtype: no S × T array, forward or backward.

A loop over blocks of queries holds one over blocks of keys, with the running maximum and sum of an online softmax. The
backward pass, its own, recomputes a block's weights from each query's saved ``log Σ exp`` (autodiff of the loops would
save every block). Where only the order in the row counts, blocks above the diagonal are left out of both. What fits one
block runs without loops, padding or rescaling: decoding is two products and a softmax.

Layout inside: q (B G M S K), k (B G T K), v (B G T V), with G heads of keys and values for M query heads each.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels.kept import kept
from deepseek_kernels.visible import Visible

_LARGEST = 512  # rows and columns of a block
_SMALLEST = 128
_NUMBERS = 1 << 26  # scores of one block over batch and heads, about: 256 MiB in float32
_LOWEST = float(jnp.finfo(jnp.float32).min)


def attend(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGV: Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the visible t; zeros where there are none.

    Query head h reads head ``h // (H/G)`` of keys and values. Scores, softmax and sums are float32; the weights are
    rounded to v's dtype for their product.
    """
    out_BGMSV: jax.Array = _attend(*_heads_first(q_BSHK, k_BTGK, v_BTGV), visible, scale)
    return _heads_last(out_BGMSV)


def with_sums(q_BSHK, k_BTGK, v_BTGV, visible, scale):
    """``attend``'s result, and each query's ``log Σ exp`` (B H S), which ``gradients`` wants."""
    out, (*_, log_sum) = _forward(*_heads_first(q_BSHK, k_BTGK, v_BTGV), visible, scale)
    return _heads_last(out), log_sum.reshape(len(out), -1, out.shape[3])


def gradients(q_BSHK, k_BTGK, v_BTGV, visible, scale, out_BSHV, log_sum_BHS, dout_BSHV):
    """Of ``attend`` in q, k and v."""
    q, k, v = _heads_first(q_BSHK, k_BTGK, v_BTGV)
    out, dout = _queries_first(out_BSHV, k.shape[1]), _queries_first(dout_BSHV, k.shape[1])
    residuals = q, k, v, visible, out, log_sum_BHS.reshape(*q.shape[:4], 1)
    dq, dk, dv, _ = _backward(scale, residuals, dout)
    return _heads_last(dq), jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)


def _heads_first(q_BSHK, k_BTGK, v_BTGV):
    return _queries_first(q_BSHK, k_BTGK.shape[2]), jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGV, 1, 2)


def _queries_first(q_BSHK, groups):
    B, S, H, K = q_BSHK.shape
    return jnp.transpose(q_BSHK.reshape(B, S, groups, H // groups, K), (0, 2, 3, 1, 4))


def _heads_last(out_BGMSV):
    B, G, M, S, V = out_BGMSV.shape
    return jnp.transpose(out_BGMSV, (0, 3, 1, 2, 4)).reshape(B, S, G * M, V)


class _Grid(NamedTuple):
    """S queries in ``across`` blocks of ``rows``, T keys in ``down`` blocks of ``columns``."""

    S: int
    T: int
    rows: int
    columns: int

    @classmethod
    def of(cls, q_BGMSK, k_BGTK) -> "_Grid":
        (B, G, M, S, _), T = q_BGMSK.shape, k_BGTK.shape[2]
        area = max(_SMALLEST**2, min(_LARGEST**2, _NUMBERS // (B * G * M)))
        rows = _even(S, 1 << (area.bit_length() - 1) // 2)
        return cls(S, T, rows, _even(T, area // rows))

    @property
    def across(self) -> int:
        return -(-self.S // self.rows)

    @property
    def down(self) -> int:
        return -(-self.T // self.columns)

    def pad(self, array, axis: int, keys: bool, value: float = 0):
        short = self.down * self.columns - self.T if keys else self.across * self.rows - self.S
        widths = [(0, short if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=value) if short else array


def _even(size: int, largest: int) -> int:
    """The size of the fewest blocks of at most ``largest``, of about one size so that little is padded."""
    count = -(-size // largest)
    return size if count <= 1 else min(largest, -(-size // (16 * count)) * 16)


class _Sides(NamedTuple):
    """The padded arrays that queries and keys are read from, a block at a time."""

    grid: _Grid
    q: jax.Array
    k: jax.Array
    v: jax.Array
    visible: Visible

    @classmethod
    def of(cls, grid, q, k, v, visible) -> "_Sides":
        fields = {}
        for name in ("q_positions_BS", "q_segments_BS", "k_positions_BT", "k_segments_BT"):
            value = getattr(visible, name)
            fields[name] = None if value is None else grid.pad(value, 1, name.startswith("k"))
        visible = Visible(lengths_B=visible.lengths_B, causal=visible.causal, **fields)
        return cls(grid, grid.pad(q, 3, False), grid.pad(k, 2, True), grid.pad(v, 2, True), visible)

    def rows(self, array, i, axis):
        return _block(array, i, self.grid.rows, axis)

    def columns(self, array, j, axis=2):
        return _block(array, j, self.grid.columns, axis)

    def scores(self, i, j, scale):
        """Float32 scores (B G M s t) of a block, -∞ where the query does not see the key."""
        q, k = self.rows(self.q, i, 3), self.columns(self.k, j)
        scores = _each(q, k) * scale
        mask = self.mask(i, j)
        return scores if mask is None else jnp.where(mask[:, None, None], scores, -jnp.inf)

    def mask(self, i, j):
        """(B or 1, s, t), or None where everything is visible."""
        grid, visible = self.grid, self.visible
        t = j * grid.columns + jnp.arange(grid.columns)[None, None]
        parts = []
        if grid.T % grid.columns:
            parts.append(t < grid.T)
        if visible.lengths_B is not None:
            parts.append(t < visible.lengths_B[:, None, None])
        if visible.causal:
            q, k = visible.q_positions_BS, visible.k_positions_BT
            s = i * grid.rows + jnp.arange(grid.rows)[None] if q is None else self.rows(q, i, 1)
            parts.append((t if k is None else self.columns(k, j, 1)[:, None]) <= s[:, :, None])
        if visible.q_segments_BS is not None:
            q, k = self.rows(visible.q_segments_BS, i, 1), self.columns(visible.k_segments_BT, j, 1)
            parts.append(q[:, :, None] == k[:, None])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    @property
    def places(self):
        """Queries' positions where a key's is its column, so that blocks behind a query can be left out."""
        return self.visible.q_positions_BS if self.visible.causal and self.visible.in_columns else None

    def last(self, i):
        """The number of blocks of keys that block i of queries can see any of."""
        grid, last = self.grid, self.grid.down
        if self.visible.below_diagonal:
            last = jnp.minimum(last, -(-(i + 1) * grid.rows // grid.columns))
        elif (positions := self.places) is not None:
            last = jnp.minimum(last, jnp.max(self.rows(positions, i, 1)) // grid.columns + 1)
        if self.visible.lengths_B is not None:
            last = jnp.minimum(last, -(-jnp.max(self.visible.lengths_B) // grid.columns))
        return last

    def first(self, j):
        """The first block of queries that can see any of block j of keys."""
        grid = self.grid
        if self.visible.below_diagonal:
            return j * grid.columns // grid.rows
        if (positions := self.places) is None:
            return 0
        seen_I = jnp.max(positions.reshape(-1, grid.across, grid.rows), axis=(0, 2)) >= j * grid.columns
        return jnp.where(jnp.any(seen_I), jnp.argmax(seen_I), grid.across)


def _block(array, index, size, axis):
    """A block of an axis, or the array itself where it is one block."""
    return array if array.shape[axis] == size else jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _put(array, part, index, axis):
    return jax.lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), index * part.shape[axis], axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, visible, scale):
    return _forward(q, k, v, visible, scale)[0]


def _forward(q, k, v, visible, scale):
    grid = _Grid.of(q, k)
    sides, heads = _Sides.of(grid, q, k, v, visible), q.shape[:3]

    def queries(i):
        if grid.down == 1:
            state = _first(sides, i, scale)
        else:
            zeros = jnp.zeros((*heads, grid.rows, 1), jnp.float32)
            empty = jnp.zeros((*heads, grid.rows, v.shape[3]), jnp.float32), zeros, zeros + _LOWEST
            step = lambda j, state: _next(sides, i, j, scale, state)  # noqa: E731
            state = jax.lax.fori_loop(0, sides.last(i), step, empty)
        sums, total, top = state
        seen = total != 0  # a NaN is: it stays one
        out = jnp.where(seen, sums / jnp.where(seen, total, 1), 0).astype(v.dtype)
        return out, jnp.where(seen, top + jnp.log(total), jnp.inf)  # ∞: every weight is 0

    if grid.across == 1:
        out, log_sum = queries(0)
    else:
        size = grid.across * grid.rows
        empty = jnp.zeros((*heads, size, v.shape[3]), v.dtype), jnp.zeros((*heads, size, 1), jnp.float32)
        step = lambda i, all_: tuple(_put(whole, part, i, 3) for whole, part in zip(all_, queries(i), strict=True))  # noqa: E731
        out, log_sum = (whole[:, :, :, : grid.S] for whole in jax.lax.fori_loop(0, grid.across, step, empty))
    out, log_sum = kept(out), kept(log_sum)
    return out, (q, k, v, visible, out, log_sum)


def _first(sides, i, scale):
    """The state of a query's softmax after its only block of keys: (Σ p v, Σ p, maximum), p not normalised."""
    scores = sides.scores(i, 0, scale)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), _LOWEST)  # finite: exp(-∞ - top) is 0
    p = jnp.exp(scores - top)
    return _weighted(p, sides.v), jnp.sum(p, axis=-1, keepdims=True), top


def _next(sides, i, j, scale, state):
    """The state with one more block of keys."""
    sums, total, top = state
    scores = sides.scores(i, j, scale)
    higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    p, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
    sums = sums * shrink + _weighted(p, sides.columns(sides.v, j))
    return sums, total * shrink + jnp.sum(p, axis=-1, keepdims=True), higher


# The three products of a block, summed in float32. A head's M · s rows are one axis: two would be transposed.


def _each(rows_BGMSK, k_BGTK):
    """(B G M s t): every row by every key."""
    return _product("bgrk,bgtk->bgrt", _flat(rows_BGMSK), k_BGTK).reshape(*rows_BGMSK.shape[:4], -1)


def _weighted(p_BGMST, v_BGTV):
    """(B G M s V): the values weighted for every row."""
    return _product("bgrt,bgtv->bgrv", _flat(p_BGMST), v_BGTV).reshape(*p_BGMST.shape[:4], -1)


def _summed(p_BGMST, rows_BGMSK):
    """(B G t K): the rows weighted for every key."""
    return _product("bgrt,bgrk->bgtk", _flat(p_BGMST), _flat(rows_BGMSK))


def _flat(array):
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _product(equation, a, b):
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _backward(scale, residuals, dout):
    q, k, v, visible, out, log_sum = residuals
    grid = _Grid.of(q, k)
    sides = _Sides.of(grid, q, k, v, visible)
    # Σ_t dp · p = Σ dout · out (arXiv 2205.14135, section B.2).
    along = grid.pad(jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True), 3, False)
    log_sum, dout = grid.pad(log_sum, 3, False, jnp.inf), grid.pad(dout.astype(v.dtype), 3, False)

    def block(i, j):
        """(dq, dk, dv) of a block, float32."""
        p = jnp.exp(sides.scores(i, j, scale) - sides.rows(log_sum, i, 3))
        dout_i = sides.rows(dout, i, 3)
        dp = _each(dout_i, sides.columns(sides.v, j))
        ds = (p * (dp - sides.rows(along, i, 3)) * scale).astype(q.dtype)
        dq, dk = _weighted(ds, sides.columns(sides.k, j)), _summed(ds, sides.rows(sides.q, i, 3))
        return dq, dk, _summed(p, dout_i)

    if grid.across == grid.down == 1:
        return *(part.astype(a.dtype) for part, a in zip(block(0, 0), (q, k, v), strict=True)), None

    def keys(j, whole):
        def step(i, sums):
            dq, dk_j, dv_j = sums
            part, more_k, more_v = block(i, j)
            return _put(dq, sides.rows(dq, i, 3) + part, i, 3), dk_j + more_k, dv_j + more_v

        dq, dk, dv = whole
        empty = [jnp.zeros((*a.shape[:2], grid.columns, a.shape[3]), jnp.float32) for a in (k, v)]
        dq, dk_j, dv_j = jax.lax.fori_loop(sides.first(j), grid.across, step, (dq, *empty))
        return dq, _put(dk, dk_j, j, 2), _put(dv, dv_j, j, 2)

    empty = jnp.zeros(sides.q.shape, jnp.float32), jnp.zeros(sides.k.shape, k.dtype), jnp.zeros(sides.v.shape, v.dtype)
    dq, dk, dv = jax.lax.fori_loop(0, grid.down, keys, empty)
    return dq[:, :, :, : grid.S].astype(q.dtype), dk[:, :, : grid.T], dv[:, :, : grid.T], None


_attend.defvjp(_forward, _backward)

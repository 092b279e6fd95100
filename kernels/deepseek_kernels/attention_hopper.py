"""MLA's causal attention in training and prefill on NVIDIA Hopper, in Pallas' Mosaic GPU: segments, any length.

Keys are 192 wide and values 128, read where they lie: a head's own part and values in one array, the part that all
heads share in another. Blocks of keys above the diagonal are left out, and so are those in which no query's segment
has a key; where a block of queries and one of keys are of a single segment, nothing is hidden. The backward pass sums
in a fixed order: one kernel goes over the queries for each block of keys, one over the keys for each block of queries.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_sizes
from deepseek_kernels.attention_hopper_forward import forward
from deepseek_kernels.attention_hopper_keys import keys_gradient
from deepseek_kernels.attention_hopper_queries import queries_gradient
from deepseek_kernels.attention_hopper_tiles import BLOCK, Operands
from deepseek_kernels.kept import kept
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible, not_whole_rows

_WIDTHS = 192, 128  # of keys and of values, 64 of a key are rotated: V2, V2-Lite, V3
_UNIT = 8  # rows that a copy needs


def refuses(
    target: Target,
    dtype: Any,
    *,
    in_row_order: bool,
    queries: int,
    keys: int,
    key_width: int,
    value_width: int,
    in_segments: bool = False,
    shared_by: int = 1,
    devices: int = 1,
    **_: Any,
) -> str:
    """Why the kernels cannot run; "" where they can."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    if why := not_whole_rows(in_row_order or in_segments, queries, keys):
        return why
    if (key_width, value_width) != _WIDTHS:
        return f"it needs keys of {_WIDTHS[0]} and values of {_WIDTHS[1]} numbers, not {key_width} and {value_width}"
    return "" if devices == 1 else f"it needs one device, not a mesh of {devices}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BSHK: Float[Array, "B S H K"],
    kv_BTHW: Float[Array, "B T H W"],
    pe_BTR: Float[Array, "B T R"],
    visible: Visible,
    scale: float,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·[k | pe][t] · scale) v[t]`` over the t ≤ s, of s's segment where there are any,
    with ``kv = [k | v]``; zeros for a query that sees no key. Scores, softmax and sums are float32, weights are
    rounded to bfloat16 for their products.

    Raises:
      ValueError: a rotated part that no copy takes.
    """
    if pe_BTR.shape[-1] % 64:
        raise ValueError(f"pe {pe_BTR.shape}: expected a multiple of 64 rotated numbers, or implementation='cudnn'")
    return _forward(q_BSHK, kv_BTHW, pe_BTR, visible, scale)[0]


def _forward(q, kv, pe, visible, scale):
    out, logs = map(kept, hopper_attention(q, kv, pe, visible, scale))
    return out, (q, kv, pe, visible, out, logs)


def _backward(scale, residuals, dout):
    return *hopper_attention_gradients(*residuals, dout, scale), None


attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=4)  # lowered once for all layers, like the next
def hopper_attention(q, kv, pe, visible, scale):
    S = q.shape[1]
    ids, (of_queries, _) = _plan(visible, len(q), S)
    out, logs = forward(_whole(q, _UNIT), _whole(kv, _UNIT), _whole(pe, _UNIT), ids, of_queries, scale)
    return out[:, :S], logs


@functools.partial(jax.jit, static_argnums=7)
def hopper_attention_gradients(q, kv, pe, visible, out, logs, dout, scale):
    S = q.shape[1]
    along_BSH = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    along_BHP = jnp.swapaxes(_whole(along_BSH, BLOCK), 1, 2)
    padded = (_whole(x, _UNIT) for x in (q, kv, pe, dout.astype(q.dtype)))
    operands = Operands._make([*padded, logs, along_BHP])
    ids, (of_queries, of_keys) = _plan(visible, len(q), S)
    dq = queries_gradient(operands, ids, of_queries, scale)
    dkv, dpe_BTHR = keys_gradient(operands, ids, of_keys, scale)
    dpe = jnp.sum(dpe_BTHR.astype(jnp.float32), axis=2).astype(pe.dtype)
    return tuple(gradient[:, :S] for gradient in (dq, dkv, dpe))


def _whole(x, unit):
    """Rows of zeros behind the others up to a multiple."""
    rows = pl.cdiv(x.shape[1], unit) * unit
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) if rows > x.shape[1] else x


def _plan(visible: Visible, batch: int, size: int):
    """Segments of queries and of keys, or None, and what blocks see of each other."""
    if visible.q_segments_BS is None or visible.k_segments_BT is None:
        none = jnp.zeros((1, 1, 2), jnp.int32)  # not read
        return None, (none, none)
    rows = lambda ids: _whole(jnp.broadcast_to(ids, (batch, size)).astype(jnp.int32), BLOCK)  # noqa: E731
    ids = rows(visible.q_segments_BS), rows(visible.k_segments_BT)
    return ids, seen(*ids)


def seen(q_ids_BP: Int[Array, "B P"], k_ids_BP: Int[Array, "B P"]) -> tuple[Int[Array, "B I 2"], Int[Array, "B I 2"]]:
    """What blocks see of each other, by the lowest and the highest number of their segments: right for any numbers,
    and as much as can be left out where a row's segments lie one behind the other in the order of their numbers.

    Of each block of queries: the first block of keys that it may see any of, and from which on it sees all, up to the
    diagonal's. Of each block of keys: where the blocks of queries behind it end that see all of it, and any of it.
    """
    (q_low, q_high), (k_low, k_high) = _ranges(q_ids_BP), _ranges(k_ids_BP)
    q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
    blocks = q_low.shape[1]
    i, j = jnp.arange(blocks)[:, None], jnp.arange(blocks)[None]
    some = (j < i) & (q_low <= k_high) & (k_low <= q_high)
    all_but = (j < i) & ((q_low != k_high) | (k_low != q_high))
    first = jnp.min(jnp.where(some, j, i), axis=2)
    whole_from = jnp.maximum(jnp.max(jnp.where(all_but, j + 1, 0), axis=2), first)
    end = jnp.max(jnp.where(some, i + 1, j + 1), axis=1)
    whole_end = jnp.minimum(jnp.min(jnp.where(all_but, i, blocks), axis=1), end)
    pair = lambda *numbers: jnp.stack(numbers, axis=2).astype(jnp.int32)  # noqa: E731
    return pair(first, whole_from), pair(whole_end, end)


def _ranges(ids_BP):
    """The lowest and the highest number of each block, less one without a sign: 0, of what is padded, is the last."""
    ids_BIN = (ids_BP.astype(jnp.uint32) - 1).reshape(len(ids_BP), -1, BLOCK)
    return jnp.min(ids_BIN, axis=2), jnp.max(ids_BIN, axis=2)

"""MLA's causal attention in training and prefill on NVIDIA Hopper, in Pallas' Mosaic GPU: segments, any length.

Keys are 192 wide and values 128, read where they lie: a head's own part and values in one array, the part that all
heads share in another. Blocks of keys above the diagonal are left out, and so are those in which no query's segment
has a key; where a block of queries and one of keys are of a single segment, nothing is hidden. Queries may be a part of
their row, in runs of whole blocks. The backward pass sums in a fixed order: one kernel goes over the queries for each
block of keys, one over the keys for each block of queries.
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
from deepseek_kernels.attention_hopper_tiles import BLOCK, Ids, Operands, Plan
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
    in_runs: int = 0,
    devices: int = 1,
    **_: Any,
) -> str:
    """Why the kernels cannot run; "" where they can."""
    if why := hopper_sizes.refuses(target, dtype):
        return why
    placed = in_runs and not in_runs % BLOCK  # whole blocks of queries, each before a block of keys
    if not placed and (why := not_whole_rows(in_row_order or in_segments, queries, keys)):
        return why
    if (key_width, value_width) != _WIDTHS:
        return f"it needs keys of {_WIDTHS[0]} and values of {_WIDTHS[1]} numbers, not {key_width} and {value_width}"
    return "" if devices == 1 else f"it needs one device, not a mesh of {devices}"


def refuses_grouped(target: Target, dtype: Any, *, key_width: int, value_width: int, **facts: Any) -> str:
    """The same of ``grouped``."""
    if max(key_width, value_width) > _WIDTHS[1]:
        return f"it needs keys and values of {_WIDTHS[1]} numbers or fewer, not {key_width} and {value_width}"
    return refuses(target, dtype, key_width=_WIDTHS[0], value_width=_WIDTHS[1], **facts)


def grouped(
    q_BSHN: Float[Array, "B S H N"],
    k_BTGN: Float[Array, "B T G N"],
    v_BTGV: Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
) -> Float[Array, "B S H V"]:
    """``attend`` for heads that share keys and values, which it gets by query head and with zeros up to its widths: at
    128 numbers a quarter more products than need be. For what cuDNN does not take: parts of rows, packed rows."""
    whole, more = _WIDTHS[1], _WIDTHS[0] - _WIDTHS[1]
    wide = lambda x, width: jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])])  # noqa: E731
    kv_BTGW = jnp.concatenate([wide(k_BTGN, whole), wide(v_BTGV, whole)], axis=-1)
    # Through float32, which costs nothing, so that the gradient of what heads share is summed in it.
    shared_by = q_BSHN.shape[2] // kv_BTGW.shape[2]
    kv_BTHW = jnp.repeat(kv_BTGW.astype(jnp.float32), shared_by, axis=2).astype(kv_BTGW.dtype)
    pe_BTR = jnp.zeros((*kv_BTHW.shape[:2], more), kv_BTHW.dtype)
    out: jax.Array = attend(wide(q_BSHN, whole + more), kv_BTHW, pe_BTR, visible, scale)
    return out[..., : v_BTGV.shape[-1]]


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
    out, logs = map(kept, hopper_attention(q, kv, pe, *_plan(visible, q, kv), scale))
    return out, (q, kv, pe, visible, out, logs)


def _backward(scale, residuals, dout):
    q, kv, pe, visible, out, logs = residuals
    return *hopper_attention_gradients(q, kv, pe, *_plan(visible, q, kv), out, logs, dout, scale), None


attend.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=5)  # lowered once for all layers, like the next
def hopper_attention(q, kv, pe, ids, plan, scale):
    S = q.shape[1]
    out, logs = forward(_whole(q, _UNIT), _whole(kv, _UNIT), _whole(pe, _UNIT), ids, plan, scale)
    return out[:, :S], logs


@functools.partial(jax.jit, static_argnums=8)
def hopper_attention_gradients(q, kv, pe, ids, plan, out, logs, dout, scale):
    S, T = q.shape[1], kv.shape[1]
    along_BSH = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    along_BHP = jnp.swapaxes(_whole(along_BSH, BLOCK), 1, 2)
    padded = (_whole(x, _UNIT) for x in (q, kv, pe, dout.astype(q.dtype)))
    operands = Operands._make([*padded, logs, along_BHP])
    dq = queries_gradient(operands, ids, plan, scale)
    dkv, dpe_BTHR = keys_gradient(operands, ids, plan, scale)
    dpe = jnp.sum(dpe_BTHR.astype(jnp.float32), axis=2).astype(pe.dtype)
    return dq[:, :S], dkv[:, :T], dpe[:, :T]


def _whole(x, unit):
    """Rows of zeros behind the others up to a multiple."""
    rows = pl.cdiv(x.shape[1], unit) * unit
    return jnp.pad(x, [(0, 0), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) if rows > x.shape[1] else x


def _plan(visible: Visible, q_BSHK: jax.Array, kv_BTHW: jax.Array) -> tuple[Ids, Plan]:
    """Segments of queries and of keys, or None, and what blocks see of each other."""
    (batch, queries), keys = q_BSHK.shape[:2], kv_BTHW.shape[1]
    rows = lambda ids, size: _whole(jnp.broadcast_to(ids, (batch, size)).astype(jnp.int32), BLOCK)  # noqa: E731
    ids = places_BI = None
    if visible.q_segments_BS is not None and visible.k_segments_BT is not None:
        ids = rows(visible.q_segments_BS, queries), rows(visible.k_segments_BT, keys)
    if visible.in_runs and visible.q_positions_BS is not None:
        places_BI = rows(visible.q_positions_BS, queries)[:, ::BLOCK] // BLOCK
    if ids is None and places_BI is None:
        none = jnp.zeros((1, 1, 2), jnp.int32)  # not read
        return None, Plan(none, none, None)
    one = jnp.zeros((batch, 1), jnp.int32)
    return ids, Plan(*seen(*(ids or (rows(one, queries), rows(one, keys))), places_BI), places_BI)


def seen(
    q_ids_BP: Int[Array, "B P"], k_ids_BP: Int[Array, "B Q"], places_BI: Int[Array, "B I"] | None = None
) -> tuple[Int[Array, "B I 2"], Int[Array, "B J X"]]:
    """What blocks see of each other, by the lowest and the highest number of their segments: right for any numbers,
    and as much as can be left out where a row's segments lie one behind the other in the order of their numbers.

    Of each block of queries: the first block of keys that it may see any of, and from which on it sees all, up to the
    diagonal's. Of each block of keys: where the blocks of queries behind it end that see all of it, and any of it.

    places_BI: the block of keys at whose diagonal a block of queries stands; None: its own number. Of each block of
    keys there is told, in front of the others, the first block of queries that sees any of it; of those behind it some
    may see all, up to the second number, and none does from the third on.
    """
    (q_low, q_high), (k_low, k_high) = _ranges(q_ids_BP), _ranges(k_ids_BP)
    blocks, i, j = q_low.shape[1], jnp.arange(q_low.shape[1])[:, None], jnp.arange(k_low.shape[1])[None]
    q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
    place = i if places_BI is None else places_BI[:, :, None]
    some = (j < place) & (q_low <= k_high) & (k_low <= q_high)
    all_but = (j < place) & ((q_low != k_high) | (k_low != q_high))
    first = jnp.min(jnp.where(some, j, place), axis=2)
    whole_from = jnp.maximum(jnp.max(jnp.where(all_but, j + 1, 0), axis=2), first)
    put = lambda *numbers: jnp.stack(numbers, axis=2).astype(jnp.int32)  # noqa: E731
    if places_BI is None:
        end = jnp.max(jnp.where(some, i + 1, j + 1), axis=1)
        whole_end = jnp.minimum(jnp.min(jnp.where(all_but, i, blocks), axis=1), end)
        return put(first, whole_from), put(whole_end, end)
    any_of_it = some | (j == place)
    end = jnp.max(jnp.where(any_of_it, i + 1, 0), axis=1)
    start = jnp.minimum(jnp.min(jnp.where(any_of_it, i, blocks), axis=1), end)
    hides = (i > start[:, None]) & ((j >= place) | all_but)
    whole_end = jnp.minimum(jnp.min(jnp.where(hides, i, blocks), axis=1), end)
    return put(first, whole_from), put(start, whole_end, end)


def _ranges(ids_BP):
    """The lowest and the highest number of each block, less one without a sign: 0, of what is padded, is the last."""
    ids_BIN = (ids_BP.astype(jnp.uint32) - 1).reshape(len(ids_BP), -1, BLOCK)
    return jnp.min(ids_BIN, axis=2), jnp.max(ids_BIN, axis=2)

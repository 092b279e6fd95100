"""Causal attention on TPUs by jax's splash attention: unequal widths, segments, forward and backward.

What is added: rows of any length (padded to whole blocks), the scale, zeros for a query that sees no key, tables of the
blocks to visit that are written down and not found by looking at S × S numbers (8 to 15 s of the host at 32k), and
residuals that ``jax.checkpoint`` can keep.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float

from deepseek_kernels import tpu
from deepseek_kernels.kept import kept
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible, not_whole_rows

_FUSED = 4  # blocks of keys up to which dq is made beside dk and dv, a copy for each block: more would fill the memory
_HIDDEN = splash.DEFAULT_MASK_VALUE  # score of a key that is not seen


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
) -> str:
    """Why splash attention cannot do this attention; "" where it can. devices: that the operands may be split over."""
    if why := tpu.refuses(target, dtype):
        return why
    if why := not_whole_rows(in_row_order or in_segments, queries, keys):
        return why
    if devices > 1:
        return f"it is not split over {devices} devices by itself: it needs a shard_map around it"
    if key_width % 64 or value_width % 64:
        return f"it needs widths that are multiples of 64, not {key_width} and {value_width}"
    return ""


def attend(
    q_BSHK: Float[Array, "B S H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGV: Float[Array, "B S G V"],
    visible: Visible,
    scale: float,
    *,
    chip: str,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the t ≤ s of s's segment, if ``visible`` has segments;
    zeros where there are none. H/G query heads share a head of keys."""
    (B, S), G, dtype, chosen = q_BSHK.shape[:2], k_BSGK.shape[2], q_BSHK.dtype, tpu.CHIPS[chip]
    largest, at_once = chosen.attention
    block = tpu.even(S, largest)
    padded = -(-S // block) * block
    # Cores share the rows of the batch: where those are uneven, heads are taken for rows.
    parts = chosen.cores if B % chosen.cores and not G % chosen.cores else 1

    def heads_first(x_BSHK):
        x_BHSK = jnp.pad(jnp.swapaxes(x_BSHK, 1, 2), ((0, 0), (0, 0), (0, padded - S), (0, 0)))
        return x_BHSK.reshape(B * parts, -1, *x_BHSK.shape[2:])

    segments = None
    if visible.q_segments_BS is not None and visible.k_segments_BT is not None:
        rows = (jnp.broadcast_to(ids, (B, S)) for ids in (visible.q_segments_BS, visible.k_segments_BT))
        rows = (jnp.pad(ids, ((0, 0), (0, padded - S))) for ids in rows)
        segments = splash.SegmentIds(*(jnp.repeat(ids, parts, axis=0) for ids in rows))
    # A padded key stands behind every query. The scale is rounded into q, as the kernel has none.
    q_BHSK, k_BGSK, v_BGSV = map(heads_first, ((q_BSHK.astype(jnp.float32) * scale).astype(dtype), k_BSGK, v_BSGV))
    # Where cores share the rows, all visit the same blocks: a row by itself would leave them one of two.
    chip_blocks = block, _divisor(block, at_once), chosen.cores == 1
    out_BHSV: Any = _attend(q_BHSK, k_BGSK, v_BGSV, segments, chip_blocks)
    return jnp.swapaxes(out_BHSV.reshape(B, -1, *out_BHSV.shape[2:]), 1, 2)[:, :S]


def _divisor(block: int, largest: int) -> int:
    """The largest part of a block that its halves, thirds, … of whole lanes allow."""
    lanes = block // tpu.LANES
    return tpu.LANES * max(n for n in range(1, min(lanes, largest // tpu.LANES) + 1) if lanes % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BHSK, k_BGSK, v_BGSV, segments, blocks) -> Any:
    if segments is None:  # nobody asks for the sums
        return _kernel(q_BHSK, k_BGSK, v_BGSV, None, blocks, False)
    return _forward(q_BHSK, k_BGSK, v_BGSV, segments, blocks)[0]


def _forward(q_BHSK, k_BGSK, v_BGSV, segments, blocks):
    out, (log_sum_BHS,) = _kernel(q_BHSK, k_BGSK, v_BGSV, segments, blocks, True)
    out, log_sum_BHS = kept(_seen(out, log_sum_BHS, segments)), kept(log_sum_BHS)
    return out, (q_BHSK, k_BGSK, v_BGSV, segments, out, log_sum_BHS)


@functools.partial(jax.jit, static_argnums=(4, 5))  # a checkpoint computes a bare kernel again, needed or not
def _kernel(q_BHSK, k_BGSK, v_BGSV, segments, blocks, sums) -> Any:
    size = q_BHSK.shape[2]

    def row(q, k, v, segments):
        tables, same = _tables(size, blocks, segments), _same(size, blocks)
        return splash._splash_attention_forward(
            tables[0], q, k, v, segments, None, residual_checkpoint_name=None, save_residuals=sums, **same
        )

    return jax.vmap(row)(q_BHSK, k_BGSK, v_BGSV, segments)


def _seen(out, log_sum_BHS, segments):
    """Zeros for queries that see no key, of whom there are none without segments: to the kernel they see all alike."""
    return out if segments is None else jnp.where(log_sum_BHS[..., None] > _HIDDEN / 2, out, 0)


def _backward(blocks, residuals, dout_BHSV):
    q_BHSK, _, _, segments, out, log_sum_BHS = residuals
    dout_BHSV = _seen(dout_BHSV.astype(out.dtype), log_sum_BHS, segments)
    size = q_BHSK.shape[2]

    def row(residuals: Any, dout):
        *operands, segments, out, log_sum = residuals
        residuals = *operands, segments, None, out, log_sum, *_tables(size, blocks, segments)
        nothing = {"save_residuals": False, "residual_checkpoint_name": None}
        return splash._splash_attention_bwd(res=residuals, do=dout, **nothing, **_same(size, blocks))[3:6]

    return *jax.vmap(row)(residuals, dout_BHSV), None


_attend.defvjp(_forward, _backward)


def _same(size, blocks) -> dict[str, Any]:
    """What both passes are told."""
    block, at_once, _ = blocks
    fused = size <= _FUSED * block
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    return {
        "mask_value": _HIDDEN,
        "is_mqa": False,
        "block_sizes": sizes,
        "mask_function": _causal,
        "attn_logits_soft_cap": None,
        "interpret": False,
    }


def _causal(q, k):
    return q >= k


def _tables(size: int, blocks, segments) -> tuple[MaskInfo, MaskInfo]:
    """Which blocks are visited, by rows of blocks of queries and by columns of blocks of keys: those of a causal square
    or, where a row is by itself, of them the ones in which some query's segment has a key, as far as the lowest and the
    highest number of each block tell."""
    block, _, alone = blocks
    count, order = size // block, np.arange(size, dtype=np.int32)
    i, j = np.mgrid[:count, :count].astype(np.int8 if count <= 127 else np.int16)
    # 0: not at all, 1: in part, 2: whole. What comes next stands in the table where nothing is visited: a row's is the
    # next row's first, a column's its own first.
    kinds = np.where(i > j, 2, i == j).astype(i.dtype)
    next_j, next_i = np.where(i >= j, j, 0), np.maximum(i, j)
    if segments is not None and alone:
        q, k = (ids.reshape(count, block) for ids in segments)
        meet = (q.min(1)[:, None] <= k.max(1)) & (k.min(1) <= q.max(1)[:, None])
        kinds = jnp.where(meet | (i == j), kinds, 0)
        next_j, next_i = _next(kinds), _next(kinds.T).T
    rows = MaskInfo(next_j[None], None, kinds[None], None, order)
    return rows, rows._replace(data_next=next_i[None])


def _next(kinds):
    """In each place the column of the next one, row by row, that is visited."""
    places = np.arange(kinds.size, dtype=np.int32)
    following = jax.lax.cummin(jnp.where(kinds.reshape(-1) > 0, places, kinds.size - 1), reverse=True)
    return (following % kinds.shape[1]).reshape(kinds.shape).astype(kinds.dtype)

"""Attention on TPUs by jax's splash attention: unequal widths, segments, queries anywhere in their row, both passes.

What is added: rows of any length (padded to whole blocks), the scale, zeros for a query that sees no key, residuals
that ``jax.checkpoint`` can keep, and tables of the blocks to visit that the program makes from positions and segments:
a block in which no query sees a key is not computed. jax makes its own from S × S numbers, before the program runs.

The rows of the batch lie one behind the other, as one row in whose tables none sees another: the kernels take a table
and segments for one row, and a ``vmap`` over tables would be a loop of kernels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jaxtyping import Array, Float

from deepseek_kernels import tpu
from deepseek_kernels.attention_splash_blocks import Blocks, tables
from deepseek_kernels.kept import kept
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

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
    in_columns: bool = False,
    devices: int = 1,
    **_: Any,
) -> str:
    """Why splash attention cannot do this attention; "" where it can. devices: that the operands may be split over."""
    if why := tpu.refuses(target, dtype):
        return why
    if not (in_row_order or in_segments or in_columns):
        return "it needs keys whose positions are their columns"
    if queries < min(keys, tpu.LANES):
        return f"it needs at least {tpu.LANES} queries a row, not {queries} for {keys} keys"
    if devices > 1:
        return f"it is not split over {devices} devices by itself: it needs a shard_map around it"
    if key_width % 64 or value_width % 64:
        return f"it needs widths that are multiples of 64, not {key_width} and {value_width}"
    return ""


def attend(
    q_BSHK: Float[Array, "B S H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGV: Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
    *,
    chip: str,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the visible t, of which ``visible`` gives no positions;
    zeros where there are none. H/G query heads share a head of keys."""
    (B, S, H), (T, G), chosen = q_BSHK.shape[:3], k_BTGK.shape[1:3], tpu.CHIPS[chip]
    largest, at_once = chosen.attention
    # A block of queries from two places of a row would go over all that lies between them.
    block_q, block_k = tpu.even(visible.q_run or S, largest), tpu.even(T, largest)
    blocks = Blocks(B, block_q, block_k, -(-T // block_k), _divisor(block_k, at_once), not visible.in_row_order)
    behind_q, behind_k = -S % block_q, -T % block_k
    parts = chosen.cores if not G % chosen.cores else 1  # the cores share the heads

    def heads_first(x, behind):
        x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, behind), (0, 0), (0, 0))), 2, 0)
        return x.reshape(parts, x.shape[0] // parts, -1, x.shape[-1])

    # The last key that each query sees; a padded one sees none, a padded key is seen by none.
    last_BS = jnp.pad(visible.limits(B, S, T), ((0, 0), (0, behind_q))) - 1
    last_N = (last_BS + jnp.arange(B, dtype=jnp.int32)[:, None] * (T + behind_k)).reshape(-1)
    segments = None
    if visible.q_segments_BS is not None and visible.k_segments_BT is not None:
        sides = ((visible.q_segments_BS, S, behind_q), (visible.k_segments_BT, T, behind_k))
        rows = (jnp.pad(jnp.broadcast_to(ids, (B, n)), ((0, 0), (0, more)), mode="edge") for ids, n, more in sides)
        segments = splash.SegmentIds(*(ids.reshape(-1).astype(jnp.int32) for ids in rows))
    # The scale is rounded into q, as the kernel has none.
    q = heads_first((q_BSHK.astype(jnp.float32) * scale).astype(q_BSHK.dtype), behind_q)
    out: Any = _attend(q, heads_first(k_BTGK, behind_k), heads_first(v_BTGV, behind_k), last_N, segments, blocks)
    return jnp.moveaxis(out.reshape(H, B, S + behind_q, -1), 0, 2)[:, :S]


def _divisor(block: int, largest: int) -> int:
    """The largest part of a block that its halves, thirds, … of whole lanes allow."""
    lanes = block // tpu.LANES
    return tpu.LANES * max(n for n in range(1, min(lanes, largest // tpu.LANES) + 1) if lanes % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, last_N, segments, blocks) -> Any:
    if blocks.sums:
        return _forward(q, k, v, last_N, segments, blocks)[0]
    return _kernel(q, k, v, last_N, segments, blocks, False)


def _forward(q, k, v, last_N, segments, blocks):
    out, (log_sums,) = _kernel(q, k, v, last_N, segments, blocks, True)
    out, log_sums = kept(_seen(out, log_sums)), kept(log_sums)
    return out, (q, k, v, last_N, segments, out, log_sums)


@functools.partial(jax.jit, static_argnums=(5, 6))  # a checkpoint computes a bare kernel again, needed or not
def _kernel(q, k, v, last_N, segments, blocks, sums) -> Any:
    rows, _ = tables(last_N, segments, blocks)

    def part(q, k, v):
        return splash._splash_attention_forward(
            rows, q, k, v, segments, None, residual_checkpoint_name=None, save_residuals=sums, **_same(blocks)
        )

    return jax.vmap(part)(q, k, v)


def _seen(out, log_sums):
    """Zeros for queries that see no key: of a block that was visited they hold the mean, of others nothing."""
    return jnp.where(log_sums[..., None] > _HIDDEN / 2, out, 0)


def _backward(blocks, residuals, dout):
    q, k, v, last_N, segments, out, log_sums = residuals
    dout = _seen(dout.astype(out.dtype), log_sums)
    both = tables(last_N, segments, blocks)

    def part(q, k, v, out, log_sums, dout):
        residuals: Any = (q, k, v, segments, None, out, log_sums, *both)
        nothing = {"save_residuals": False, "residual_checkpoint_name": None}
        return splash._splash_attention_bwd(res=residuals, do=dout, **nothing, **_same(blocks))[3:6]

    return *jax.vmap(part)(q, k, v, out, log_sums, dout), None, None


_attend.defvjp(_forward, _backward)


def _same(blocks: Blocks) -> dict[str, Any]:
    """What both passes are told. dq has a kernel of its own: with one for all gradients, 5 products in place of 7,
    there would be a copy of dq for each block of keys, and no way to leave out another row's blocks."""
    sizes = splash.BlockSizes(
        block_q=blocks.queries,
        block_kv=blocks.keys,
        block_kv_compute=blocks.at_once,
        block_q_dkv=blocks.queries,
        block_kv_dkv=blocks.keys,
        block_kv_dkv_compute=blocks.at_once,
        block_q_dq=blocks.queries,
        block_kv_dq=blocks.keys,
    )
    return {
        "mask_value": _HIDDEN,
        "is_mqa": False,
        "block_sizes": sizes,
        "mask_function": _up_to,
        "attn_logits_soft_cap": None,
        "interpret": False,
    }


def _up_to(last, key):
    return key <= last

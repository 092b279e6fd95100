"""Attention by the C kernel: forward and backward as plain functions, of MLA's keys and of grouped ones, in float32.

A strip of queries has its scores at a time, so no S × T array is ever there; what is saved is each row's ``log Σ exp``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu
from deepseek_kernels.visible import Visible


def forward(
    q_BSHK: Float[Array, "B S H K"],
    keys: Float[Array, "B T G W"],
    rest: Float[Array, "B T R"] | Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B S H"]]:
    """``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the t that ``visible`` describes, and the softmax's
    ``log Σ exp``; a query that sees nothing gets zeros and -∞.

    MLA: ``keys`` is kv (B T H N+V), ``rest`` pe (B T R), a head's key ``[k_nope | pe]``, G = H and K = N + R. Grouped:
    ``keys`` is k (B T G K), ``rest`` v (B T G V); head h reads group ``h // (H / G)``.

    Raises:
      ValueError: shapes that do not fit.
    """
    values = _value_width(q_BSHK, keys, rest)
    shapes = [(*q_BSHK.shape[:3], values), q_BSHK.shape[:3]]
    out_BSHV, log_sum_BSH = cpu.call("attention_forward", shapes, *_operands(q_BSHK, keys, rest, visible, scale))
    return out_BSHV, log_sum_BSH


def backward(
    q_BSHK: Float[Array, "B S H K"],
    keys: Float[Array, "B T G W"],
    rest: Float[Array, "B T R"] | Float[Array, "B T G V"],
    visible: Visible,
    scale: float,
    out_BSHV: Float[Array, "B S H V"],
    log_sum_BSH: Float[Array, "B S H"],
    dout_BSHV: Float[Array, "B S H V"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, ``keys`` and ``rest`` from what ``forward`` gave; of a query that sees nothing, none."""
    each_head = (*keys.shape[:3], rest.shape[-1])  # the heads' shares of pe's gradient, or v's own shape
    operands = _operands(q_BSHK, keys, rest, visible, scale)
    dq_BSHK, dkeys, drest = cpu.call(
        "attention_backward", [q_BSHK.shape, keys.shape, each_head], *operands, out_BSHV, log_sum_BSH, dout_BSHV
    )
    return dq_BSHK, dkeys, drest if rest.ndim == 4 else jnp.sum(drest, axis=2)


def _value_width(q_BSHK, keys, rest) -> int:
    (B, _, H, K), (_, T, G, W), last = q_BSHK.shape, keys.shape, rest.shape[-1]
    said = f"q {q_BSHK.shape}, keys {keys.shape}, rest {rest.shape}: expected (B, S, H, K), "
    if rest.ndim == 3:
        if keys.shape[:3] != (B, T, H) or rest.shape != (B, T, last) or not last <= K < last + W:
            raise ValueError(said + "(B, T, H, N+V), (B, T, R) with K = N+R")
        return W - (K - last)
    if keys.shape != (B, T, G, K) or rest.shape != (B, T, G, last) or not G or H % G:
        raise ValueError(said + "(B, T, G, K), (B, T, G, V) with H a multiple of G")
    return last


def _operands(q_BSHK, keys, rest, visible: Visible, scale: float) -> list[jax.typing.ArrayLike]:
    """The C side knows one rule, ``k_position ≤ q_position``, equal segments, ``t < length``: what is not asked for is
    filled with what always holds."""
    (B, S), T = q_BSHK.shape[:2], keys.shape[1]
    q_positions_BS = k_positions_BT = q_segments_BS = k_segments_BT = jnp.int32(0)
    if visible.causal:
        q_positions_BS = jnp.arange(S) if visible.q_positions_BS is None else visible.q_positions_BS
        k_positions_BT = jnp.arange(T) if visible.k_positions_BT is None else visible.k_positions_BT
    if visible.q_segments_BS is not None and visible.k_segments_BT is not None:
        q_segments_BS, k_segments_BT = visible.q_segments_BS, visible.k_segments_BT
    lengths_B = jnp.int32(T) if visible.lengths_B is None else visible.lengths_B
    fill = ((q_positions_BS, (B, S)), (k_positions_BT, (B, T)), (q_segments_BS, (B, S)), (k_segments_BT, (B, T)))
    seen = [_int32(values, shape) for values, shape in (*fill, (lengths_B, (B,)))]
    return [q_BSHK, keys, rest, *seen, jnp.float32(scale)]


def _int32(values: jax.Array, shape: tuple[int, ...]) -> Int[Array, "..."]:
    return jnp.broadcast_to(values.astype(jnp.int32), shape)

"""Causal attention by cuDNN on NVIDIA GPUs, forward and backward, with keys and values of unequal widths.

``jax.nn.dot_product_attention`` takes equal widths alone and asks the tracing machine for its GPU; the two primitives
beneath it do neither, so that a program for a GPU can be lowered anywhere. Packed rows are attention_packed's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float

from deepseek_kernels.kept import kept
from deepseek_kernels.target import Target
from deepseek_kernels.visible import not_whole_rows


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
    """Why cuDNN cannot do this attention; "" where it can. shared_by: query heads to a head of keys. devices: of the
    mesh."""
    if target.platform != "cuda":
        return f"it needs cuda, not {target.platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {dtype.name}"
    if why := not_whole_rows(in_row_order or in_segments, queries, keys):
        return why
    hopper = float(target.chip or 0) >= 9.0
    if in_segments and (not hopper or shared_by > 1 or devices > 1 or value_width > key_width):
        return (
            "segments need capability 9.0, a head of keys for every query head, values no wider than keys, one device: "
            f"not {target.chip!r}, {shared_by} to a head, {value_width} and {key_width}, {devices}"
        )
    if float(target.chip or 0) < 8.0:
        return f"it needs capability 8.0, not {target.chip!r}"
    if in_row_order and key_width != value_width and not (hopper and (key_width, value_width) == (192, 128)):
        return f"it needs equal widths, or 192 and 128 from capability 9.0 on, not {key_width} and {value_width}"
    if key_width % 8 or key_width > (256 if hopper else 128):
        return f"it needs widths that are multiples of 8 up to {256 if hopper else 128}, not {key_width}"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal(
    q_BSHK: Float[Array, "B S H K"], k_BSGK: Float[Array, "B S G K"], v_BSGV: Float[Array, "B S G V"], scale: float
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_{t ≤ s} softmax_t(q[s]·k[t] · scale) v[t]``; H/G query heads share a head of keys."""
    return _bind_forward(q_BSHK, k_BSGK, v_BSGV, scale, training=False)[0]


def settings(scale, mask_type=fused.MaskType.CAUSAL):
    """What cuDNN's two calls are told beside their operands."""
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": mask_type,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


def _unused(q_BSHK):
    """No bias, lengths, offsets or pages."""
    return [jnp.zeros(0, q_BSHK.dtype)] * 7


def _bind_forward(q, k, v, scale, *, training):
    forward = fused._dot_product_attention_fwd_p_wrapper
    return forward.bind(q, k, v, *_unused(q), is_training=training, **settings(scale))


def _forward(q, k, v, scale):
    out, log_sum = map(kept, _bind_forward(q, k, v, scale, training=True))
    return out, (q, k, v, log_sum, out)


def _backward(scale, residuals, dout):
    q, k, v, log_sum, out = residuals
    backward = fused._dot_product_attention_bwd_p_wrapper
    return tuple(backward.bind(q, k, v, *_unused(q), log_sum, out, dout.astype(out.dtype), **settings(scale)))


causal.defvjp(_forward, _backward)

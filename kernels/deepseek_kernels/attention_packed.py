"""Causal attention within the segments of packed rows by cuDNN on NVIDIA Hopper, forward and backward.

cuDNN takes segments as so many sequences that lie one behind the other. It finds them in keys and values by one list of
places, counted in numbers of a key, so values narrower than keys are padded with zeros to their width. How many
segments a row may have stands in the program, and costs time in the backward pass: there are two programs, for up to 32
and 128. Rows with more of them, or with a segment in two parts, take the blocks of ``attention_blockwise``, which are
slower and always right; the choice falls on the device.
"""

import functools

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Float, Int

from deepseek_kernels import attention_blockwise
from deepseek_kernels.attention_cudnn import settings
from deepseek_kernels.kept import kept
from deepseek_kernels.visible import Visible

MOST = 32, 128  # segments of a row that a program holds


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed(
    q_BSHK: Float[Array, "B S H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHV: Float[Array, "B S H V"],
    visible: Visible,
    scale: float,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·k[t] · scale) v[t]`` over the t ≤ s of s's segment. Of ``visible`` the segments of
    queries and keys are given and nothing else."""
    return _forward(q_BSHK, k_BSHK, v_BSHV, visible, scale)[0]


def _forward(q, k, v, visible, scale):
    B, S, H, _ = q.shape
    starts_BS, sizes_BS, most = _runs(visible, B)
    room = jnp.zeros((B * MOST[-1], H, S), jnp.float32)

    def by_cudnn(M):
        lists = _lists(q, starts_BS, sizes_BS, M)
        out, log_sum = fused._dot_product_attention_fwd_p_wrapper.bind(
            q, k, _wide(v, k), *lists, is_training=True, **settings(scale, fused.MaskType.PADDING_CAUSAL)
        )
        return out[..., : v.shape[3]], room.at[: B * M].set(log_sum)

    def by_blocks():
        out, log_sum = attention_blockwise.with_sums(q, k, v, visible, scale)
        return out, room.at[:B].set(log_sum)

    out, log_sum = map(kept, _switch(most, by_cudnn, by_blocks))
    return out, (q, k, v, visible, out, log_sum)


def _backward(scale, residuals, dout):
    q, k, v, visible, out, log_sum = residuals
    starts_BS, sizes_BS, most = _runs(visible, len(q))

    def by_cudnn(M):
        dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
            q,
            k,
            _wide(v, k),
            *_lists(q, starts_BS, sizes_BS, M),
            log_sum[: len(q) * M],
            _wide(out, k),
            _wide(dout.astype(out.dtype), k),
            **settings(scale, fused.MaskType.PADDING_CAUSAL),
        )
        return dq, dk, dv[..., : v.shape[3]]

    def by_blocks():
        return attention_blockwise.gradients(q, k, v, visible, scale, out, log_sum[: len(q)], dout)

    return *_switch(most, by_cudnn, by_blocks), None


packed.defvjp(_forward, _backward)


def _switch(most, by_cudnn, by_blocks):
    """The first program that holds ``most`` segments a row."""
    programs = [functools.partial(by_cudnn, M) for M in MOST]
    return jax.lax.switch(jnp.sum(most > jnp.array(MOST)), [*programs, by_blocks])


def _runs(visible, rows: int) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, ""]]:
    """First tokens and sizes of each row's runs of one id, -1 where there are no more; and the greatest number of runs
    of a row. That is beyond all bounds unless each run is a segment of its own: ids that rise along the row, 0 for
    padding at its end, the same for queries and keys."""
    segments_BS, size = visible.q_segments_BS, visible.q_segments_BS.shape[1]
    order_BS = jnp.where(segments_BS == 0, jnp.iinfo(segments_BS.dtype).max, segments_BS)
    whole = jnp.all(segments_BS == visible.k_segments_BT) & jnp.all(order_BS[:, 1:] >= order_BS[:, :-1])
    segments_BS = jnp.broadcast_to(segments_BS, (rows, size))
    first_BS = jnp.pad(segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts_BS = jnp.sort(jnp.where(first_BS, jnp.arange(size, dtype=jnp.int32), size), axis=1)
    sizes_BS = jnp.diff(starts_BS, axis=1, append=size)
    there = starts_BS < size
    most = jnp.where(whole, jnp.max(jnp.sum(first_BS, axis=1)), jnp.iinfo(jnp.int32).max)
    return jnp.where(there, starts_BS, -1), jnp.where(there, sizes_BS, -1), most


def _lists(q, starts_BS, sizes_BS, most):
    """No bias; sizes and places of queries and of keys; no pages."""
    fit = lambda list_BS, size: jnp.pad(list_BS, ((0, 0), (0, size)), constant_values=-1)[:, :size]  # noqa: E731
    none, sizes, places = jnp.zeros(0, q.dtype), fit(sizes_BS, most), fit(starts_BS[:, :most], most + 1)
    return none, sizes, sizes, places, places, none, none


def _wide(v, k):
    return jnp.pad(v, [(0, 0)] * 3 + [(0, k.shape[3] - v.shape[3])])

"""MLA's attention in training and prefill: any mask, and a backward pass of its own.

``mla_attention`` computes ``softmax(q kᵀ · scale) v`` from what the projections give: a key is a head's own part beside
the rotated part that all heads share, and lies next to its value. It saves the unnormalised ``exp`` of the scores, so
that the backward pass touches the S × T matrix once per product: its row sum ``Σ dp · p`` is ``Σ dout · out`` (arXiv
2205.14135, section B.2), taken over the value width instead.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mla_attention(
    q_BSHK: Float[Array, "B S H K"],
    kv_BTHW: Float[Array, "B T H W"],
    pe_BTR: Float[Array, "B T R"],
    mask_BST: Bool[Array, "B S T"],
    scale: float,
) -> Float[Array, "B S H V"]:
    """``out[s] = Σ_t softmax_t(q[s]·[k_nope[t] | pe[t]] · scale) v[t]`` over the t that ``mask`` allows.

    ``kv`` holds ``[k_nope | v]`` of each head, so with K = N + R its width is W = N + V. Scores, softmax and sums are
    float32; the result has ``kv``'s dtype. A query that may attend to nothing gets the mean of all values.
    Differentiable in q, kv and pe.
    """
    return _forward(q_BSHK, kv_BTHW, pe_BTR, mask_BST, scale)[0]


def mla_attention_reference(q_BSHK, kv_BTHW, pe_BTR, mask_BST, scale):
    """The definition, with autodiff's own gradient."""
    k_BTHK, v_BTHV = _keys_and_values(kv_BTHW, pe_BTR, q_BSHK.shape[3])
    scores = jnp.einsum("bshk,bthk->bhst", q_BSHK, k_BTHK, preferred_element_type=jnp.float32) * scale
    p = jax.nn.softmax(jnp.where(mask_BST[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhst,bthv->bshv", p, v_BTHV.astype(jnp.float32)).astype(v_BTHV.dtype)


def _keys_and_values(kv_BTHW, pe_BTR, key_width):
    nope_BTHN, v_BTHV = jnp.split(kv_BTHW, [key_width - pe_BTR.shape[-1]], axis=-1)
    pe_BTHR = jnp.broadcast_to(pe_BTR[:, :, None], (*nope_BTHN.shape[:3], pe_BTR.shape[-1]))
    return jnp.concatenate([nope_BTHN, pe_BTHR], axis=-1), v_BTHV


def _forward(q_BSHK, kv_BTHW, pe_BTR, mask_BST, scale):
    (B, S, H, K), T, R = q_BSHK.shape, kv_BTHW.shape[1], pe_BTR.shape[-1]
    if kv_BTHW.shape[:3] != (B, T, H) or pe_BTR.shape != (B, T, R) or not R <= K < R + kv_BTHW.shape[3]:
        raise ValueError(
            f"q {q_BSHK.shape}, kv {kv_BTHW.shape}, pe {pe_BTR.shape}: "
            "expected (B, S, H, N+R), (B, T, H, N+V), (B, T, R)"
        )
    if mask_BST.shape != (B, S, T) or mask_BST.dtype != jnp.bool_:
        raise ValueError(f"mask {mask_BST.shape} of {mask_BST.dtype}: expected {(B, S, T)} of bool")
    return _xla_forward(q_BSHK, kv_BTHW, pe_BTR, mask_BST, scale)


def _backward(scale, residuals, dout_BSHV):
    return _xla_backward(scale, residuals, dout_BSHV)


def _xla_forward(q_BSHK, kv_BTHW, pe_BTR, mask_BST, scale):
    k_BTHK, v_BTHV = _keys_and_values(kv_BTHW, pe_BTR, q_BSHK.shape[3])
    q_BHSK, k_BHTK, v_BHTV = (jnp.swapaxes(x, 1, 2) for x in (q_BSHK, k_BTHK, v_BTHV))
    # The scale goes to q: S·K products instead of S·T.
    q_BHSK = (q_BHSK.astype(jnp.float32) * scale).astype(q_BSHK.dtype)
    scores = jnp.einsum("bhsk,bhtk->bhst", q_BHSK, k_BHTK, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BST[:, None], scores, jnp.finfo(jnp.float32).min)
    p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    inverse_BHS1 = 1.0 / jnp.sum(p, axis=-1, keepdims=True)
    p = p.astype(v_BTHV.dtype)
    out_BHSV = jnp.einsum("bhst,bhtv->bhsv", p, v_BHTV, preferred_element_type=jnp.float32) * inverse_BHS1
    out_BSHV = jnp.swapaxes(out_BHSV.astype(v_BTHV.dtype), 1, 2)
    return out_BSHV, (q_BHSK, k_BHTK, v_BHTV, p, inverse_BHS1, out_BSHV, pe_BTR)


def _xla_backward(scale, residuals, dout_BSHV):
    q_BHSK, k_BHTK, v_BHTV, p, inverse_BHS1, out_BSHV, pe_BTR = residuals
    dtype = q_BHSK.dtype
    dout_BHSV = jnp.swapaxes(dout_BSHV, 1, 2)
    row_BHS1 = jnp.swapaxes(jnp.sum(dout_BSHV.astype(jnp.float32) * out_BSHV, axis=-1, keepdims=True), 1, 2)
    scaled = (dout_BHSV * inverse_BHS1).astype(dtype)
    dv_BHTV = jnp.einsum("bhst,bhsv->bhtv", p, scaled, preferred_element_type=jnp.float32)
    dp = jnp.einsum("bhsv,bhtv->bhst", scaled, v_BHTV, preferred_element_type=jnp.float32)
    ds = (p * (dp - row_BHS1 * inverse_BHS1)).astype(dtype)
    dq_BHSK = jnp.einsum("bhst,bhtk->bhsk", ds, k_BHTK, preferred_element_type=jnp.float32) * scale
    dk_BHTK = jnp.einsum("bhst,bhsk->bhtk", ds, q_BHSK, preferred_element_type=jnp.float32)
    dq_BSHK, dk_BTHK, dv_BTHV = (jnp.swapaxes(x.astype(dtype), 1, 2) for x in (dq_BHSK, dk_BHTK, dv_BHTV))
    dnope_BTHN, dpe_BTHR = jnp.split(dk_BTHK, [dk_BTHK.shape[3] - pe_BTR.shape[2]], axis=-1)
    return dq_BSHK, jnp.concatenate([dnope_BTHN, dv_BTHV], axis=-1), jnp.sum(dpe_BTHR, axis=2), None


mla_attention.defvjp(_forward, _backward)

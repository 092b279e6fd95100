"""The routed experts of a MoE layer in one call: sort, gather, gated products, weighted sum.

Around grouped products of a small model, copying rows to and from their experts and the gate cost as much as the
products. On a CPU one C kernel of ``cpu.c`` does it all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu


def can_fuse_experts(x_TD: jax.Array, wi_ED2F: jax.Array, wo_EFD: jax.Array) -> bool:
    """Whether ``fused_experts`` can run: float32, on a CPU, with gcc."""
    return cpu.usable(x_TD, wi_ED2F, wo_EFD)


@jax.custom_vjp
def fused_experts(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    experts_TK: Int[Array, "T K"],
    wi_ED2F: Float[Array, "E D 2 F"],
    wo_EFD: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """``y[t] = Σ_k weights[t, k] · (silu(x gate) · x up) wo`` with the matrices of expert ``experts[t, k]``.

    Gate and up are ``wi[:, :, 0]`` and ``wi[:, :, 1]``. A choice outside 0…E-1 adds nothing. Exact and dropless;
    differentiable in x, weights, wi and wo.

    Raises:
      ValueError: shapes that do not fit, or where ``can_fuse_experts`` is false.
    """
    return _forward(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD)[0]


def fused_experts_reference(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD):
    """The definition: every expert on every token. E / K times the arithmetic."""
    gate_up_TE2F = jnp.einsum("td,edgf->tegf", x_TD, wi_ED2F)
    h_TEF = jax.nn.silu(gate_up_TE2F[:, :, 0]) * gate_up_TE2F[:, :, 1]
    y_TED = jnp.einsum("tef,efd->ted", h_TEF, wo_EFD)
    chosen_TKE = experts_TK[..., None] == jnp.arange(len(wi_ED2F))
    return jnp.einsum("ted,tk,tke->td", y_TED, weights_TK, chosen_TKE.astype(x_TD.dtype))


def _forward(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD):
    E, F, D = wo_EFD.shape
    if x_TD.shape[1:] != (D,) or wi_ED2F.shape != (E, D, 2, F):
        raise ValueError(
            f"x {x_TD.shape}, wi {wi_ED2F.shape}, wo {wo_EFD.shape}: expected (T, D), (E, D, 2, F), (E, F, D)"
        )
    if not weights_TK.shape == experts_TK.shape == (len(x_TD), *experts_TK.shape[1:]):
        raise ValueError(f"weights {weights_TK.shape}, experts {experts_TK.shape}: expected (T, K) with T={len(x_TD)}")
    if not can_fuse_experts(x_TD, wi_ED2F, wo_EFD):
        raise ValueError(f"needs float32 on a CPU and gcc; x is {x_TD.dtype}, wi {wi_ED2F.dtype}, wo {wo_EFD.dtype}")
    operands = (x_TD, weights_TK.astype(jnp.float32), experts_TK.astype(jnp.int32), wi_ED2F, wo_EFD)
    choices, (_, hidden, width) = experts_TK.size, wo_EFD.shape
    shapes = [x_TD.shape, (choices, 2 * hidden), (choices, width)]
    y_TD, gate_up_PG, _ = cpu.call("experts_forward", shapes, *operands)
    return y_TD, (operands, gate_up_PG)


def _backward(residuals, dy_TD):
    operands, gate_up_PG = residuals
    x_TD, weights_TK, _, wi_ED2F, wo_EFD = operands
    room = weights_TK.size, 3 * (wo_EFD.shape[1] + wo_EFD.shape[2])
    shapes = [x_TD.shape, weights_TK.shape, wi_ED2F.shape, wo_EFD.shape, room]
    dx_TD, dweights_TK, dwi_ED2F, dwo_EFD, _ = cpu.call("experts_backward", shapes, *operands, gate_up_PG, dy_TD)
    return dx_TD, dweights_TK, None, dwi_ED2F, dwo_EFD


fused_experts.defvjp(_forward, _backward)

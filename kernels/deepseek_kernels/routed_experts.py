"""The routed experts of a MoE layer in one call: ``y[t] = Σ_k weights[t, k] · expert_{experts[t, k]}(x[t])``.

``sorted``: rows are sorted by expert, gathered, multiplied as groups, gated and summed. ``fused``: on a CPU one C
kernel does it all, since around the products of a small model copying rows and the gate cost as much as the products.
``plain``: every expert on every token, the definition, at E / K times the arithmetic.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu, experts_few, hopper, hopper_few, hopper_gate
from deepseek_kernels.experts_sorted import gather_rows, sort_by_expert, sum_rows, sum_weighted, weight_rows
from deepseek_kernels.grouped_blocks import groups
from deepseek_kernels.grouped_matmul import grouped_matmul
from deepseek_kernels.kept import kept
from deepseek_kernels.product import product
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target
from deepseek_kernels.weights import Weight, block_scaled, in_stack, stored_gradient


def routed_experts(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    experts_TK: Int[Array, "T K"],
    wi_ED2F: Weight,
    wo_EFD: Weight,
    *,
    target: Target | None = None,
    implementation: str = "auto",
    grouped: str = "auto",
    most: int | None = None,
) -> Float[Array, "T D"]:
    """``y[t] = Σ_k weights[t, k] · (silu(x gate) · x up) wo`` with the matrices of expert ``experts[t, k]``.

    Gate and up are ``wi[:, :, 0]`` and ``wi[:, :, 1]``; both weights come as they are stored (weights.py). A choice
    outside 0…E-1 adds nothing and its weight has no gradient. Exact and dropless; differentiable in x, weights, wi, wo.

    Args:
      implementation: ``sorted``, ``fused`` or ``plain``.
      grouped: the sorted one's ``grouped_matmul``.
      most: a promise that no more choices than these lie in 0…E-1: the sorted one makes room for as many.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run on the target.
    """
    (E, F, D), tokens = wo_EFD.shape, len(x_TD)
    if x_TD.shape[1:] != (D,) or tuple(wi_ED2F.shape) != (E, D, 2, F):
        raise ValueError(
            f"x {x_TD.shape}, wi {wi_ED2F.shape}, wo {wo_EFD.shape}: expected (T, D), (E, D, 2, F), (E, F, D)"
        )
    if not weights_TK.shape == experts_TK.shape == (tokens, *experts_TK.shape[1:]):
        raise ValueError(f"weights {weights_TK.shape}, experts {experts_TK.shape}: expected (T, K) with T={tokens}")
    target = target or Target.here()
    name = choose("routed_experts", target, x_TD.dtype, implementation=implementation, weight=wi_ED2F).name
    operands = x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD
    if name == "fused":
        return _fused(x_TD, weights_TK.astype(jnp.float32), experts_TK.astype(jnp.int32), wi_ED2F, wo_EFD)
    return _plain(*operands, target) if name == "plain" else _sorted(*operands, target, grouped, most)


def _plain(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, target):
    h_TEF = _gate(product("td,edgf->tegf", x_TD, wi_ED2F, target=target))
    y_TED = product("tef,efd->ted", h_TEF, wo_EFD, target=target)
    chosen_TKE = experts_TK[..., None] == jnp.arange(y_TED.shape[1])
    weights_TE = jnp.sum(jnp.where(chosen_TKE, weights_TK[..., None].astype(jnp.float32), 0), axis=1)
    return jnp.einsum("ted,te->td", y_TED.astype(jnp.float32), weights_TE).astype(x_TD.dtype)


def _sorted(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, target, grouped, most=None):
    E, F, D = wo_EFD.shape
    facts = {"rows": experts_TK.size if most is None else min(most, experts_TK.size), "groups": E}
    choices = [
        choose("grouped_matmul", target, x_TD.dtype, implementation=grouped, widths=widths, weight=weight, **facts)
        for widths, weight in (((D, 2 * F), wi_ED2F), ((F, D), wo_EFD))
    ]
    aligned = max(choice.rows for choice in choices)
    few = all(choice.name == "hopper" and choice.rows in hopper_few.TILES for choice in choices)
    few = few and not any(block_scaled(w) for w in (wi_ED2F, wo_EFD))  # which grouped_matmul reads as they are
    if few and experts_TK.size <= experts_few.MOST:
        y_TD: jax.Array = _few(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, aligned, target)
        return y_TD
    on_hopper = all(choice.name == "hopper" for choice in choices)
    lie = all(in_stack(w, x_TD.dtype) for w in (wi_ED2F, wo_EFD))
    if on_hopper and lie and aligned == hopper.ROWS and F % hopper.GATED == 0 and x_TD.size:
        y_TD: jax.Array = _of_layers(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, target, most)
        return y_TD
    layout = sort_by_expert(experts_TK, E, block=aligned, most=most)
    options = {"aligned": aligned, "target": target, "implementation": grouped}
    x_PD = gather_rows(x_TD, layout)
    gate_up_P2F = grouped_matmul(x_PD, wi_ED2F, layout.group_sizes_E, **options)
    on_hopper = on_hopper and hopper_gate.takes(len(x_PD), F)
    h_PF: jax.Array = _weighted_gate(gate_up_P2F, weight_rows(weights_TK.astype(jnp.float32), layout), on_hopper)
    return sum_rows(grouped_matmul(h_PF, wo_EFD, layout.group_sizes_E, **options), layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _few(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, tile, target):
    """Few rows on Hopper; their gradients, which nothing fast needs, are blocks'."""
    options = {"tile": tile, "cores": target.cores}
    return experts_few.forward(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _of_layers(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, target, most):
    """Many rows on Hopper by layers of stacks, as prompts are read: the first product hands over what has passed the
    gate, a fifth of the bytes that are written and read with a gate of its own. Nothing is kept for gradients, which
    nothing fast needs here; they are blocks'."""
    layout = sort_by_expert(experts_TK, wo_EFD.shape[0], block=hopper.ROWS, most=most)
    x_PD = gather_rows(x_TD, layout)
    group_N = groups(layout.group_sizes_E, len(x_PD), hopper.ROWS)

    def multiply(product, x_PD, w):
        matrices = w.stack.reshape(-1, w.shape[1], math.prod(w.shape[2:]))
        group_of_all_N = jnp.where(group_N < w.shape[0], group_N + w.layer * w.shape[0], len(matrices))
        return product(x_PD, matrices, group_of_all_N, cores=target.cores)

    h_PF = multiply(hopper.gated_product, x_PD, wi_ED2F)
    return sum_weighted(multiply(hopper.grouped_product, h_PF, wo_EFD), weights_TK.astype(jnp.float32), layout)


def _by_blocks(target, most, operands, dy_TD):
    x_TD, weights_TK, experts_TK, *matrices = operands
    by_blocks = lambda x, weights, wi, wo: _sorted(x, weights, experts_TK, wi, wo, target, "blocks", most)  # noqa: E731
    dx_TD, dweights_TK, *dmatrices = jax.vjp(by_blocks, x_TD, weights_TK, *matrices)[1](dy_TD)
    return dx_TD, dweights_TK, None, *dmatrices


_few.defvjp(
    lambda *operands: (_few(*operands), operands[:5]), lambda tile, target, *rest: _by_blocks(target, None, *rest)
)
_of_layers.defvjp(lambda *operands: (_of_layers(*operands), operands[:5]), _by_blocks)


def _gate(gate_up):
    """``silu(gate) · up`` of (…, 2, F)."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weighted_gate(gate_up_P2F, weight_P, on_hopper):
    """``weight · silu(gate) · up``, float32 inside. A choice's weight is applied here and not to what comes out of its
    expert, which is the same by linearity: so the backward pass needs no row of the experts' results."""
    gate_PF, up_PF = (gate_up_P2F[:, i].astype(jnp.float32) for i in range(2))
    return (weight_P[:, None] * jax.nn.silu(gate_PF) * up_PF).astype(gate_up_P2F.dtype)


def _weighted_gate_fwd(gate_up_P2F, weight_P, on_hopper):
    return _weighted_gate(gate_up_P2F, weight_P, on_hopper), (gate_up_P2F, weight_P)


def _weighted_gate_bwd(on_hopper, residuals, dh_PF):
    gate_up_P2F, weight_P = residuals
    if on_hopper:
        return hopper_gate.gate_backward(gate_up_P2F, weight_P, dh_PF)
    gate_PF, up_PF, dh_PF = (a.astype(jnp.float32) for a in (gate_up_P2F[:, 0], gate_up_P2F[:, 1], dh_PF))
    s_PF = jax.nn.sigmoid(gate_PF)
    silu_PF = gate_PF * s_PF
    dweight_P = jnp.sum(dh_PF * silu_PF * up_PF, axis=1)
    dh_PF = weight_P[:, None] * dh_PF
    dgate_PF = dh_PF * up_PF * (s_PF + silu_PF * (1 - s_PF))
    # One choice for every number: XLA:GPU writes two stacked arrays at half the speed.
    is_gate = jax.lax.broadcasted_iota(jnp.int32, (1, 2, 1), 1) == 0
    dgate_up_P2F = jnp.where(is_gate, dgate_PF[:, None], (dh_PF * silu_PF)[:, None]).astype(gate_up_P2F.dtype)
    # A barrier, since XLA:GPU moves the sum of a row into the scatter of its gradient, six times its cost.
    return jax.lax.optimization_barrier((dgate_up_P2F, dweight_P))


_weighted_gate.defvjp(_weighted_gate_fwd, _weighted_gate_bwd)


@jax.custom_vjp
def _fused(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD):
    return _forward(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD)[0]


def _forward(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD):
    choices, (_, hidden, width) = experts_TK.size, wo_EFD.shape
    operands = x_TD, weights_TK, experts_TK, *(w.astype(jnp.float32) for w in (wi_ED2F, wo_EFD))
    shapes = [x_TD.shape, (choices, 2 * hidden), (choices, width)]
    y_TD, gate_up_PG, _ = cpu.call("experts_forward", shapes, *operands)
    gate_up_PG = kept(gate_up_PG)
    return kept(y_TD), (x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, gate_up_PG)


def _backward(residuals, dy_TD):
    x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, gate_up_PG = residuals
    operands = x_TD, weights_TK, experts_TK, *(w.astype(jnp.float32) for w in (wi_ED2F, wo_EFD))
    room = weights_TK.size, 3 * (wo_EFD.shape[1] + wo_EFD.shape[2])
    shapes = [x_TD.shape, weights_TK.shape, wi_ED2F.shape, wo_EFD.shape, room]
    dx_TD, dweights_TK, dwi_ED2F, dwo_EFD, _ = cpu.call("experts_backward", shapes, *operands, gate_up_PG, dy_TD)
    dwi, dwo = stored_gradient(wi_ED2F, lambda: dwi_ED2F), stored_gradient(wo_EFD, lambda: dwo_EFD)
    return dx_TD, dweights_TK, None, dwi, dwo


_fused.defvjp(_forward, _backward)

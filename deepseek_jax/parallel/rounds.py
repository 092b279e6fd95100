"""A device's experts on tokens of many devices: room for the choices that are its own, not for all that might be."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Experts = Callable[[jax.Array, jax.Array, jax.Array, Any, Any, int | None], jax.Array]

ROOM = 1.25  # times the mean
LEAST = 4096  # choices: fewer are not worth another program


def in_rounds(
    experts: Experts,
    mean: int,
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    wi_ED2F: Any,
    wo_EFD: Any,
) -> jax.Array:
    """``experts(x_TD, weights_TK, experts_TK, wi, wo, most)`` for any number of choices of these experts.

    Of n devices' tokens all choices might be one device's, n times the ``mean``, and rows sorted by expert need room
    for each. With room for a little more than the mean one round does where loads are even. Where they are not, others
    follow; their backward pass computes them again.
    """
    size, (tokens, top) = max(math.ceil(ROOM * mean), LEAST), experts_TK.shape
    if tokens * top <= size:
        return experts(x_TD, weights_TK, experts_TK, wi_ED2F, wo_EFD, None)
    own_T = jnp.sum((experts_TK >= 0) & (experts_TK < wo_EFD.shape[0]), axis=1, dtype=jnp.int32)
    before_T = jnp.cumsum(own_T) - own_T
    # All of a token's choices are in the round of the first of them, which so may have top - 1 more.
    step = size - top
    round_T, rounds = before_T // step, 1 + jnp.maximum(before_T[-1] + own_T[-1] - 1, 0) // step
    y_TD: jax.Array = _rounds(experts, size, x_TD, weights_TK, experts_TK, round_T, rounds, wi_ED2F, wo_EFD)
    return y_TD


def _run(experts, size, experts_TK, round_T, number, x_TD, weights_TK, wi_ED2F, wo_EFD):
    now_TK = jnp.where(round_T[:, None] == number, experts_TK, -1)
    return experts(x_TD, weights_TK, now_TK, wi_ED2F, wo_EFD, size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(experts, size, x_TD, weights_TK, experts_TK, round_T, rounds, wi_ED2F, wo_EFD):
    run = functools.partial(_run, experts, size, experts_TK, round_T)
    operands = x_TD, weights_TK, wi_ED2F, wo_EFD
    return jax.lax.fori_loop(1, rounds, lambda i, y_TD: y_TD + run(i, *operands), run(0, *operands))


def _forward(experts, size, x_TD, weights_TK, experts_TK, round_T, rounds, wi_ED2F, wo_EFD):
    run = functools.partial(_run, experts, size, experts_TK, round_T)
    operands = x_TD, weights_TK, wi_ED2F, wo_EFD
    y_TD, pull = jax.vjp(functools.partial(run, 0), *operands)
    y_TD = jax.lax.fori_loop(1, rounds, lambda i, y_TD: y_TD + run(i, *operands), y_TD)
    return y_TD, (pull, operands, experts_TK, round_T, rounds)


def _backward(experts, size, residuals, dy_TD):
    pull, operands, experts_TK, round_T, rounds = residuals
    run = functools.partial(_run, experts, size, experts_TK, round_T)

    def add(i, gradients):
        more = jax.vjp(functools.partial(run, i), *operands)[1](dy_TD)
        return jax.tree.map(jnp.add, gradients, more)

    dx_TD, dweights_TK, dwi_ED2F, dwo_EFD = jax.lax.fori_loop(1, rounds, add, pull(dy_TD))
    return dx_TD, dweights_TK, None, None, None, dwi_ED2F, dwo_EFD


_rounds.defvjp(_forward, _backward)

"""The routed experts of a step of decoding on NVIDIA Hopper: a few rows for each expert, and few kernels.

Beside the two products a layer's time is what small kernels take to start, 1.3 µs each. So choices are laid out by
comparing each with all others: a sum of comparisons is one kernel, where a sort, running sums and scatters are a dozen.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import hopper_few
from deepseek_kernels.experts_sorted import Layout, gather_rows, sum_rows, weight_rows
from deepseek_kernels.weights import Weight, in_stack

MOST = 512  # choices: the comparisons are their square


def forward(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    experts_TK: Int[Array, "T K"],
    wi_ED2F: Weight,
    wo_EFD: Weight,
    *,
    tile: int,
    cores: int,
) -> Float[Array, "T D"]:
    """What ``routed_experts`` computes, rows in tiles of ``tile``. It has no gradient."""
    E, F, _ = wo_EFD.shape
    if len(x_TD) == 1:
        return _of_one(x_TD, weights_TK[0], experts_TK[0], wi_ED2F, wo_EFD, cores)
    layout, blocks_M = lay_out(experts_TK, E, block=tile)
    product = functools.partial(_product, hopper_few.grouped_product, blocks_M=blocks_M, cores=cores)
    weight_P = weight_rows(weights_TK.astype(jnp.float32), layout)
    return sum_rows(product(_gate(product(gather_rows(x_TD, layout), wi_ED2F), weight_P, F), wo_EFD), layout)


def _of_one(x_1D, weight_K, expert_K, wi_ED2F, wo_EFD, cores: int):
    """A single token's choices are rows of a group each, in their own order. One of no expert is of expert 0, and adds
    nothing."""
    E, F, _ = wo_EFD.shape
    valid_K = (expert_K >= 0) & (expert_K < E)
    blocks_M = jnp.append(jnp.where(valid_K, expert_K, 0), len(expert_K))
    product = functools.partial(_product, hopper_few.product_of_each, blocks_M=blocks_M, cores=cores)
    y_KD = product(_gate(product(x_1D, wi_ED2F), weight_K.astype(jnp.float32), F), wo_EFD)
    rows = (jnp.where(valid, y_D, 0).astype(jnp.float32) for valid, y_D in zip(valid_K, y_KD, strict=True))
    return functools.reduce(jnp.add, rows).astype(x_1D.dtype)[None]


def _gate(gate_up_PG, weight_P, F: int):
    gate_PF, up_PF = (gate_up_PG.reshape(-1, 2, F)[:, i].astype(jnp.float32) for i in range(2))
    return (weight_P[:, None] * jax.nn.silu(gate_PF) * up_PF).astype(gate_up_PG.dtype)


def _product(kernel, x_PD, w: Any, *, blocks_M, cores: int):
    """A layer of a stack is read where it lies, as some of the stack's groups."""
    matrices, first = (w.stack, w.layer * w.shape[0]) if in_stack(w, x_PD.dtype) else (w.astype(x_PD.dtype), 0)
    matrices = matrices.reshape(-1, w.shape[1], math.prod(w.shape[2:]))
    blocks_M += jnp.where(jnp.arange(len(blocks_M)) < len(blocks_M) - 1, first, 0)
    return kernel(x_PD, matrices, blocks_M, cores=cores)


def lay_out(experts_TK: Int[Array, "T K"], experts: int, *, block: int) -> tuple[Layout, Int[Array, "M"]]:
    """Where ``sort_by_expert`` lays the choices, and for each block its expert, and last how many blocks have one."""
    tokens, top = experts_TK.shape
    choices = tokens * top
    chosen_N = experts_TK.reshape(-1).astype(jnp.int32)
    valid_N = (chosen_N >= 0) & (chosen_N < experts)
    order_N = jnp.arange(choices, dtype=jnp.int32)
    rows = (choices + min(experts, choices) * (block - 1)) // block * block
    chosen_N = jnp.where(valid_N, chosen_N, experts)
    rank_N = jnp.sum((chosen_N[:, None] == chosen_N) & (order_N < order_N[:, None]), axis=1, dtype=jnp.int32)
    # Blocks before a choice's own: as many as choices of earlier experts that begin one.
    begins_N = (rank_N % block == 0) & valid_N
    before_N = jnp.sum(begins_N & (chosen_N < chosen_N[:, None]), axis=1, dtype=jnp.int32)
    slot_N = jnp.where(valid_N, before_N * block + rank_N, rows)
    here_PN = slot_N == jnp.arange(rows, dtype=jnp.int32)[:, None]
    choice_P = jnp.min(jnp.where(here_PN, order_N, choices), axis=1)
    # One sum for all: a block's expert, counted from behind the last, and in the row behind them the count.
    block_M1 = jnp.arange(rows // block + 1, dtype=jnp.int32)[:, None]
    last_M1 = block_M1 == rows // block
    mine_MN = jnp.where(last_M1, 1, jnp.where(slot_N // block == block_M1, chosen_N - experts, 0))
    blocks_M = jnp.sum(jnp.where(begins_N, mine_MN, 0), axis=1, dtype=jnp.int32)
    blocks_M += jnp.where(last_M1[:, 0], 0, experts)
    return Layout(slot_N.reshape(tokens, top), choice_P, jnp.zeros(0, jnp.int32), block), blocks_M

"""Carrying tokens to their experts and back, without dropping any.

Every choice (token t, its k-th expert) gets a slot in a buffer of P rows that is sorted by expert, each expert's
rows starting on a multiple of the kernel's block. Forward and backward are gathers only: scatters with repeated rows
are slow on every backend.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_TK", "choice_P", "group_sizes_E"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each choice lies in the buffer sorted by expert.

    slot_TK: buffer row of each choice. choice_P: the choice ``t·K + k`` in each buffer row, T·K where the row is
    padding. group_sizes_E: rows per expert, multiples of ``block``.
    """

    slot_TK: jax.Array
    choice_P: jax.Array
    group_sizes_E: jax.Array
    block: int


def sort_by_expert(experts_TK: Int[Array, "T K"], experts: int, *, block: int) -> Layout:
    """Lay the choices out by expert, in token order within an expert, each expert padded to whole blocks."""
    tokens, top = experts_TK.shape
    choices = tokens * top
    assert experts * choices < 2**31, "a sort key would overflow int32"
    rows = (choices + min(experts, choices) * (block - 1)) // block * block
    key_N = jnp.sort(experts_TK.reshape(-1).astype(jnp.int32) * choices + jnp.arange(choices, dtype=jnp.int32))
    expert_N, choice_N = key_N // choices, key_N % choices
    sizes_E = jnp.sum(experts_TK.reshape(-1, 1) == jnp.arange(experts), axis=0)
    ends_E = jnp.cumsum(sizes_E)
    padded_E = (sizes_E + block - 1) // block * block
    shift_E = jnp.cumsum(padded_E) - padded_E - (ends_E - sizes_E)
    slot_N = jnp.arange(choices) + shift_E[expert_N]
    slot_TK = jnp.zeros(choices, jnp.int32).at[choice_N].set(slot_N.astype(jnp.int32), unique_indices=True)
    choice_P = jnp.full(rows, choices, jnp.int32).at[slot_N].set(choice_N, unique_indices=True)
    return Layout(slot_TK.reshape(tokens, top), choice_P, padded_E.astype(jnp.int32), block)


@jax.custom_vjp
def gather_rows(x_TD: Float[Array, "T D"], layout: Layout) -> Float[Array, "P D"]:
    """Copy each token's row into the slots of its choices. Padding rows repeat the last token: ``combine_rows`` does
    not read them, and hands them no gradient."""
    return x_TD.at[layout.choice_P // layout.slot_TK.shape[1]].get(mode="clip")


def _gather_rows_fwd(x_TD, layout):
    return gather_rows(x_TD, layout), layout


def _gather_rows_bwd(layout, dy_PD):
    return jnp.sum(dy_PD[layout.slot_TK], axis=1), None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def combine_rows(y_PD: Float[Array, "P D"], weights_TK: Float[Array, "T K"], layout: Layout) -> Float[Array, "T D"]:
    """``out[t] = Σ_k weights[t, k] · y[slot[t, k]]``, summed in float32."""
    return jnp.einsum("tkd,tk->td", y_PD[layout.slot_TK].astype(jnp.float32), weights_TK).astype(y_PD.dtype)


def _combine_rows_fwd(y_PD, weights_TK, layout):
    return combine_rows(y_PD, weights_TK, layout), (y_PD, weights_TK, layout)


def _combine_rows_bwd(residuals, dout_TD):
    y_PD, weights_TK, layout = residuals
    top = weights_TK.shape[1]
    weight_P = weights_TK.reshape(-1).at[layout.choice_P].get(mode="fill", fill_value=0)
    dy_PD = dout_TD.at[layout.choice_P // top].get(mode="clip") * weight_P[:, None]
    dweights_TK = jnp.einsum("tkd,td->tk", y_PD[layout.slot_TK].astype(jnp.float32), dout_TD.astype(jnp.float32))
    return dy_PD.astype(y_PD.dtype), dweights_TK.astype(weights_TK.dtype), None


combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


def per_token_shard(
    compute: Callable[..., jax.Array],
    x_BSD: jax.Array,
    weights_BSK: jax.Array,
    experts_BSK: jax.Array,
    wi_ED2F: jax.Array,
    wo_EFD: jax.Array,
    rules: ShardingRules,
) -> jax.Array:
    """Run ``compute(x, weights, experts, wi, wo) -> y`` on each device's own tokens.

    Tokens never move: the experts' matrices come to them, gathered over every mesh axis but ``tensor``, whose partial
    sums over F are added up. Without a mesh, a plain call.
    """
    mesh = current_mesh()
    if mesh is None:
        return compute(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)
    tokens = rules.spec(("batch", "sequence", None))
    width = rules.mlp

    def local(*args):
        return jax.lax.psum(compute(*args), width)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            tokens,
            tokens,
            tokens,
            PartitionSpec(None, None, None, width),
            PartitionSpec(None, width, None),
        ),
        out_specs=tokens,
        check_vma=False,
    )(x_BSD, weights_BSK, experts_BSK, wi_ED2F, wo_EFD)

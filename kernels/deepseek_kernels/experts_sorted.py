"""Carrying tokens to their experts and back, without dropping any.

Every choice (token t, its k-th expert) gets a slot in a buffer of P rows that is sorted by expert, each expert's
rows starting on a multiple of the kernel's block. Forward and backward are gathers only: scatters with repeated rows
are slow on every backend. A choice outside the experts has no slot: it adds nothing and gets no gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_TK", "choice_P", "group_sizes_E"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each choice lies in the buffer sorted by expert.

    slot_TK: buffer row of each choice, P for a choice of no expert. choice_P: the choice ``t·K + k`` in each buffer
    row, T·K where the row is padding. group_sizes_E: rows per expert, multiples of ``block``.
    """

    slot_TK: jax.Array
    choice_P: jax.Array
    group_sizes_E: jax.Array
    block: int


def sort_by_expert(experts_TK: Int[Array, "T K"], experts: int, *, block: int, most: int | None = None) -> Layout:
    """Lay the choices out by expert, in token order within an expert, each expert padded to whole blocks.

    most: how many choices are of an expert at most, where that is known to be fewer than all; the buffer holds these.
    """
    tokens, top = experts_TK.shape
    choices = tokens * top
    most = choices if most is None else min(most, choices)
    assert (experts + 1) * choices < 2**31, "a sort key would overflow int32"
    rows = (most + min(experts, most) * (block - 1)) // block * block
    chosen_N = experts_TK.reshape(-1).astype(jnp.int32)
    chosen_N = jnp.where((chosen_N >= 0) & (chosen_N < experts), chosen_N, experts)  # no expert: sorted last
    key_N = jnp.sort(chosen_N * choices + jnp.arange(choices, dtype=jnp.int32))
    expert_N, choice_N = key_N // choices, key_N % choices
    sizes_E = jnp.sum(chosen_N[:, None] == jnp.arange(experts), axis=0)
    ends_E = jnp.cumsum(sizes_E)
    padded_E = (sizes_E + block - 1) // block * block
    shift_E = jnp.cumsum(padded_E) - padded_E - (ends_E - sizes_E)
    order_N = jnp.arange(choices)
    # Past the buffer, each elsewhere: dropped when written.
    slot_N = jnp.where(expert_N < experts, order_N + shift_E.at[expert_N].get(mode="clip"), rows + order_N)
    slot_TK = jnp.zeros(choices, jnp.int32).at[choice_N].set(slot_N.astype(jnp.int32), unique_indices=True)
    choice_P = jnp.full(rows, choices, jnp.int32).at[slot_N].set(choice_N, mode="drop", unique_indices=True)
    slot_TK = jnp.minimum(slot_TK.reshape(tokens, top), rows)
    return Layout(slot_TK, choice_P, padded_E.astype(jnp.int32), block)


@jax.custom_vjp
def gather_rows(x_TD: Float[Array, "T D"], layout: Layout) -> Float[Array, "P D"]:
    """Copy each token's row into the slots of its choices. Padding rows repeat the last token: ``sum_rows`` does not
    read them, and hands them no gradient."""
    tokens_P = layout.choice_P // layout.slot_TK.shape[1]
    plain = lambda x_TD: x_TD.at[tokens_P].get(mode="clip")  # noqa: E731
    if x_TD.dtype.itemsize != 2 or x_TD.shape[1] % 2:
        return plain(x_TD)

    def by_pairs(x_TD):  # XLA:GPU copies an element at a time: two of them are one
        pairs = jax.lax.bitcast_convert_type(x_TD.reshape(len(x_TD), -1, 2), jnp.uint32)
        return jax.lax.bitcast_convert_type(plain(pairs), x_TD.dtype).reshape(-1, x_TD.shape[1])

    return jax.lax.platform_dependent(x_TD, cuda=by_pairs, default=plain)


@jax.custom_vjp
def sum_rows(y_PD: Float[Array, "P D"], layout: Layout) -> Float[Array, "T D"]:
    """``out[t] = Σ_k y[slot[t, k]]``, summed in float32 one choice after another: K gathers that fuse into one pass,
    where a sum over an axis K would write the rows out in float32 first. A choice of no expert adds zeros.

    Its gradient is ``gather_rows``: padding rows get the last token's, which their weight of 0 leaves without effect.
    """
    return functools.reduce(jnp.add, _rows_of_choices(y_PD, layout)).astype(y_PD.dtype)


def sum_weighted(y_PD: Float[Array, "P D"], weights_TK: Float[Array, "T K"], layout: Layout) -> Float[Array, "T D"]:
    """``out[t] = Σ_k weights[t, k] · y[slot[t, k]]``, as ``sum_rows`` sums."""
    rows = zip(weights_TK.T, _rows_of_choices(y_PD, layout), strict=True)
    return functools.reduce(jnp.add, (weight_T[:, None] * row_TD for weight_T, row_TD in rows)).astype(y_PD.dtype)


def _rows_of_choices(y_PD, layout):
    """Of each k every token's row, float32."""
    rows = (y_PD.at[slot_T].get(mode="fill", fill_value=0) for slot_T in layout.slot_TK.T)
    return (row_TD.astype(jnp.float32) for row_TD in rows)


# Each is the other's transpose.
gather_rows.defvjp(
    lambda x_TD, layout: (gather_rows(x_TD, layout), layout), lambda layout, dy: (sum_rows(dy, layout), None)
)
sum_rows.defvjp(
    lambda y_PD, layout: (sum_rows(y_PD, layout), layout), lambda layout, dy: (gather_rows(dy, layout), None)
)


@jax.custom_vjp
def weight_rows(weights_TK: Float[Array, "T K"], layout: Layout) -> Float[Array, "P"]:
    """Each choice's weight in its slot, 0 in padding rows."""
    return weights_TK.reshape(-1).at[layout.choice_P].get(mode="fill", fill_value=0)


def _weight_rows_bwd(layout, dweight_P):
    return dweight_P.at[layout.slot_TK].get(mode="fill", fill_value=0), None


weight_rows.defvjp(lambda weights_TK, layout: (weight_rows(weights_TK, layout), layout), _weight_rows_bwd)

"""Grouped products as one batch of small ones: rows are cut into blocks of one group each.

For targets without a kernel of their own: XLA lowers ``ragged_dot`` there to E masked dense products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def groups(group_sizes_E: Int[Array, "E"], rows: int, block: int) -> Int[Array, "N"]:
    """Group of each of the ``rows // block`` blocks when every size is a multiple of ``block``; E past the last."""
    ends_E = jnp.cumsum(group_sizes_E)
    starts_N = jnp.arange(rows // block, dtype=ends_E.dtype) * block
    return jnp.sum(starts_N[:, None] >= ends_E[None, :], axis=1)


def spread(
    product: Callable[..., jax.Array], x_TD: Float[Array, "T D"], group_sizes_E: Int[Array, "E"], block: int
) -> Float[Array, "T F"]:
    """Spread the groups over whole blocks, ``product(rows, group_sizes_E=…)``, and gather the rows back."""
    rows, count = x_TD.shape[0], len(group_sizes_E)
    padded_E = (group_sizes_E + block - 1) // block * block
    total = (rows + count * (block - 1)) // block * block
    row_T = jnp.arange(rows)
    ends_E = jnp.cumsum(group_sizes_E)
    group_T = jnp.sum(row_T[:, None] >= ends_E[None, :], axis=1)
    shift_E = jnp.cumsum(padded_E) - padded_E - (ends_E - group_sizes_E)
    slot_T = row_T + shift_E.at[group_T].get(mode="clip")
    slot_T = jnp.where(group_T < count, slot_T, total + row_T)  # no group: dropped, and read back as zero
    wide = jnp.zeros((total, x_TD.shape[1]), x_TD.dtype).at[slot_T].set(x_TD, mode="drop", unique_indices=True)
    y = product(wide, group_sizes_E=padded_E)
    return y.at[slot_T].get(mode="fill", fill_value=0)


def forward(x_TD, w_EDF, group_sizes_E, block):
    """``y[t] = x[t] @ w[group of t]``; zero for rows of no group."""
    return _product("nmd,ndf->nmf", x_TD, w_EDF, group_sizes_E, block)


def dx(dy_TF, w_EDF, group_sizes_E, block):
    """``dx[t] = dy[t] @ w[group of t]ᵀ``."""
    return _product("nmf,ndf->nmd", dy_TF, w_EDF, group_sizes_E, block)


def dw(x_TD, dy_TF, group_sizes_E, block, dtype):
    """``dw[e] = Σ x[t]ᵀ dy[t]`` over the rows of group e, in float32."""
    del dtype
    x_NMD, dy_NMF = (rows.reshape(-1, block, rows.shape[1]) for rows in (x_TD, dy_TF))
    dw_NDF = jnp.einsum("nmd,nmf->ndf", x_NMD, dy_NMF, preferred_element_type=jnp.float32)
    group_N = groups(group_sizes_E, len(x_TD), block)
    return jax.ops.segment_sum(dw_NDF, group_N, len(group_sizes_E), indices_are_sorted=True)


def _product(equation, rows, w_EDF, group_sizes_E, block):
    # A block of no group gets a matrix of zeros, and so gives zeros.
    w_NDF = w_EDF.at[groups(group_sizes_E, len(rows), block)].get(mode="fill", fill_value=0)
    blocks = rows.reshape(-1, block, rows.shape[1])
    y = jnp.einsum(equation, blocks, w_NDF, preferred_element_type=jnp.float32)
    return y.reshape(len(rows), -1).astype(rows.dtype)

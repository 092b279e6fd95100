"""Matrix products of groups of rows, each group with a matrix of its own: the routed experts' arithmetic.

``grouped_matmul(x, w, sizes)[t] = x[t] @ w[group of t]`` for rows sorted by group. Exact and dropless: no capacity.

On TPU this is ``jax.lax.ragged_dot``. On GPU, where XLA lowers that to E masked dense products, bfloat16 goes through
the kernels of ``hopper.py`` where the GPU is one; otherwise the rows are cut into blocks of one group each and
multiplied as one batch. A caller that lays its groups out on multiples of ``aligned`` rows (see ``row_alignment``)
saves the copies to and from blocks. On CPU, float32 goes through the C kernels of ``cpu.c``, which need no blocks;
other dtypes, and machines without a compiler, through blocks.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu, hopper

Implementation = Literal["ragged_dot", "blocks", "c", "hopper"]


def row_alignment(
    rows: int, groups: int, dtype: jax.typing.DTypeLike, *, implementation: Implementation | None = None
) -> int:
    """Rows per block for ``rows`` rows in ``groups`` groups: 128 for the Hopper kernels, 1 for those without blocks,
    otherwise a power of two, at most a group's mean size.

    Padding a group costs half a block on average; a small block costs one more copy of its group's matrix. Measured
    best: half a group's mean, 64 at most, on a CPU; the mean, 1024 at most, on a GPU.
    """
    chosen = _resolve(implementation, jnp.dtype(dtype))
    if chosen != "blocks":
        return hopper.ROWS if chosen == "hopper" else 1
    on_cpu = jax.default_backend() == "cpu"
    best = max(1, rows // max(groups, 1) // (2 if on_cpu else 1))
    return min(64 if on_cpu else 1024, 1 << (best.bit_length() - 1))


def grouped_matmul(
    x_TD: Float[Array, "T D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    *,
    aligned: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "T F"]:
    """Multiply each row by its group's matrix: ``y[t] = x[t] @ w[e]`` for the ``e`` whose rows hold ``t``.

    Rows are sorted by group: the first ``group_sizes[0]`` belong to group 0, and so on; rows past the sum belong to
    no group and give zero. Products are accumulated in float32 and returned in ``x``'s dtype. Differentiable in ``x``
    and ``w``.

    Args:
      aligned: promises that every group size is a multiple of this many rows, and T too; groups may hold zero rows.
      implementation: ``ragged_dot``, ``blocks``, ``c`` or ``hopper``; by default the one for platform, dtype and
        widths.

    Raises:
      ValueError: shapes that do not fit, T not a multiple of ``aligned``, or an implementation that cannot run here.
    """
    if x_TD.ndim != 2 or w_EDF.ndim != 3 or x_TD.shape[1] != w_EDF.shape[1]:
        raise ValueError(f"x {x_TD.shape} and w {w_EDF.shape}: expected (T, D) and (E, D, F) with one D")
    if x_TD.dtype != w_EDF.dtype:
        raise ValueError(f"x is {x_TD.dtype} and w {w_EDF.dtype}: expected one dtype")
    if group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(f"group_sizes {group_sizes_E.shape} for {w_EDF.shape[0]} groups")
    if x_TD.shape[0] % aligned:
        raise ValueError(f"T={x_TD.shape[0]} is not a multiple of aligned={aligned}")
    chosen = _resolve(implementation, x_TD.dtype, *w_EDF.shape[1:])
    if chosen == "c":
        if not cpu.usable(x_TD, w_EDF):
            raise ValueError(f"implementation='c' needs float32 on a CPU and gcc; x is {x_TD.dtype}, w {w_EDF.dtype}")
        return _c_matmul(x_TD, w_EDF, group_sizes_E.astype(jnp.int32))
    if chosen == "ragged_dot":
        return jax.lax.ragged_dot(
            x_TD, w_EDF, group_sizes_E.astype(jnp.int32), preferred_element_type=jnp.float32
        ).astype(x_TD.dtype)
    if chosen == "hopper":
        if not hopper.usable(x_TD.dtype, *w_EDF.shape[1:]):
            raise ValueError(
                "implementation='hopper' needs bfloat16, widths of 256 and further multiples of 64, and a GPU of "
                f"capability 9.0; x is {x_TD.dtype}, w {w_EDF.shape}"
            )
        if not x_TD.shape[0]:  # not one tile
            return jnp.zeros((0, w_EDF.shape[2]), x_TD.dtype)
        if aligned % hopper.ROWS == 0:
            return _hopper_matmul(x_TD, w_EDF, group_sizes_E)
        return _spread_over_blocks(_hopper_matmul, x_TD, w_EDF, group_sizes_E, hopper.ROWS)
    if aligned > 1 or x_TD.shape[0] <= w_EDF.shape[0]:
        return _block_matmul(x_TD, w_EDF, group_sizes_E, aligned)
    block = row_alignment(x_TD.shape[0], w_EDF.shape[0], x_TD.dtype, implementation="blocks")
    product = functools.partial(_block_matmul, block=block)
    return _spread_over_blocks(product, x_TD, w_EDF, group_sizes_E, block)


def weight_gradient(x: Float[Array, "*B D"], dy: Float[Array, "*B F"]) -> Float[Array, "D F"]:
    """``Σ xᵀ dy`` over all rows: the gradient of a matrix that they went through, in ``x``'s dtype.

    The same as autodiff's, which writes ``(dyᵀ x)ᵀ``: with two or more row axes XLA:CPU then transposes ``dy`` and
    multiplies at 40 % of its speed. Float32 on a CPU takes the C kernel, which transposes nothing.

    Raises:
      ValueError: rows that do not agree.
    """
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x {x.shape} and dy {dy.shape}: expected (…, D) and (…, F) with the same rows")
    if cpu.usable(x, dy):
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        rows = jnp.array([len(x)], jnp.int32)
        return cpu.call("grouped_dw", [(1, x.shape[1], dy.shape[1])], x, dy, rows)[0][0]
    rows = tuple(range(x.ndim - 1))
    dw = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dw.astype(x.dtype)


def grouped_matmul_reference(x_TD, w_EDF, group_sizes_E):
    """The definition: every row times every group's matrix, the wrong ones masked. E times the arithmetic."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_T1 = jnp.arange(x_TD.shape[0])[:, None]
    mine_TE = (row_T1 < ends_E) & (row_T1 >= ends_E - group_sizes_E)
    y_TEF = jnp.einsum("td,edf->tef", x_TD, w_EDF, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(mine_TE[..., None], y_TEF, 0), axis=1).astype(x_TD.dtype)


def block_groups(group_sizes_E: Int[Array, "E"], rows: int, block: int) -> Int[Array, "N"]:
    """Group of each of the ``rows // block`` blocks when every size is a multiple of ``block``; E past the last."""
    ends_E = jnp.cumsum(group_sizes_E)
    starts_N = jnp.arange(rows // block, dtype=ends_E.dtype) * block
    return jnp.sum(starts_N[:, None] >= ends_E[None, :], axis=1)


def _resolve(implementation: Implementation | None, dtype: jnp.dtype, *widths: int) -> Implementation:
    if implementation is not None:
        return implementation
    if jax.default_backend() == "tpu":
        return "ragged_dot"
    if hopper.usable(dtype, *widths):
        return "hopper"
    return "c" if dtype == jnp.float32 and cpu.available() else "blocks"


@jax.custom_vjp
def _c_matmul(x_TD, w_EDF, group_sizes_E):
    return cpu.call("grouped_forward", [(x_TD.shape[0], w_EDF.shape[2])], x_TD, w_EDF, group_sizes_E)[0]


def _c_forward(x_TD, w_EDF, group_sizes_E):
    return _c_matmul(x_TD, w_EDF, group_sizes_E), (x_TD, w_EDF, group_sizes_E)


def _c_backward(residuals, dy_TF):
    x_TD, w_EDF, group_sizes_E = residuals
    dx_TD = cpu.call("grouped_dx", [x_TD.shape], dy_TF, w_EDF, group_sizes_E)[0]
    return dx_TD, cpu.call("grouped_dw", [w_EDF.shape], x_TD, dy_TF, group_sizes_E)[0], None


_c_matmul.defvjp(_c_forward, _c_backward)


@jax.custom_vjp
def _hopper_matmul(x_TD, w_EDF, group_sizes_E):
    return hopper.grouped_product(x_TD, w_EDF, block_groups(group_sizes_E, x_TD.shape[0], hopper.ROWS))


def _hopper_forward(x_TD, w_EDF, group_sizes_E):
    return _hopper_matmul(x_TD, w_EDF, group_sizes_E), (x_TD, w_EDF, group_sizes_E)


def _hopper_backward(residuals, dy_TF):
    x_TD, w_EDF, group_sizes_E = residuals
    group_N = block_groups(group_sizes_E, x_TD.shape[0], hopper.ROWS)
    dx_TD = hopper.grouped_product(dy_TF, w_EDF, group_N, transpose=True)
    return dx_TD, hopper.grouped_weight_gradient(x_TD, dy_TF, group_sizes_E), None


_hopper_matmul.defvjp(_hopper_forward, _hopper_backward)


def _spread_over_blocks(product, x_TD, w_EDF, group_sizes_E, block):
    """Spread the groups over whole blocks, multiply, and gather the rows back."""
    rows, groups = x_TD.shape[0], w_EDF.shape[0]
    padded_E = (group_sizes_E + block - 1) // block * block
    total = (rows + groups * (block - 1)) // block * block
    row_T = jnp.arange(rows)
    ends_E = jnp.cumsum(group_sizes_E)
    group_T = jnp.sum(row_T[:, None] >= ends_E[None, :], axis=1)
    shift_E = jnp.cumsum(padded_E) - padded_E - (ends_E - group_sizes_E)
    slot_T = row_T + shift_E.at[group_T].get(mode="clip")
    slot_T = jnp.where(group_T < groups, slot_T, total + row_T)  # no group: dropped, and read back as zero
    spread = jnp.zeros((total, x_TD.shape[1]), x_TD.dtype).at[slot_T].set(x_TD, mode="drop", unique_indices=True)
    y: jax.Array = product(spread, w_EDF, padded_E)
    return y.at[slot_T].get(mode="fill", fill_value=0)


def _block_matmul(x_TD, w_EDF, group_sizes_E, block):
    return _aligned_matmul(x_TD, w_EDF, block_groups(group_sizes_E, x_TD.shape[0], block), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _aligned_matmul(x_TD, w_EDF, group_N, block):
    return _forward(x_TD, w_EDF, group_N, block)[0]


def _forward(x_TD, w_EDF, group_N, block):
    x_NMD = x_TD.reshape(-1, block, x_TD.shape[1])
    y_NMF = jnp.einsum("nmd,ndf->nmf", x_NMD, _block_weights(w_EDF, group_N), preferred_element_type=jnp.float32)
    return y_NMF.reshape(-1, w_EDF.shape[2]).astype(x_TD.dtype), (x_TD, w_EDF, group_N)


def _backward(block, residuals, dy_TF):
    x_TD, w_EDF, group_N = residuals
    x_NMD = x_TD.reshape(-1, block, x_TD.shape[1])
    dy_NMF = dy_TF.reshape(-1, block, dy_TF.shape[1])
    dx_NMD = jnp.einsum("nmf,ndf->nmd", dy_NMF, _block_weights(w_EDF, group_N), preferred_element_type=jnp.float32)
    dw_NDF = jnp.einsum("nmd,nmf->ndf", x_NMD, dy_NMF, preferred_element_type=jnp.float32)
    dw_EDF = jax.ops.segment_sum(dw_NDF, group_N, w_EDF.shape[0], indices_are_sorted=True)
    return dx_NMD.reshape(x_TD.shape).astype(x_TD.dtype), dw_EDF.astype(w_EDF.dtype), None


def _block_weights(w_EDF, group_N):
    """Each block's matrix; zero for a block of no group, so that its rows give zero."""
    return w_EDF.at[group_N].get(mode="fill", fill_value=0)


_aligned_matmul.defvjp(_forward, _backward)

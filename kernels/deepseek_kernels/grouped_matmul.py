"""Matrix products of groups of rows, each group with a matrix of its own: the routed experts' arithmetic.

``grouped_matmul(x, w, sizes)[t] = x[t] @ w[group of t]`` for rows sorted by group. Exact and dropless: no capacity.
The weight comes as it is stored and gets its gradient in float32, as in product.py. Which implementation runs where is
the registry's; one that works in blocks of rows of one group wants groups laid out on multiples of the ``rows`` that it
chooses, which saves the copies to and from blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu, fp8_on_hopper, grouped_blocks, grouped_tpu, hopper, hopper_few
from deepseek_kernels.integers import grouped_by_matrix, grouped_c
from deepseek_kernels.kept import kept
from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target
from deepseek_kernels.weights import Weight, block_scaled, in_stack, stored_gradient


def grouped_matmul(
    x_TD: Float[Array, "T D"],
    w_EDF: Weight,
    group_sizes_E: Int[Array, "E"],
    *,
    aligned: int = 1,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "T ..."]:
    """Multiply each row by its group's matrix: ``y[t] = x[t] @ w[e]`` for the ``e`` whose rows hold ``t``.

    Rows are sorted by group: the first ``group_sizes[0]`` belong to group 0, and so on; rows past the sum belong to
    no group and give zero. Products are accumulated in float32 and returned in ``x``'s dtype. Differentiable in ``x``
    and, where it is not block-scaled, in ``w``.

    Args:
      w_EDF: (E, D, F), or (E, D, …) for a result of (T, …): an array of any dtype, a BlockScaled or an InStack, which
        ``hopper`` reads where it lies, FP8 and integers without a copy in another dtype (fp8_matmul.py), and
        ``megablox`` if its matrices have two axes.
      aligned: promises that every group size is a multiple of this many rows, and T too; groups may hold zero rows.
      implementation: ``c``, ``hopper``, ``hopper_fp8``, ``megablox``, ``ragged_dot``, ``blocks`` or ``reference``; for
        integers ``c_integers`` or ``by_matrix`` too.

    Raises:
      ValueError: shapes that do not fit, T not a multiple of ``aligned``, or an implementation that cannot run.
    """
    (T, D), shape = x_TD.shape, tuple(w_EDF.shape)
    if len(shape) < 3 or shape[1] != D:
        raise ValueError(f"x {x_TD.shape} and w {shape}: expected (T, D) and (E, D, F) with one D")
    if group_sizes_E.shape != shape[:1]:
        raise ValueError(f"group_sizes {group_sizes_E.shape} for {shape[0]} groups")
    if T % aligned:
        raise ValueError(f"T={T} is not a multiple of aligned={aligned}")
    target, widths = target or Target.here(), (D, math.prod(shape[2:]))
    facts = {"rows": T, "groups": shape[0], "widths": widths, "weight": w_EDF}
    choice = choose("grouped_matmul", target, x_TD.dtype, implementation=implementation, **facts)
    sizes_E = group_sizes_E.astype(jnp.int32)
    if not T:
        return jnp.zeros((0, *shape[2:]), x_TD.dtype)
    if choice.name == "reference":
        return grouped_matmul_reference(x_TD, w_EDF.astype(x_TD.dtype).reshape(*shape[:2], -1), sizes_E).reshape(
            T, *shape[2:]
        )
    # Blocks may be of any size; only the Hopper kernels insist.
    on_hopper = choice.name in _ON_HOPPER
    few = on_hopper and aligned in hopper_few.TILES
    as_it_lies = few or aligned % hopper.ROWS == 0 if on_hopper else aligned > 1 or choice.rows == 1
    block = aligned if as_it_lies or (choice.name == "blocks" and shape[0] >= T) else choice.rows
    product = functools.partial(_grouped, w=w_EDF, block=block, name=choice.name, target=target)
    if block == aligned:
        y_TF = product(x_TD, group_sizes_E=sizes_E)
    else:
        y_TF = grouped_blocks.spread(product, x_TD, sizes_E, block)
    return y_TF.reshape(T, *shape[2:])


def grouped_matmul_reference(x_TD, w_EDF, group_sizes_E):
    """The definition: every row times every group's matrix, the wrong ones masked. E times the arithmetic."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_T1 = jnp.arange(x_TD.shape[0])[:, None]
    mine_TE = (row_T1 < ends_E) & (row_T1 >= ends_E - group_sizes_E)
    y_TEF = jnp.einsum("td,edf->tef", x_TD, w_EDF, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(mine_TE[..., None], y_TEF, 0), axis=1).astype(x_TD.dtype)


class _Kernels(NamedTuple):
    """forward(x, w, sizes, block) -> y and dx(dy, w, sizes, block) in their operands' dtype; dw(x, dy, sizes, block,
    dtype) -> (E, D, F) in that dtype or in float32."""

    forward: Callable[..., jax.Array]
    dx: Callable[..., jax.Array]
    dw: Callable[..., jax.Array]


_ON_HOPPER = "hopper", "hopper_fp8"
_AS_STORED = *_ON_HOPPER, "megablox"  # which take a weight as it comes
_OF_INTEGERS = "c_integers", "by_matrix"  # forward so too, their gradients are blocks'


def _kernels(name: str, target: Target) -> _Kernels:
    if name in _OF_INTEGERS:
        return _Kernels(functools.partial(_integers, name=name), grouped_blocks.dx, grouped_blocks.dw)
    if name == "megablox":
        return _Kernels(
            lambda x, w, sizes, block: _megablox(x, w, sizes, target.chip),
            lambda dy, w, sizes, block: _megablox(dy, w, sizes, target.chip, transpose=True),
            lambda x, dy, sizes, block, dtype: grouped_tpu.grouped_weight_gradient(
                x, dy, sizes, chip=target.chip, dtype=dtype
            ),
        )
    if name in _ON_HOPPER:
        cores = target.cores
        return _Kernels(
            functools.partial(_hopper, cores=cores, quantised=name == "hopper_fp8"),
            functools.partial(_hopper, cores=cores, transpose=True),
            lambda x, dy, sizes, block, dtype: (
                hopper.grouped_weight_gradient(x, dy, sizes, cores=cores, dtype=dtype)
                if block % hopper.ROWS == 0
                else grouped_blocks.dw(x, dy, sizes, block, dtype)
            ),
        )
    return {
        "c": _Kernels(
            lambda x, w, sizes, block: cpu.call("grouped_forward", [(len(x), w.shape[2])], x, w, sizes)[0],
            lambda dy, w, sizes, block: cpu.call("grouped_dx", [(len(dy), w.shape[1])], dy, w, sizes)[0],
            lambda x, dy, sizes, block, dtype: cpu.call(
                "grouped_dw", [(len(sizes), x.shape[1], dy.shape[1])], x, dy, sizes
            )[0],
        ),
        "ragged_dot": _Kernels(
            lambda x, w, sizes, block: _ragged(x, w, sizes, 1),
            lambda dy, w, sizes, block: _ragged(dy, w, sizes, 2),
            lambda x, dy, sizes, block, dtype: _ragged_dw(x, dy, sizes),
        ),
        "blocks": _Kernels(grouped_blocks.forward, grouped_blocks.dx, grouped_blocks.dw),
    }[name]


def _hopper(x, w, sizes, block, *, cores, transpose=False, quantised=False):
    """Few rows have a kernel of their own, forward; their gradients, which nothing fast needs, are blocks', and so are
    those through FP8 weights."""
    scaled = block_scaled(w) is not None
    if transpose and (block % hopper.ROWS or scaled):
        return grouped_blocks.dx(x, _values(w, x.dtype), sizes, block)
    group_N = grouped_blocks.groups(sizes, len(x), block if block in hopper_few.TILES else hopper.ROWS)
    if scaled and not fp8_on_hopper.does_not_fit(w):
        return fp8_on_hopper.multiply(x, w, group_N, cores=cores, quantised=quantised)
    if in_stack(w, x.dtype):  # read where it lies, as some of the stack's groups
        matrices = w.stack.reshape(-1, w.shape[1], math.prod(w.shape[2:]))
        group_N = jnp.where(group_N < len(sizes), group_N + w.layer * len(sizes), len(matrices))
    else:
        matrices = _values(w, x.dtype)
    if block in hopper_few.TILES:
        blocks_M = jnp.append(group_N, jnp.sum(group_N < len(matrices))).astype(jnp.int32)
        return hopper_few.grouped_product(x, matrices, blocks_M, cores=cores)
    return hopper.grouped_product(x, matrices, group_N, cores=cores, transpose=transpose)


def _integers(x, w, sizes, block, *, name):
    if name == "c_integers":
        return grouped_c(x, w, sizes)
    return grouped_by_matrix(x, w, grouped_blocks.groups(sizes, len(x), block), len(sizes))


def _megablox(x, w, sizes, chip, transpose=False):
    # (…, 2, F) is tiled otherwise than (…, 2 F) on a TPU: a stack of those would be copied whole.
    if in_stack(w, x.dtype) and len(w.shape) == 3:
        matrices, first = w.stack.reshape(-1, *w.shape[1:]), w.layer * len(sizes)
    else:
        matrices, first = _values(w, x.dtype), 0
    return grouped_tpu.grouped_product(x, matrices, sizes, first, chip=chip, transpose=transpose)


def _ragged(x, w, sizes, terms):
    """Rows times each group's matrix, summed over the matrix' axis ``terms``."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (terms,)), ((), ())), [0], [0])
    return jax.lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _ragged_dw(x, dy, sizes):
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=jnp.float32)


def _values(w, dtype):
    return w.astype(dtype).reshape(*w.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped(x, w, group_sizes_E, block, name, target):
    w = w if name in (*_AS_STORED, *_OF_INTEGERS) else _values(w, x.dtype)
    return _kernels(name, target).forward(x, w, group_sizes_E, block)


def _forward(x, w, group_sizes_E, block, name, target):
    y: Any = _grouped(x, w, group_sizes_E, block, name, target)
    if name in _ON_HOPPER:
        # In a scan, where y is put into a stack for the backward pass, XLA would run the kernel a second time for that.
        y = jax.lax.optimization_barrier(y)
    return kept(y), (x, w, group_sizes_E)


def _backward(block, name, target, residuals, dy):
    x, w, sizes = residuals
    kernels = _kernels(name, target)
    dx = kernels.dx(dy, w if name in _AS_STORED else _values(w, x.dtype), sizes, block)
    dtype = x.dtype if w.dtype == x.dtype else jnp.dtype(jnp.float32)
    return dx, stored_gradient(w, lambda: kernels.dw(x, dy, sizes, block, dtype).reshape(w.shape)), None


_grouped.defvjp(_forward, _backward)

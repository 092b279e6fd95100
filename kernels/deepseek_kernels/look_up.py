"""Rows of a table by their numbers, and the gradient of the table, which is summed in one order on a GPU too."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.registry import choose
from deepseek_kernels.target import Target


def look_up(
    table_WD: Float[Array, "W D"],
    ids: Int[Array, "*B"],
    *,
    target: Target | None = None,
    implementation: str = "auto",
) -> Float[Array, "*B D"]:
    """``table[ids]``, differentiable in the table.

    Args:
      implementation: how the gradients of a row that is looked up many times are added: ``scatter``, in an order that
        on a GPU is another one every time; ``sorted``, in a tree over its places.

    Raises:
      ValueError: an implementation that cannot run on the target.
    """
    target = target or Target.here()
    name = choose("look_up", target, table_WD.dtype, implementation=implementation).name
    if name == "sorted":
        return _sorted(table_WD, ids)
    # Of bfloat16 jax 0.10's XLA would make a CPU a float32 copy of the whole table.
    return _bits(table_WD, ids) if target.platform == "cpu" and table_WD.dtype == jnp.bfloat16 else table_WD[ids]


def _sorted(table_WD, ids):
    return _rows(table_WD, ids, len(table_WD))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table_WD, ids, size):
    return table_WD[ids]


def _backward(size, ids, drows):
    return _sum_by_id(ids.reshape(-1), drows.reshape(ids.size, -1), size), None


_rows.defvjp(lambda table_WD, ids, size: (table_WD[ids], ids), _backward)


@jax.custom_vjp
def _bits(table_WD, ids):
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table_WD, jnp.uint16)[ids], jnp.bfloat16)


def _scattered(residuals, drows):
    ids, table_WD = residuals
    return jnp.zeros_like(table_WD).at[ids].add(drows), None


_bits.defvjp(lambda table_WD, ids: (_bits(table_WD, ids), (ids, table_WD)), _scattered)


def _sum_by_id(ids_N, rows_ND, size):
    """(size, D): the sum of the rows of each id. Rows are sorted by id and added up along each run of one id; the last
    of a run, which holds its sum, is then written: no place twice."""
    ids_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(len(ids_N), dtype=jnp.int32))
    changes = ids_N[1:] != ids_N[:-1]
    first_N1 = jnp.pad(changes, (1, 0), constant_values=True)[:, None]
    last_N = jnp.pad(changes, (0, 1), constant_values=True)

    def both(left, right):
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, sums_ND = jax.lax.associative_scan(both, (first_N1, rows_ND[order_N]))
    at_N = jnp.where(last_N, ids_N, size + order_N)  # the others each elsewhere behind the end: dropped
    return jnp.zeros((size, rows_ND.shape[1]), rows_ND.dtype).at[at_N].set(sums_ND, mode="drop", unique_indices=True)

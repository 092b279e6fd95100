"""Rows of a table that is split over the mesh: ids travel, and the rows found; the table does not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import current_mesh
from deepseek_jax.parallel.sharding import ShardingRules, split_by


def rows_of_table(
    look_up: Callable[[jax.Array, jax.Array], jax.Array],
    table_WD: jax.Array,
    ids_BS: jax.Array,
    dtype: Any,
    rules: ShardingRules,
) -> jax.Array:
    """``look_up(table, ids)`` in ``dtype``, (B S D) split as the batch is. On one device that and nothing else.

    On others each looks up, in its part of the table, the rows of all that share its part of the batch's axes (fsdp):
    an all-to-all brings each device the whole width of its own. The table's gradient goes the same way back; it is
    added up in float32 on each device, and in the table's dtype over the mesh.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return look_up(table_WD, ids_BS).astype(dtype)
    return _rows(table_WD, ids_BS, look_up, jnp.dtype(dtype), rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rows(table_WD, ids_BS, look_up, dtype, rules):
    width, between = _axes(rules), split_by(rules.vocab)

    def local(table_wd, ids_bs):
        ids_bs, here = _columns(_gathered(ids_bs, width), len(table_wd), between)
        rows = look_up(table_wd, ids_bs).astype(dtype)
        if between:
            rows = jax.lax.psum(jnp.where(here[..., None], rows, 0), between)
        return jax.lax.all_to_all(rows, width, 0, 2, tiled=True) if width else rows

    specs = {"in_specs": (_table(rules), rules.spec(("batch", "sequence"))), "out_specs": _found(rules)}
    return jax.shard_map(local, **specs, check_vma=False)(table_WD, ids_BS)


def _forward(table_WD, ids_BS, look_up, dtype, rules):
    return _rows(table_WD, ids_BS, look_up, dtype, rules), (ids_BS, table_WD)


def _backward(look_up, dtype, rules, residuals, drows_BSD):
    width, between = _axes(rules), split_by(rules.vocab)

    def local(drows_bsd, ids_bs, table_wd):
        ids_bs, here = _columns(_gathered(ids_bs, width), len(table_wd), between)
        drows = jax.lax.all_to_all(drows_bsd, width, 2, 0, tiled=True) if width else drows_bsd
        _, back = jax.vjp(lambda table_wd: look_up(table_wd, ids_bs), jnp.zeros(table_wd.shape, jnp.float32))
        (sums,) = back(jnp.where(here[..., None], drows, 0).astype(jnp.float32))
        others = tuple(name for name in (*rules.batch, *rules.sequence) if name not in width)
        return jax.lax.psum(sums.astype(table_wd.dtype), others)

    (ids_BS, table_WD), ids_spec = residuals, rules.spec(("batch", "sequence"))
    specs = {"in_specs": (_found(rules), ids_spec, _table(rules)), "out_specs": _table(rules)}
    return jax.shard_map(local, **specs, check_vma=False)(drows_BSD, ids_BS, table_WD), None


_rows.defvjp(_forward, _backward)


def _axes(rules: ShardingRules) -> tuple[str, ...]:
    """What splits the table's width and the batch alike."""
    return tuple(name for name in split_by(rules.embed) if name in rules.batch)


def _table(rules: ShardingRules):
    width = tuple(name for name in rules.embed if name in rules.batch)
    return jax.P(rules.vocab or None, width or None)


def _found(rules: ShardingRules):
    return rules.spec(("batch", "sequence", None))


def _gathered(ids_bs, width):
    return jax.lax.all_gather(ids_bs, width, tiled=True) if width else ids_bs


def _columns(ids_bs, size, between):
    """Ids as rows of this device's part, and which of them lie there."""
    if not between:
        return ids_bs, jnp.ones(ids_bs.shape, bool)
    ids_bs = ids_bs - jax.lax.axis_index(between) * size
    here = (ids_bs >= 0) & (ids_bs < size)
    return jnp.where(here, ids_bs, 0), here

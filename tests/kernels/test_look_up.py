"""The gradient of a table's rows, sorted and scattered, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_kernels import look_up


@jax.jit
def both(table, ids, dy):
    found = {}
    for how in ("sorted", "scatter"):
        rows, pullback = jax.vjp(lambda table, how=how: look_up(table, ids, implementation=how), table)
        found[how] = rows, *pullback(dy)
    return found


@given(st.lists(st.integers(0, 4), min_size=6, max_size=6), st.integers(0, 9))
def test_rows_and_the_tables_gradient(ids, seed):
    """Ids that stand once, often, all and never."""
    rng = np.random.default_rng(seed)
    ids, table, dy = np.reshape(ids, (2, 3)), rng.standard_normal((5, 4)), rng.standard_normal((2, 3, 4))
    right = np.zeros(table.shape)
    np.add.at(right, ids, dy)
    arrays = jnp.asarray(table, jnp.float32), jnp.asarray(ids, jnp.int32), jnp.asarray(dy, jnp.float32)
    for rows, gradient in both(*arrays).values():
        np.testing.assert_array_equal(rows, np.asarray(table, np.float32)[ids])
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_table_is_read_where_it_lies():
    """On a CPU too, where XLA would gather from a float32 copy of it; the gradient is that of any other."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((300, 40)), jnp.bfloat16)
    ids, dy = jnp.array([[1, 299], [0, 1]]), jnp.ones((2, 2, 40), jnp.bfloat16)
    rows, pullback = jax.vjp(lambda table: look_up(table, ids, implementation="scatter"), table)
    np.testing.assert_array_equal(rows, np.asarray(table)[np.asarray(ids)])
    right = np.zeros(table.shape)
    right[[0, 1, 299]] = np.array([1, 2, 1])[:, None]
    (gradient,) = pullback(dy)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), right)
    inside = jax.jit(lambda table: look_up(table, ids, implementation="scatter").astype(jnp.float32))
    assert "f32[300,40]" not in (inside.lower(table).compile().as_text() or "f32[300,40]")


def test_another_way_is_refused():
    with pytest.raises(ValueError, match="implementation='gather' of look_up: expected one of auto, sorted, scatter"):
        look_up(jnp.ones((2, 2)), jnp.zeros(1, jnp.int32), implementation="gather")

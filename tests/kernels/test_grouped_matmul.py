"""The grouped product against its definition, forward and backward, in every implementation and layout."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_kernels import (
    BlockScaled,
    InStack,
    Target,
    choose,
    grouped_matmul,
    quantise,
)

T, E, D, F = 24, 5, 7, 6


def definition(x, w, sizes):
    """Group after group in float64; rows past the last group stay zero."""
    y, start = np.zeros((len(x), w.shape[2])), 0
    for e, size in enumerate(sizes):
        y[start : start + size] = x[start : start + size] @ w[e]
        start += size
    return y


def definition_gradients(x, w, sizes, dy):
    dx, dw, start = np.zeros(x.shape), np.zeros(w.shape), 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        dx[rows], dw[e] = dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return dx, dw


@functools.cache
def compiled(implementation, aligned):
    """(x, w, sizes, dy) -> y, dx, dw; one compilation for all tests of a shape."""

    def run(x, w, sizes, dy):
        function = functools.partial(
            grouped_matmul, group_sizes_E=sizes, aligned=aligned, implementation=implementation
        )
        y, pullback = jax.vjp(lambda x, w: function(x, w), x, w)
        return y, *pullback(dy)

    return jax.jit(run)


def draw(rows, groups=E, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, D), (groups, D, F), (rows, F))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def check(implementation, aligned, rows, sizes, groups=E):
    x, w, dy = draw(rows, groups)
    y, dx, dw = compiled(implementation, aligned)(x, w, np.array(sizes, np.int32), dy)
    expected = (definition(x, w, sizes), *definition_gradients(x, w, sizes, dy))
    for name, value, right in zip(("y", "dx", "dw"), (y, dx, dw), expected, strict=True):
        assert value.shape == right.shape and value.dtype == np.float32
        # D, F and a group's rows are at most 24: float32 sums of so few terms of size 1.
        np.testing.assert_allclose(value, right, rtol=0, atol=1e-5, err_msg=f"{name} {implementation} {sizes}")


SIZES = {
    "uneven": [5, 1, 9, 2, 7],
    "empty_groups": [0, 13, 0, 11, 0],
    "one_group": [0, 0, 24, 0, 0],
    "rows_of_no_group": [3, 0, 4, 1, 5],
    "nothing": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("implementation", ["c", "blocks", "ragged_dot", "reference"])
def test_value_and_gradients_equal_the_definition(implementation, sizes):
    check(implementation, 1, T, sizes)


@pytest.mark.parametrize("sizes", [[8, 0, 4, 4, 8], [0, 4, 0, 8, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("implementation", ["c", "blocks", "ragged_dot"])
def test_aligned_rows(implementation, sizes):
    check(implementation, 4, T, sizes)


@pytest.mark.parametrize(("rows", "sizes"), [(3, [0, 1, 0, 1, 0]), (5, [0, 5, 0, 0, 0]), (1, [0, 0, 0, 0, 1])])
@pytest.mark.parametrize("implementation", ["c", "blocks"])
def test_fewer_rows_than_groups(implementation, rows, sizes):
    check(implementation, 1, rows, sizes)


def test_no_rows_at_all():
    for implementation in ("c", "blocks", "ragged_dot"):
        y = grouped_matmul(
            jnp.zeros((0, D)), jnp.ones((E, D, F)), jnp.zeros(E, jnp.int32), implementation=implementation
        )
        assert y.shape == (0, F)


cuts = st.lists(st.integers(0, T), min_size=E, max_size=E).map(sorted)


@given(cuts)
def test_any_sizes(ends):
    sizes = np.diff(ends, prepend=0).tolist()
    check("blocks", 1, T, sizes)
    check("c", 1, T, sizes)


@given(st.lists(st.integers(0, T // 4), min_size=E, max_size=E).map(sorted))
def test_any_aligned_sizes(ends):
    sizes = (4 * np.diff(ends, prepend=0)).tolist()
    check("blocks", 4, T, sizes)


def test_gradients_equal_finite_differences():
    x, w, dy = (a.astype(np.float64) for a in draw(T))
    sizes, rng, eps = SIZES["rows_of_no_group"], np.random.default_rng(1), 1e-3
    ux, uw = rng.standard_normal(x.shape), rng.standard_normal(w.shape)

    def loss(step):
        return np.sum(definition(x + step * ux, w + step * uw, sizes) * dy)

    _, dx, dw = compiled("blocks", 1)(*(jnp.asarray(a, jnp.float32) for a in (x, w)), np.array(sizes, np.int32), dy)
    slope = (loss(eps) - loss(-eps)) / (2 * eps)  # exact: the loss is quadratic along the line
    np.testing.assert_allclose(np.sum(dx * ux) + np.sum(dw * uw), slope, rtol=1e-5)


def test_bfloat16_is_rounded_once():
    """Products are summed in float32: a result is off by half a unit in bfloat16's last place, 2⁻⁸."""
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in draw(T))
    sizes = SIZES["uneven"]
    results = compiled("blocks", 1)(x, w, np.array(sizes, np.int32), dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for value, right in zip(results, (definition(x, w, sizes), *definition_gradients(x, w, sizes, dy)), strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float64), right, rtol=1.01 * 2**-8, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
def test_a_float32_master_gets_an_unrounded_gradient(implementation):
    """bfloat16 rows, a float32 weight: products of rounded numbers, but sums that no rounding has touched."""
    x, w, dy = draw(T)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    sizes = SIZES["uneven"]
    y, dx, dw = compiled(implementation, 1)(x, w, np.array(sizes, np.int32), dy)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    x, dy = (np.asarray(a, np.float64) for a in (x, dy))
    cast = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    right = definition(x, cast, sizes), *definition_gradients(x, cast, sizes, dy)
    for found, wanted in zip((y, dx), right, strict=False):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=1.01 * 2**-8, atol=1e-5)
    np.testing.assert_allclose(dw, right[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["c", "blocks"])
def test_weights_are_taken_as_they_are_stored(implementation):
    """A layer of a stack, scaled blocks, and further axes: as the array that they stand for."""
    x, w, dy = draw(T)
    sizes = np.array(SIZES["uneven"], np.int32)
    run, stack = compiled(implementation, 1), jnp.stack([0 * w, w, 2 * w])
    y, dx, dw = run(x, w, sizes, dy)
    found, dx_found, dstack = run(x, InStack(stack, jnp.int32(1)), sizes, dy)
    for mine, right in ((found, y), (dx_found, dx), (dstack.stack[1], dw)):
        np.testing.assert_array_equal(mine, right)
    assert not np.any(dstack.stack[0]) and not np.any(dstack.stack[2])
    w_ED2H = w.reshape(E, D, 2, -1)
    found, _, dw_ED2H = run(x, w_ED2H, sizes, dy.reshape(T, 2, -1))
    np.testing.assert_array_equal(found.reshape(T, F), y)
    np.testing.assert_array_equal(dw_ED2H.reshape(w.shape), dw)
    scaled = BlockScaled(*jax.vmap(quantise)(jnp.asarray(w)))
    y, dx, _ = run(x, scaled.astype(jnp.float32), sizes, dy)
    product = functools.partial(grouped_matmul, group_sizes_E=jnp.asarray(sizes), implementation=implementation)
    found, pullback = jax.vjp(lambda x: product(x, scaled), jnp.asarray(x))
    np.testing.assert_allclose(found, y, atol=1e-6)
    np.testing.assert_allclose(pullback(jnp.asarray(dy))[0], dx, atol=1e-6)


@pytest.mark.parametrize(("rows", "groups"), [(1, 8), (64, 8), (1000, 16), (10**6, 8), (5, 1)])
def test_rows_of_a_block_are_a_power_of_two_below_the_mean_group(rows, groups):
    facts = {"rows": rows, "groups": groups, "widths": (D, F)}
    block = choose("grouped_matmul", Target("cpu"), jnp.bfloat16, **facts).rows
    assert block & (block - 1) == 0 and 1 <= block <= 64
    mean = max(1, rows / groups)
    assert block <= mean and (block == 64 or block > mean / 4 - 1)  # on a CPU, near half the mean
    assert choose("grouped_matmul", Target("cpu"), jnp.bfloat16, implementation="ragged_dot", **facts).rows == 1


@pytest.mark.parametrize("hidden", [100, 96])
def test_tiles_panels_and_chunks_of_the_c_kernel(hidden):
    """Sizes around its 12 × 32 tiles, 192-row chunks, the 48 rows up to which whole panels are not packed and the
    threads' threshold, against float64."""
    rng = np.random.default_rng(0)
    rows, width = 450, 70
    sizes = np.array([0, 1, 12, 205, 0, 13, 48, 49, 100, 0], np.int32)
    shapes = ((rows, width), (len(sizes), width, hidden), (rows, hidden))
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    results = compiled("c", 1)(x, w, sizes, dy)
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    for value, right in zip(results, (definition(x, w, sizes), *definition_gradients(x, w, sizes, dy)), strict=True):
        assert np.linalg.norm(value - right) < 1e-6 * np.linalg.norm(right)
        np.testing.assert_array_equal(np.asarray(value)[right == 0], 0)  # rows and groups without tokens


def test_the_c_kernel_refuses_other_dtypes():
    x, w = jnp.zeros((4, D), jnp.bfloat16), jnp.zeros((E, D, F), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"implementation='c' of grouped_matmul cannot run.*float32, not bfloat16"):
        grouped_matmul(x, w, jnp.zeros(E, jnp.int32), implementation="c")


def test_shapes_that_do_not_fit_are_refused():
    x, w, sizes = jnp.zeros((6, D)), jnp.zeros((E, D, F)), jnp.zeros(E, jnp.int32)
    with pytest.raises(ValueError, match=r"T=6.*aligned=4"):
        grouped_matmul(x, w, sizes, aligned=4)
    unchecked = inspect.unwrap(grouped_matmul)  # users have no type checker in front of it
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(5, 7, 6\)"):
        unchecked(jnp.zeros((6, D + 1)), w, sizes)
    with pytest.raises(ValueError, match=r"\(4,\).*5 groups"):
        unchecked(x, w, sizes[:4])

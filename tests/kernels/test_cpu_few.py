"""What decoding does on a CPU by the C kernels: products of few rows, attention over pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import InStack, Target, Visible, choose, cpu, gqa_decode, mla_decode, product

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
CPU = Target.parse("cpu")


def numbers(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(equation, x, w):
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)  # noqa: E731
    return np.einsum(equation, wide(x), wide(w))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "equation, shape", [("bd,df->bf", (64, 160)), ("bd,fd->bf", (96, 64)), ("bd,dhn->bhn", (32, 3, 32))]
)
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_products_of_few_rows(dtype, equation, shape, rows):
    w = numbers(1, *shape, dtype=dtype)
    x = numbers(2, rows, shape[1] if equation.startswith("bd,fd") else shape[0])
    y = product(equation, x, w, target=CPU, implementation="c_few")
    np.testing.assert_allclose(y, exact(equation, x, w), rtol=1e-5, atol=1e-5)
    # A row's numbers are the same whatever stands beside it.
    alone = product(equation, x[-1:], w, target=CPU, implementation="c_few")
    np.testing.assert_array_equal(y[-1:], alone)


def test_float32_rows_stay_float32_beside_bfloat16():
    """Times one they come out bit for bit, whatever a processor splits them into; what is infinite stays so."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 64)) * 10.0 ** rng.integers(-30, 30, (20, 64))
    x[0, :4] = 0, 3.4028235e38, -3.4028235e38, 1e-20
    x = jnp.asarray(x, jnp.float32)
    one = jnp.eye(64, dtype=jnp.bfloat16)
    for equation in ("bd,df->bf", "bd,fd->bf"):
        np.testing.assert_array_equal(product(equation, x, one, target=CPU, implementation="c_few"), x)
        beyond = jnp.ones((3, 64)).at[0, 7].set(jnp.inf).at[1, 7].set(jnp.nan)
        y = product(equation, beyond, one + 1, target=CPU, implementation="c_few")
        np.testing.assert_array_equal(y[:, 0], [jnp.inf, jnp.nan, 65])


def test_a_layer_of_a_stack_and_gradients():
    stack, x = numbers(1, 3, 64, 96), numbers(2, 4, 64)
    y = jax.jit(lambda layer: product("bd,df->bf", x, InStack(stack, layer), implementation="c_few"))(2)
    np.testing.assert_allclose(y, exact("bd,df->bf", x, stack[2]), rtol=1e-5, atol=1e-5)
    loss = lambda x, w, how: jnp.sum(product("bd,df->bf", x, w, implementation=how) ** 2)  # noqa: E731
    few, dot = (jax.grad(loss, (0, 1))(x, stack[0], how) for how in ("c_few", "dot"))
    for mine, theirs in zip(few, dot, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_when_it_is_chosen():
    def of(rows, stored, widths=(64, 64), **facts):
        return choose("product", CPU, jnp.float32, lying=(rows, widths, jnp.dtype(stored)), **facts).name

    assert of(16, "float32") == of(400, "bfloat16") == "c_few"
    assert of(400, "float32") == of(16, "float32", (64, 20)) == "c"
    assert of(16, "float32", devices=2) == "dot"


def paged_case(seed, heads, groups, width, entry, queries=1):
    rng = np.random.default_rng(seed)
    B, P, N, J = 3, 12, 8, 4
    q = numbers(seed, B, queries, heads, width)
    pages = numbers(seed + 1, P, N, entry)
    lengths = np.array([1, 13, 32]) + queries - 1
    lengths = np.minimum(lengths, J * N)
    table = rng.permutation(P).reshape(B, J)
    table[0, 1:] = -1
    positions = lengths[:, None] - queries + np.arange(queries)
    return (
        q,
        pages,
        Visible(
            q_positions_BS=jnp.asarray(positions, jnp.int32),
            lengths_B=jnp.asarray(lengths, jnp.int32),
            pages_BJ=jnp.asarray(table, jnp.int32),
        ),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads, groups, queries", [(6, 2, 1), (9, 3, 3), (4, 4, 1), (14, 1, 2)])
def test_grouped_queries_over_pages(heads, groups, queries, dtype):
    q, pages, visible = paged_case(3, heads, groups, 32, 2 * groups * 32, queries)
    pages = pages.astype(dtype)
    attend = lambda how: gqa_decode(q, pages, visible, 0.2, groups=groups, target=CPU, implementation=how)  # noqa: E731
    np.testing.assert_allclose(attend("c"), attend("reference"), rtol=1e-5, atol=1e-6)
    rows = dataclasses.replace(visible, pages_BJ=None)
    side = pages[jnp.clip(visible.pages_BJ, 0)].reshape(3, 32, -1)
    found = gqa_decode(q, side, rows, 0.2, groups=groups, target=CPU, implementation="c")
    np.testing.assert_allclose(found, attend("c"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_over_pages(dtype):
    q, pages, visible = paged_case(5, 5, 1, 96, 96)
    pages = pages.astype(dtype)
    attend = lambda how: mla_decode(q, pages, visible, 0.2, values=64, target=CPU, implementation=how)  # noqa: E731
    np.testing.assert_allclose(attend("c"), attend("reference"), rtol=1e-5, atol=1e-6)
    stack = jnp.stack([pages + 1, pages])
    found = jax.jit(lambda layer: mla_decode(q, InStack(stack, layer), visible, 0.2, values=64, implementation="c"))(1)
    np.testing.assert_array_equal(found, attend("c"))

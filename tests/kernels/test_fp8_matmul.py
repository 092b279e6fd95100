"""Products with FP8 weights against float64: on a Hopper with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import functools
import logging
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_kernels import (
    BlockScaled,
    InStack,
    Target,
    fp8_matmul,
    grouped_matmul,
    hopper_quantise,
    product,
    quantise,
    registry,
    routed_experts,
)
from deepseek_kernels.block_fp8 import FP8, quantise_rows
from deepseek_kernels.fp8_on_hopper import laid_out

ON_GPU = jax.default_backend() == "gpu"
TARGET = Target("cuda", "9.0", 0 if ON_GPU else 2)  # two blocks in the interpreter
E, D, F = 4, 256, 320
ROUNDED = 1.01 * 2**-8  # half a unit of bfloat16


def weight(*shape, groups=((1, 128), (1, 128)), seed=0):
    """Of further axes in front: a matrix each, whose blocks' sizes differ by powers of ten."""
    lead = len(shape) - sum(axes for axes, _ in groups)
    rng = np.random.default_rng(seed)
    depth = math.prod(shape[lead : lead + groups[0][0]])
    w = rng.standard_normal((math.prod(shape[:lead]), depth, math.prod(shape[lead:]) // depth))
    w *= 10.0 ** rng.integers(-2, 3, (1, depth // 128, 1)).repeat(128, 1)
    values, scales = jax.vmap(quantise)(jnp.asarray(w, jnp.float32))
    scale_axes = [-(-size // block) for size, (_, block) in zip(_sizes(shape[lead:], groups), groups, strict=True)]
    return BlockScaled(values.reshape(shape), scales.reshape(*shape[:lead], *scale_axes), groups)


def _sizes(shape, groups):
    ends = np.cumsum([axes for axes, _ in groups])
    return [math.prod(shape[end - axes : end]) for end, (axes, _) in zip(ends, groups, strict=True)]


def spelled_out(w):
    return np.asarray(w.astype(jnp.float32), np.float64)


def in_fp8(x):
    """The rows in 64 bits, as 128 numbers at a time are rounded to e4m3."""
    x = np.asarray(x, np.float64).reshape(len(x), -1, 128)
    scale = np.abs(x).max(2, keepdims=True) / 448
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return ((x / scale).astype(np.float32).astype(FP8).astype(np.float64) * scale).reshape(len(x), -1)


def rows(count, width=D, seed=1):
    x = np.random.default_rng(seed).standard_normal((count, width))
    x[::7] *= 1e4
    x[3::11] = 0
    return jnp.asarray(x, jnp.bfloat16)


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_rows_are_rounded_by_128_numbers(seed, count):
    x = rows(count, seed=seed)
    x8, scale = quantise_rows(x)
    scale_TD = np.repeat(np.asarray(scale.T, np.float64), 128, axis=1)
    found, x = np.asarray(x8, np.float64) * scale_TD, np.asarray(x, np.float64)
    # Half of the distance of two numbers of e4m3, of the smallest too.
    assert np.all(np.abs(found - x) <= np.maximum(1.001 * 2**-4 * np.abs(x), 1.001 * 2**-10 * scale_TD))
    # A quotient in float32 may fall to the other side of a tie.
    assert np.mean(~np.isclose(found, in_fp8(x), rtol=1e-6, atol=0)) < 0.01
    assert x8.dtype == FP8 and scale.shape == (D // 128, count)


def test_the_kernel_that_rounds_rows_equals_the_plain_one(hopper_registers):
    x = rows(192, 384)
    for found, right in zip(jax.jit(hopper_quantise.quantise_rows)(x), jax.jit(quantise_rows)(x), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(right, np.float32))


@pytest.mark.parametrize("groups", [((1, 128), (1, 1), (1, 128)), ((2, 128), (1, 128))])
def test_a_weight_is_the_same_with_its_terms_last(groups):
    w = (
        weight(3, 2, 128, 128, groups=groups)
        if groups[0][0] == 2
        else weight(3, 256, 2, 128, groups=((1, 128), (2, 128)))
    )
    laid = w.with_terms_last()
    assert laid.shape == w.shape and laid.values.shape != w.shape and laid.with_terms_last() is laid
    np.testing.assert_array_equal(laid.astype(jnp.float32), w.astype(jnp.float32))
    np.testing.assert_array_equal(laid[1].astype(jnp.float32), w.astype(jnp.float32)[1])
    assert laid_out(w, TARGET).terms_last and laid_out(w, Target("cpu")) is w
    back = laid.with_terms_last(False)
    assert jax.tree.structure(back) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, back, w)


def test_the_reference_is_the_definition():
    """A scale of x for 128 numbers of a row, one of w for 128 × 128, products of what is left."""
    x, w = rows(20), weight(D, F)
    w8, scales = np.asarray(w.values, np.float64), np.asarray(w.scales, np.float64)
    right = np.zeros((20, F))
    for k in range(D // 128):
        terms = slice(128 * k, 128 * (k + 1))
        right += in_fp8(x)[:, terms] @ w8[terms] * scales[k].repeat(128)[:F]
    found = np.asarray(fp8_matmul(x, w, implementation="reference"), np.float64)
    assert np.linalg.norm(found - right) < 3e-3 * np.linalg.norm(right)


@functools.cache
def grouped(implementation, aligned):
    run = functools.partial(grouped_matmul, aligned=aligned, target=TARGET, implementation=implementation)
    return jax.jit(lambda x, stack, sizes: run(x, InStack(stack, jnp.int32(1)), sizes))


@pytest.mark.parametrize("implementation", ["hopper", "hopper_fp8"])
@pytest.mark.parametrize("laid", [False, True], ids=["terms first", "terms last"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 130), min_size=E, max_size=E))
def test_groups_of_any_size(hopper_registers, implementation, laid, sizes):
    """Groups without rows, of one, of more than a tile, and rows of no group; a layer of a stack, by its number."""
    x = rows(sum(sizes) + 5 if sum(sizes) < 200 else 600)[:600]
    x = jnp.pad(x, ((0, 600 - len(x)), (0, 0)))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight(E, D, F, seed=i) for i in range(2)))
    found = grouped(implementation, 1)(x, stack.with_terms_last(laid), np.array(sizes, np.int32))
    check(found, x, spelled_out(stack[1]), sizes, implementation)


@pytest.mark.parametrize("implementation", ["hopper", "hopper_fp8"])
@pytest.mark.parametrize(
    ("aligned", "sizes", "count"),
    [(16, [16, 0, 32, 16], 96), (32, [0, 64, 0, 32], 96), (16, [0] * 4, 32), (128, [0, 384, 0, 0], 512)],
)
def test_groups_on_whole_tiles(hopper_registers, implementation, aligned, sizes, count):
    x = rows(count)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight(E, D, F, seed=i) for i in range(2)))
    found = grouped(implementation, aligned)(x, stack.with_terms_last(), np.array(sizes, np.int32))
    check(found, x, spelled_out(stack[1]), sizes, implementation)


def check(found, x, w, sizes, implementation):
    if implementation == "hopper_fp8":
        x8, scale = quantise_rows(x)
        x = np.asarray(x8, np.float64) * np.repeat(np.asarray(scale.T, np.float64), 128, axis=1)
    x = np.asarray(x, np.float64)
    found, start = np.asarray(found, np.float64), 0
    for e, size in enumerate(sizes):
        mine = slice(start, start := start + size)
        right = x[mine] @ w[e]
        # The scale of a row's largest product bounds what the tensor cores' own sums of FP8 lose; float32 sums less.
        room = 2**-12 if implementation == "hopper_fp8" else 2**-20
        atol = room * np.abs(x[mine]) @ np.abs(w[e]) + 1e-30
        assert np.all(np.abs(found[mine] - right) <= ROUNDED * np.abs(right) + atol)
    assert not found[start:].any()


@pytest.mark.parametrize("implementation", ["hopper", "hopper_fp8"])
@pytest.mark.parametrize(
    ("equation", "count", "shape", "groups"),
    [
        ("bsd,df->bsf", (3, 7), (256, 320), ((1, 128), (1, 128))),
        ("...d,dgf->...gf", (2, 50), (256, 2, 128), ((1, 128), (1, 1), (1, 128))),
        ("bsd,df->bsf", (1, 3), (256, 128), ((1, 128), (1, 128))),
        ("bshv,hvd->bsd", (1, 200), (2, 128, 192), ((2, 128), (1, 128))),
    ],
)
def test_dense_products(hopper_registers, implementation, equation, count, shape, groups):
    w = weight(*shape, groups=groups)
    x = rows(math.prod(count), 256).reshape(*count, *(shape[:2] if groups[0][0] == 2 else shape[:1]))
    run = jax.jit(functools.partial(product, equation, target=TARGET, fp8=implementation))
    found = run(x, w.with_terms_last())
    assert found.dtype == jnp.bfloat16
    flat = x.reshape(-1, 256)
    check(found.reshape(len(flat), -1), flat, spelled_out(w).reshape(1, 256, -1), [len(flat)], implementation)
    layer = InStack(jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), w), jnp.int32(1))
    np.testing.assert_array_equal(run(x, layer), found)


@pytest.mark.parametrize("options", [{"dtype": jnp.float32}, {"precision": "highest"}], ids=str)
def test_another_dtype_or_precision_is_a_product_of_the_dequantised_weight(options):
    """The kernels round to x's dtype."""
    x, w = rows(16), weight(D, F)
    found, right = (product("td,df->tf", x, w, target=TARGET, **options) for w in (w, w.astype(x.dtype)))
    assert found.dtype == options.get("dtype", x.dtype)
    np.testing.assert_array_equal(found, right)


def test_the_gradient_of_the_rows(hopper_registers):
    x, w = rows(20), weight(D, F)
    dy = rows(20, 384)[:, :F]
    _, pullback = jax.vjp(lambda x: fp8_matmul(x, w, target=TARGET, implementation="hopper_fp8"), x)
    right = np.asarray(dy, np.float64) @ spelled_out(w).T
    assert np.linalg.norm(np.asarray(pullback(dy)[0], np.float64) - right) < 5e-3 * np.linalg.norm(right)


@pytest.mark.parametrize(("grouped", "error"), [("hopper", 1e-2), ("hopper_fp8", 6e-2)])
def test_experts(hopper_registers, grouped, error):
    rng, tokens = np.random.default_rng(0), 40
    wi, wo = weight(E, 256, 2, 256, groups=((1, 128), (1, 1), (1, 128))), weight(E, 256, 256)
    x = jnp.asarray(rng.standard_normal((tokens, 256)), jnp.bfloat16)
    chosen = jnp.asarray(rng.integers(0, E - 1, (tokens, 1)), jnp.int32)
    operands = jnp.ones((tokens, 1)), chosen, wi, wo
    found = routed_experts(x, *operands, target=TARGET, grouped=grouped)
    right = np.zeros((tokens, 256))
    for t, e in enumerate(np.asarray(chosen)[:, 0]):
        gate, up = (np.asarray(x[t], np.float64) @ spelled_out(wi)[e, :, i] for i in range(2))
        right[t] = gate * (1 + np.tanh(gate / 2)) / 2 * up @ spelled_out(wo)[e]
    assert np.linalg.norm(np.asarray(found, np.float64) - right) < error * np.linalg.norm(right)


@pytest.mark.parametrize("implementation", ["hopper", "hopper_fp8"])
@pytest.mark.parametrize("aligned", [16, 128])
def test_no_copy_of_the_weight_and_lowered_for_cuda_without_a_gpu(implementation, aligned):
    """At V3's sizes; any jax that the package allows takes the kernels through Mosaic GPU's passes."""
    shape = jax.ShapeDtypeStruct
    w = BlockScaled(shape((8, 4096, 7168), FP8), shape((8, 32, 56), jnp.float32), terms_last=True)
    operands = shape((1024, 7168), jnp.bfloat16), w, shape((8,), jnp.int32)
    run = functools.partial(
        grouped_matmul, aligned=aligned, target=Target("cuda", "9.0"), implementation=implementation
    )
    traced = jax.jit(run).trace(*operands)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    for line in text.splitlines():
        assert "4096x7168xbf16" not in line and "4096x7168xf32" not in line
        assert "stablehlo.transpose" not in line or "f8E4M3" not in line


@pytest.mark.parametrize("tokens", [1, 64, 256])
@pytest.mark.parametrize("scanned", [False, True])
def test_no_copy_of_the_experts_in_any_step(tokens, scanned):
    """V2-Lite's, six choices a token, on both sides of what counts as few rows; by themselves and in a stack."""
    shape, gate_up = jax.ShapeDtypeStruct, ((1, 128), (1, 1), (1, 128))
    lead = (3, 64) if scanned else (64,)
    wi = BlockScaled(shape((*lead, 2, 1408, 2048), FP8), shape((*lead, 2, 11, 16), jnp.float32), gate_up, True)
    wo = BlockScaled(shape((*lead, 2048, 1408), FP8), shape((*lead, 16, 11), jnp.float32), terms_last=True)
    x, chosen = shape((tokens, 2048), jnp.bfloat16), shape((tokens, 6), jnp.int32)

    def run(x, weights, chosen, *matrices):
        matrices = [InStack(w, jnp.int32(1)) for w in matrices] if scanned else matrices
        return routed_experts(x, weights, chosen, *matrices, target=Target("cuda", "9.0", 132))

    traced = jax.make_jaxpr(run)(x, shape((tokens, 6), jnp.float32), chosen, wi, wo)
    made = [(math.prod(a.shape), a.dtype) for a in results(traced.jaxpr)]
    assert max(size for size, dtype in made if dtype in (jnp.bfloat16, jnp.float32)) < 64 * 2048 * 1408


def results(jaxpr):
    """Of every equation, of inner programs too, but not of kernels, what it makes."""
    for equation in jaxpr.eqns:
        yield from (var.aval for var in equation.outvars if hasattr(var.aval, "dtype"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from results(inner)


def test_what_does_not_fit_is_named(caplog):
    x = rows(4)
    run = functools.partial(fp8_matmul, target=TARGET)
    with pytest.raises(ValueError, match=r"w \(256, 320\) of bfloat16: expected an FP8 weight"):
        run(x, jnp.zeros((256, 320), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"x \(4, 128\) and w \(256, 320\): expected \(…, 256\)"):
        run(x[:, :128], weight(D, F))
    with pytest.raises(ValueError, match=r"'hopper_fp8' of fp8_matmul cannot run.*D of a multiple of 128, F of that"):
        run(x, weight(D, 328), implementation="hopper_fp8")
    ragged = BlockScaled(jnp.zeros((256, 2, 72), FP8), jnp.ones((2, 2, 1)), ((1, 128), (1, 1), (1, 128)))
    with pytest.raises(ValueError, match="it needs blocks of 128 × 128 of a matrix"):
        run(x, ragged, implementation="hopper")
    with pytest.raises(ValueError, match="'hopper_fp8' of grouped_matmul cannot run.*a weight in FP8"):
        grouped_matmul(x, jnp.zeros((1, D, F)), jnp.array([4]), target=TARGET, implementation="hopper_fp8")
    registry.say.cache_clear()
    with caplog.at_level(logging.INFO, "deepseek_kernels"):
        dequantised = fp8_matmul(x, weight(D, F), target=Target("cuda", "8.0"))
    assert "fp8_matmul in bfloat16 on cuda:8.0: dequantised, not hopper" in caplog.text
    right = x @ weight(D, F).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantised, right)

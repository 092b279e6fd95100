"""Weights in int8 and int4 against numpy: on a Hopper with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import BlockScaled, InStack, Target, grouped_matmul, integers, product, routed_experts
from deepseek_kernels.integers import DTYPES, pack, quantise_groups, unpack

ON_GPU = jax.default_backend() == "gpu"
TARGET = Target("cuda", "9.0", 0 if ON_GPU else 2)  # two blocks in the interpreter
CPU, A100 = Target("cpu"), Target("cuda", "8.0")
ROUNDED = 1.01 * 2**-8  # half a unit of bfloat16
BITS = pytest.mark.parametrize("bits", [8, 4])


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))


@functools.cache
def weight(bits, *shape, group=128, seed=0):
    """(…, D, F) or (E, D, 2, F)."""
    w = jnp.asarray(draw(*shape, seed=seed), jnp.float32)
    flat = w.reshape(-1, *shape[1:2], math.prod(shape[2:])) if len(shape) > 2 else w[None]
    values, scales = jax.vmap(functools.partial(quantise_groups, bits=bits, group=group))(flat)
    groups = ((1, group), *((1, 1),) * max(1, len(shape) - 2))
    lead = shape[:1] if len(shape) > 2 else ()
    return BlockScaled(values.reshape(shape), scales.reshape(*lead, -1, *shape[len(lead) + 1 :]), groups)


def spelled_out(w):
    return np.asarray(w.astype(jnp.float32), np.float64)


@BITS
@pytest.mark.parametrize("group", [32, 128])
def test_quantise_is_the_best_of_the_scales_that_it_tries(bits, group):
    w = draw(200, 3).astype(np.float32)
    w[:group, 1] = 0
    values, scales = (np.asarray(a, np.float32) for a in quantise_groups(jnp.asarray(w), bits, group))
    assert scales.shape == (-(-200 // group), 3)
    for k in range(len(scales)):
        for f in range(3):
            part, tried = w[group * k : group * (k + 1), f], []
            for most in (127,) if bits == 8 else (7, 7.5, 8, 8.75, 9.5, 10.5):
                scale = np.float32(jnp.bfloat16(np.abs(part).max() / most)) or np.float32(1)
                whole = np.clip(np.round(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                tried.append(np.sum((whole * scale - part) ** 2))
            found = values[group * k : group * (k + 1), f] * scales[k, f]
            np.testing.assert_allclose(np.sum((found - part) ** 2), min(tried), rtol=1e-4, atol=1e-9)
    on_host = quantise_groups(w, bits, group, xp=np)
    np.testing.assert_array_equal(np.asarray(on_host[0], np.float32), values)
    with pytest.raises(ValueError, match="bits=5: expected one of 8, 4"):
        quantise_groups(w, 5)


@BITS
def test_packed_numbers_lie_from_the_lowest_bits_on_with_half_the_range_added(bits):
    q = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 37)).astype(np.int8)
    packed, each = pack(q.astype(DTYPES[bits]), bits), 32 // bits
    assert packed.dtype == np.int32 and packed.shape == (3, -(-37 // each))
    for i, row in enumerate(q):
        for j, number in enumerate(row):
            word = int(packed[i, j // each]) & 0xFFFFFFFF
            assert (word >> bits * (j % each)) % 2**bits == int(number) + 2 ** (bits - 1)
    np.testing.assert_array_equal(unpack(packed, bits, 37).astype(np.int8), q)


@BITS
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("target", "dtype", "fp8"), [(CPU, "float32", "c"), (CPU, "float32", "dequantised"), (A100, "bfloat16", "auto")]
)
def test_dense_products(monkeypatch, bits, group, target, dtype, fp8):
    """Of a ragged last group, in parts, and of a layer of a stack."""
    if fp8 == "c" and not integers.cpu.available():
        pytest.skip("no C compiler")
    monkeypatch.setattr(integers, "_TILE", 576 * 40)
    w = weight(bits, 3, 576, 120, group=group)
    for count in (1, 2, 7):
        x = jnp.asarray(draw(count, 576, seed=1), dtype)
        right = np.asarray(x, np.float64) @ spelled_out(w)[1]
        for stored in (w[1].with_terms_last(), InStack(w.with_terms_last(), jnp.int32(1))):
            run = jax.jit(functools.partial(product, "td,df->tf", target=target, fp8=fp8))
            found = np.asarray(run(x, stored), np.float64)
            room = 1e-5 if dtype == "float32" else 2 * ROUNDED
            assert np.all(np.abs(found - right) <= room * np.abs(np.asarray(x, np.float64)) @ np.abs(spelled_out(w)[1]))


@BITS
@pytest.mark.parametrize(
    ("target", "dtype", "name"),
    [(CPU, "float32", "c_integers"), (CPU, "float32", "by_matrix"), (A100, "bfloat16", "auto")],
)
def test_grouped_products(bits, target, dtype, name):
    w, sizes = weight(bits, 3, 576, 120), [5, 0, 9]
    x = jnp.asarray(draw(20, 576, seed=1), dtype)
    stack = jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), w.with_terms_last())
    ends = np.cumsum([0, *sizes])
    rows = np.asarray(x, np.float64)
    right = np.concatenate([rows[a:b] @ m for a, b, m in zip(ends[:-1], ends[1:], spelled_out(w), strict=True)])
    for stored in (w, w.with_terms_last(), InStack(stack, jnp.int32(1))):
        run = functools.partial(grouped_matmul, target=target, implementation=name)
        if name == "c_integers" and stored is w:  # a copy
            with pytest.raises(ValueError, match="it needs terms last"):
                run(x, stored, jnp.array(sizes, jnp.int32))
            continue
        found = np.asarray(jax.jit(run)(x, stored, np.array(sizes, np.int32)), np.float64)
        np.testing.assert_allclose(found[:14], right, atol=1e-2 * np.abs(right).max() if dtype == "bfloat16" else 1e-3)
        assert not found[14:].any()


@BITS
@pytest.mark.parametrize(
    ("aligned", "sizes", "count"), [(16, [16, 0, 32], 64), (32, [0, 64, 0], 96), (128, [0, 128, 0], 256)]
)
def test_groups_on_hopper(hopper_registers, bits, aligned, sizes, count):
    """Few rows and many, groups without any, rows of no group; a layer of a stack."""
    w, x = weight(bits, 3, 256, 320), jnp.asarray(draw(count, 256, seed=1), jnp.bfloat16)
    stack = jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), w.with_terms_last())
    run = functools.partial(grouped_matmul, aligned=aligned, target=TARGET, implementation="hopper")
    found = np.asarray(jax.jit(run)(x, InStack(stack, jnp.int32(1)), np.array(sizes, np.int32)), np.float64)
    start = 0
    for matrix, size in zip(spelled_out(w), sizes, strict=True):
        check(found[start : start + size], np.asarray(x, np.float64)[start : start + size], matrix)
        start += size
    assert not found[start:].any()


@BITS
@pytest.mark.parametrize("rows", [1, 20, 130])
def test_dense_products_on_hopper(hopper_registers, bits, rows):
    w, x = weight(bits, 384, 320), jnp.asarray(draw(rows, 384, seed=1), jnp.bfloat16)
    found = jax.jit(functools.partial(product, "td,df->tf", target=TARGET, fp8="hopper"))(x, w.with_terms_last())
    check(np.asarray(found, np.float64), np.asarray(x, np.float64), spelled_out(w))


def check(found, x, w):
    """Products are exact, sums float32, and the result is rounded once."""
    right = x @ w
    assert np.all(np.abs(found - right) <= ROUNDED * np.abs(right) + 2**-20 * np.abs(x) @ np.abs(w))


@BITS
@pytest.mark.parametrize("target", [CPU, A100], ids=str)
def test_experts(bits, target):
    wi, wo = weight(bits, 4, 64, 2, 96, group=32), weight(bits, 4, 96, 64, group=32)
    x = jnp.asarray(draw(6, 64, seed=1), jnp.float32)
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, 4, (6, 2)), jnp.int32)
    found = routed_experts(x, jnp.ones((6, 2)), chosen, wi.with_terms_last(), wo.with_terms_last(), target=target)
    plain = routed_experts(
        x, jnp.ones((6, 2)), chosen, *(w.astype(jnp.float32) for w in (wi, wo)), implementation="plain"
    )
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4 * float(jnp.abs(plain).max()))


@BITS
@pytest.mark.parametrize("aligned", [16, 128])
def test_no_copy_of_the_weight_and_lowered_for_cuda_without_a_gpu(bits, aligned):
    """At V3's sizes; any jax that the package allows takes the kernels through Mosaic GPU's passes."""
    shape = jax.ShapeDtypeStruct
    scales = shape((8, 56, 4096), jnp.bfloat16)
    w = BlockScaled(shape((8, 4096, 7168), DTYPES[bits]), scales, ((1, 128), (1, 1)), terms_last=True)
    run = functools.partial(grouped_matmul, aligned=aligned, target=Target("cuda", "9.0"))
    traced = jax.jit(run).trace(shape((1024, 7168), jnp.bfloat16), w, shape((8,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "4096x7168xbf16" not in text and "4096x7168xf32" not in text


def test_what_does_not_fit_is_named():
    x = jnp.zeros((4, 576), jnp.bfloat16)
    with pytest.raises(
        ValueError, match="'hopper' of fp8_matmul cannot run .* it needs groups of 128, D of a multiple"
    ):
        product("td,df->tf", x, weight(8, 3, 576, 120)[0], target=TARGET, fp8="hopper")
    with pytest.raises(ValueError, match="'hopper_fp8' of fp8_matmul cannot run .* in FP8, not in integers"):
        product("td,df->tf", x, weight(8, 3, 576, 120)[0], target=TARGET, fp8="hopper_fp8")

"""What a cache holds in FP8, how tokens come into rows and pages, and attention over both in plain XLA."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paged import in_pages

from deepseek_kernels import (
    FP8Entries,
    InStack,
    Target,
    Visible,
    choose,
    gqa_attention,
    mla_attention,
    mla_decode,
    quantise_entries,
    registry,
    write_entries,
)

C, R, N = 256, 8, 4  # latent, rotated part, tokens of a page
B, J = 3, 5
FP8 = ml_dtypes.float8_e4m3fn


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(entry):
    """Number by number, in float64 -> what FP8 makes of the entries, and each group's scale."""
    groups = entry[..., :C].astype(np.float64).reshape(*entry.shape[:-1], C // 128, 128)
    largest = np.abs(groups).max(-1, keepdims=True)
    scale = 2.0 ** np.clip(np.ceil(np.log2(np.where(largest > 0, largest, 448) / 448)), -15, 7)
    numbers = np.clip(groups / scale, -448, 448).astype(FP8).astype(np.float64) * scale
    rope = entry[..., C:].astype(ml_dtypes.bfloat16).astype(np.float64)
    return np.concatenate([numbers.reshape(*entry.shape[:-1], C), rope], axis=-1), scale[..., 0]


@given(st.lists(st.floats(-24, 20), min_size=6, max_size=6))
@example([0, np.log2(448), -15, 20, -30, 8.807])
def test_fp8_is_the_nearest_number_and_exact_in_16_bits(exponents):
    """Groups of any size, of zeros, and with a largest number that is a scale times 448 itself."""
    entry = normal(0, 2, 3, C + R)
    entry[..., :C] *= np.repeat(2.0 ** np.array(exponents).reshape(3, 2), 128, axis=1)
    entry[1, 0, :128], entry[1, 1, 5] = 0, 448 * 2.0**3
    kept = quantise_entries(jnp.asarray(entry, jnp.bfloat16), C)
    right, scales = quantised(np.asarray(jnp.asarray(entry, jnp.bfloat16), np.float64))
    assert (kept.shape, kept.values.dtype, kept.scales.dtype) == (entry.shape, FP8, jnp.bfloat16)
    np.testing.assert_array_equal(np.swapaxes(np.asarray(kept.scales, np.float64), -1, -2), scales)
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(np.asarray(kept.astype(dtype), np.float64), right)
    halves = np.asarray(kept.astype(jnp.float16)[..., :C], np.float64)
    np.testing.assert_array_equal(halves, right[..., :C])


@functools.cache
def write():
    return jax.jit(write_entries)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@given(st.lists(st.integers(-1, N * J), min_size=B, max_size=B), st.integers(0, 9))
@example([0, N - 1, N * J - 1], 0)
def test_tokens_come_behind_others(stacked, fp8, start, seed):
    """Two tokens of each row, over the end of a page too; none where table or row end, nothing elsewhere."""
    new = normal(1, B, 2, C + R)
    table = np.random.default_rng(seed).permutation(B * J + 2)[: B * J].reshape(B, J).astype(np.int32)
    table[2, 3:] = [-1, 99]
    pages, rows = normal(2, B * J + 2, N, C + R), normal(3, B, N * J, C + R)
    for kept, where in ((pages, jnp.asarray(table)), (rows, None)):
        expected = kept.copy()
        for b, s in np.ndindex(B, 2):
            t = start[b] + s
            page, place = (b, t) if where is None else (table[b, np.clip(t // N, 0, J - 1)], t % N)
            if 0 <= t < N * J and 0 <= page < len(kept):
                expected[page, place] = new[b, s]
        cache = jnp.asarray(np.stack([kept * 0, kept]) if stacked else kept)
        cache, expected = (quantise_entries(cache, C), quantised(expected)[0]) if fp8 else (cache, expected)
        written = write()(InStack(cache, 1) if stacked else cache, jnp.asarray(new), jnp.array(start), where)
        assert isinstance(written, InStack) == stacked
        others = written.stack if stacked else None
        assert others is None or not np.any(jax.tree.map(lambda x: x[0], others).astype(jnp.float32))
        np.testing.assert_array_equal(np.asarray(written.astype(jnp.float32)), expected)


def decoded(q, rows, limits):
    """In float64, row after row: query s of row b sees the first ``limits[b][s]`` entries."""
    out = np.zeros((*q.shape[:3], C))
    for b, s in np.ndindex(q.shape[:2]):
        keys = rows[b, : max(limits[b][s], 0)].astype(np.float64)
        if len(keys):
            scores = q[b, s] @ keys.T * 0.1
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, s] = p / p.sum(-1, keepdims=True) @ keys[:, :C]
    return out


@functools.cache
def attend(implementation):
    return jax.jit(functools.partial(mla_decode, scale=0.1, values=C, implementation=implementation))


@pytest.mark.parametrize("fp8", [False, True])
def test_places_in_pages_are_said_to_differ(fp8):
    """Else XLA:GPU writes one number at a time, and bfloat16 by comparing and swapping the 32 bits around it."""
    pages = jnp.zeros((J, N, C + R), jnp.bfloat16)
    given = jnp.zeros((B, 2, C + R), jnp.bfloat16), jnp.zeros(B, jnp.int32), jnp.full((B, J), -1, jnp.int32)
    program = write().lower(quantise_entries(pages, C) if fp8 else pages, *given).as_text()
    scatters = [line for line in program.splitlines() if '"stablehlo.scatter"' in line]
    assert len(scatters) == (3 if fp8 else 1) and all("unique_indices = true" in line for line in scatters)


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("fp8", [False, True])
@given(st.lists(st.integers(0, N * J), min_size=B, max_size=B), st.integers(0, 99))
@example([1, N, N * J], 0)
def test_attention_over_pages(implementation, fp8, lengths, seed):
    """Pages in any order, the last of a row partly filled, one that two rows share, a layer of a stack; two tokens."""
    q, rows = normal(0, B, 2, 3, C + R), normal(1, 2, B, N * J, C + R)
    rows[:, 1, :N] = rows[:, 0, :N]
    pages, table = in_pages(rows, lengths, N, seed)
    lengths_B = jnp.array(lengths)
    seen = Visible(q_positions_BS=lengths_B[:, None] - 2 + jnp.arange(2), lengths_B=lengths_B)
    kept, rows = (quantise_entries(jnp.asarray(pages), C), quantised(rows)[0]) if fp8 else (jnp.asarray(pages), rows)
    limits = [[n - 1, n] for n in lengths]
    paged = dataclasses.replace(seen, pages_BJ=table)
    found = attend(implementation)(jnp.asarray(q), InStack(kept, 1), paged)
    np.testing.assert_allclose(found, decoded(q, rows[1], limits), rtol=0, atol=2e-5)
    layer = jax.tree.map(lambda x: x[1], kept)
    np.testing.assert_array_equal(attend(implementation)(jnp.asarray(q), layer, paged), found)


def test_pages_have_a_gradient():
    q, pages, table = normal(0, B, 1, 3, C + R), normal(1, B * J, N, C + R), np.arange(B * J).reshape(B, J)[:, ::-1]
    seen = Visible(lengths_B=jnp.array([1, 7, N * J]), causal=False)
    rows = jnp.asarray(pages)[table].reshape(B, N * J, C + R)
    loss = lambda kept, visible: jnp.sum(attend("blockwise")(jnp.asarray(q), kept, visible) ** 2)  # noqa: E731
    found = jax.grad(loss)(jnp.asarray(pages), dataclasses.replace(seen, pages_BJ=jnp.asarray(table.copy())))
    right = jax.grad(loss)(rows, seen).reshape(B, J, N, C + R)
    np.testing.assert_allclose(np.asarray(found)[table], right, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_with_its_shapes():
    q, pages, table = jnp.zeros((B, 1, 3, C + R)), jnp.zeros((7, N, C + R)), jnp.zeros((B, J), jnp.int32)
    paged = Visible(pages_BJ=table)
    decode = functools.partial(mla_decode, scale=0.1, values=C)
    with pytest.raises(ValueError, match=re.escape("cache (7, 4, 264), values=256: expected (B, S, H, W), (B, T, W)")):
        decode(q, pages, Visible())
    with pytest.raises(ValueError, match=re.escape("visible.pages_BJ (2, 5): expected (3, J)")):
        decode(q, pages, Visible(pages_BJ=table[:2]))
    with pytest.raises(ValueError, match=re.escape("with 128 in FP8, values=256")):
        decode(q, quantise_entries(pages, 128), paged)
    with pytest.raises(ValueError, match="only mla_decode reads keys from pages"):
        gqa_attention(q, pages[:B, :, None], pages[:B, :, None], paged, 0.1)
    with pytest.raises(ValueError, match="only mla_decode reads keys from pages"):
        mla_attention(q, jnp.zeros((B, N, 3, C + C)), pages[:B, :, :R], paged, 0.1)
    with pytest.raises(ValueError, match="values=100: FP8 needs a latent of a multiple of 128"):
        quantise_entries(pages, 100)
    with pytest.raises(ValueError, match=re.escape("cache (7, 4, 264), entries (3, 2, 264), start (3,), pages None")):
        write_entries(pages, jnp.zeros((B, 2, C + R)), jnp.zeros(B, jnp.int32))


def test_where_a_kernel_does_not_take_a_cache_it_says_so_before_compiling():
    facts = {"by_column": True, "queries": 1, "keys": 4096, "key_width": 576, "value_width": 512}
    narrow = facts | {"key_width": 192, "value_width": 128}
    registry.say.cache_clear()
    for chip, name in ((Target("cuda", "9.0", 132), "hopper"), (Target("tpu", "TPU v5p"), "tpu")):
        for page, fp8 in ((0, False), (64, False), (256, True)):
            choice = choose("mla_decode", chip, jnp.bfloat16, **facts, page=page, fp8=fp8)
            assert (choice.name, choice.reason) == (name, "")
        refused = choose("mla_decode", chip, jnp.bfloat16, **facts, page=16)
        assert refused.name == "blockwise" and f"not {name}: it needs pages of" in refused.reason
        assert "a copy of the rows' entries in bfloat16" in refused.reason
    with pytest.raises(ValueError, match="it needs values of 256 or 512 numbers in FP8"):
        choose("mla_decode", Target("cuda", "9.0"), jnp.bfloat16, implementation="hopper", **narrow, fp8=True)
    entries = FP8Entries(*(jnp.zeros(shape) for shape in ((2, 8, 128), (2, 1, 8), (2, 8, 64))))
    with pytest.raises(ValueError, match="it needs values of 256 or 512 numbers in FP8"):
        mla_decode(
            jnp.zeros((2, 1, 16, 192), jnp.bfloat16), entries, Visible(), 0.1, values=128,
            target=Target("cuda", "9.0"), implementation="hopper",
        )  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "c"])
def test_who_sees_nan_gets_nan_and_who_does_not_gets_none_of_it(implementation):
    """Rows of pages: the first sees it, the second has no page in one place of its table, where another's would do."""
    width, pages = 64, normal(3, 3, N, 64)
    pages[0, 1] = np.nan
    table, lengths = jnp.array([[0, 1], [2, -1]]), jnp.array([6, 3])
    visible = Visible(q_positions_BS=lengths[:, None] - 1, lengths_B=lengths, pages_BJ=table)
    query = jnp.asarray(normal(4, 2, 1, 2, width))
    options = {"values": 32, "target": Target("cpu"), "implementation": implementation}
    found = np.asarray(mla_decode(query, jnp.asarray(pages), visible, 0.1, **options))
    right = mla_decode(query, jnp.asarray(np.nan_to_num(pages)), visible, 0.1, **options)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], right[1])

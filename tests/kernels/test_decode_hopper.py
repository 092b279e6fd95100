"""Decoding's Hopper kernels against float32: on such a GPU with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from paged import in_pages

from deepseek_kernels import (
    InStack,
    Target,
    Visible,
    decode_hopper,
    decode_hopper_parts,
    mla_decode,
    quantise_entries,
)

ON_GPU = jax.default_backend() == "gpu"
TARGET = Target("cuda", "9.0", 0 if ON_GPU else 3)  # three blocks in the interpreter
C, R, SCALE = 128, 64, 0.1


@pytest.fixture
def hopper_gpu(hopper_gpu, monkeypatch):
    def added(sums, a, b):  # the interpreter starts sums at zero alone
        def product(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return sums + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(sums.shape))

    if not ON_GPU:
        monkeypatch.setattr(decode_hopper_parts, "_accumulate", added)


def draw(batch, queries, heads, columns, width=C):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width + R), (2, batch, columns, width + R)
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def seen(lengths, queries):
    """The last tokens of rows of these lengths, as the engine describes them."""
    lengths_B = jnp.array(lengths, jnp.int32)
    return Visible(q_positions_BS=lengths_B[:, None] - queries + jnp.arange(queries), lengths_B=lengths_B)


def decode(q, stack, visible, width=C):
    run = functools.partial(mla_decode, scale=SCALE, values=width, target=TARGET, implementation="hopper")
    return np.asarray(jax.jit(lambda q, stack: run(q, InStack(stack, 1), visible))(q, stack), np.float32)


def definition(q, entry, visible, width=C):
    masks = np.asarray(visible.mask(*q.shape[:2], entry.shape[1]))
    out = np.zeros((*q.shape[:3], width))
    for out_SHC, mask_ST, q_SHW, entry_TW in zip(
        out, masks, *(np.asarray(x, np.float64) for x in (q, entry)), strict=True
    ):
        keys = entry_TW[: mask_ST.any(0).sum()]
        for s in np.flatnonzero(mask_ST.any(1)):
            scores = q_SHW[s] @ keys.T * SCALE
            p = np.where(mask_ST[s, : len(keys)], np.exp(scores - scores.max(-1, keepdims=True)), 0)
            out_SHC[s] = p / p.sum(-1, keepdims=True) @ keys[:, :width]
    return out


# Weights and result are rounded to bfloat16, 2⁻⁹ at most of a number: a relative error of 0.2 %.
@pytest.mark.parametrize(
    ("queries", "heads", "lengths", "columns"),
    [
        (1, 16, [100, 128, 1], 128),
        (4, 16, [4, 192, 65, 3], 192),  # one tile; of three tokens' row the first query sees nothing
        (3, 5, [70, 9], 72),  # rows that no copy takes, a last block that sticks out
        (2, 64, [200, 64], 200),  # two tiles, over three processors
        (1, 16, [640], 640),  # one row over all
    ],
)
def test_values_equal_the_definition(hopper_gpu, queries, heads, lengths, columns):
    q, stack = draw(len(lengths), queries, heads, columns)
    visible = seen(lengths, queries)
    found, right = decode(q, stack, visible), definition(q, stack[1], visible)
    assert np.linalg.norm(found - right) < 3e-3 * np.linalg.norm(right)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-2)
    hidden = ~np.asarray(visible.mask(len(lengths), queries, columns)).any(-1)
    assert hidden.any() == (lengths[-1] == 3) and not found[hidden].any()
    np.testing.assert_array_equal(found, decode(q, stack, visible))


@functools.cache
def jitted(width):
    """For all tables and lengths."""
    run = functools.partial(mla_decode, scale=SCALE, values=width, target=TARGET, implementation="hopper")
    return jax.jit(lambda q, stack, visible: run(q, InStack(stack, 1), visible))


def check(kind, lengths, queries, heads, *, width, page=64, columns=192, seed=0):
    """Of a cache in pages, in FP8 or both, against the very numbers that it holds in float64."""
    q, stack = draw(len(lengths), queries, heads, columns, width)
    q, rows = q.at[:, :, :3].multiply(jnp.array([[2.0**-120], [30], [0.01]], jnp.bfloat16)), np.array(stack)
    rows[:, -1, :page] = rows[:, 0, :page]  # a page that two rows share
    rows[..., :128] *= 5  # groups of unlike scales
    kept, visible = rows, seen(lengths, queries)
    if "pages" in kind:
        kept, table = in_pages(rows, lengths, page, seed)
        visible = dataclasses.replace(visible, pages_BJ=jnp.asarray(table))
    kept, rows = jnp.asarray(kept), jnp.asarray(rows)
    if "fp8" in kind:
        kept, rows = quantise_entries(kept, width), quantise_entries(rows, width).astype(jnp.float32)
    found = np.asarray(jitted(width)(q, kept, visible), np.float32)
    right = definition(q, rows[1], seen(lengths, queries), width)
    for mine, wanted in zip(found, right, strict=True):
        assert np.linalg.norm(mine - wanted) <= 4e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", ["pages", "fp8", "fp8 in pages"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])  # it stays as it is
@given(st.lists(st.integers(0, 192), min_size=3, max_size=3), st.integers(0, 99))
@example([1, 64, 192], 0)
def test_a_cache_in_pages_and_in_fp8(hopper_gpu, kind, lengths, seed):
    """Rows of 0 to 192 keys in pages of 64, over three processors; a row of 0 has zeros."""
    check(kind, lengths, 1, 16, width=256, seed=seed)


@pytest.mark.parametrize(
    ("kind", "lengths", "queries", "heads", "page", "columns", "width"),
    [
        ("pages", [4, 250], 4, 16, 128, 256, 128),
        ("fp8", [70, 9], 2, 64, 64, 72, 256),  # two tiles, a last block that sticks out
        ("fp8 in pages", [130, 256], 3, 8, 128, 256, 512),  # two parts of each half are converted
    ],
)
def test_pages_of_several_blocks_and_wide_values(hopper_gpu, kind, lengths, queries, heads, page, columns, width):
    check(kind, lengths, queries, heads, page=page, columns=columns, width=width)


@pytest.mark.skipif(not ON_GPU, reason="real sizes need the card")
@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (4, 16), (1, 128), (2, 128)])
def test_values_at_real_sizes(hopper_gpu, queries, heads):
    lengths = [1, 32768, 513, 64, 7000, 4]
    q, stack = draw(len(lengths), queries, heads, 32768, 512)
    poison = [jnp.full(1 << 26, jnp.nan) for _ in range(8)]
    jax.block_until_ready(poison)
    del poison
    visible = seen(lengths, queries)
    found, right = decode(q, stack, visible, 512), definition(q, stack[1], visible, 512)
    for mine, wanted in zip(found, right, strict=True):
        assert np.linalg.norm(mine - wanted) < 4e-3 * np.linalg.norm(wanted)


def test_without_lengths_and_positions_every_key_is_seen(hopper_gpu):
    q, stack = draw(2, 1, 8, 64)
    visible = Visible(causal=False)
    right = definition(q, stack[1], visible)
    assert np.linalg.norm(decode(q, stack, visible) - right) < 3e-3 * np.linalg.norm(right)


def test_work_is_dealt_out_evenly_and_every_part_is_some_rows():
    lengths, cores = np.array([1, 700, 64, 0, 129, 2000]), 7
    plan, blocks, parts = (np.asarray(x) for x in decode_hopper._plan(jnp.array(lengths), cores))
    covered = {}
    for core, (row, first, count, rows, own) in enumerate(plan):
        assert own == blocks[row]
        for _ in range(rows):
            size = min(count, blocks[row] - first)
            assert row + core not in covered
            covered[row + core] = (row, range(first, first + size))
            row, first, count = row + 1, 0, count - size
        assert count == 0
    for row, (first, number) in enumerate(parts):
        mine = [covered.pop(part) for part in range(first, first + number)]
        assert all(owner == row for owner, _ in mine)
        assert [block for _, part in mine for block in part] == list(range(max(1, -(-lengths[row] // 64))))
    assert not covered
    assert plan[:, 2].max() == -(-blocks.sum() // cores)


@pytest.mark.parametrize(("queries", "heads", "fp8"), [(1, 16, False), (3, 128, False), (1, 16, True), (3, 128, True)])
def test_kernels_are_lowered_for_cuda_without_a_gpu(queries, heads, fp8):
    """Any jax that the package allows takes them through Mosaic GPU's passes, at the sizes of V2-Lite and V3."""
    q, stack = draw(3, queries, heads, 128, 512)
    visible = seen([3, 100, 128], queries)
    if fp8:
        stack = quantise_entries(stack, 512)
        visible = dataclasses.replace(visible, pages_BJ=jnp.array([[2], [0], [1]]))
    run = functools.partial(mla_decode, visible=visible, scale=SCALE, values=512, target=Target("cuda", "9.0", 132))
    traced = jax.jit(lambda q, stack, layer: run(q, InStack(stack, layer))).trace(q, stack, 1)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_it_cannot_take_is_named():
    q, stack = draw(2, 1, 16, 128)
    run = functools.partial(mla_decode, scale=SCALE, values=C, target=TARGET, implementation="hopper")
    segments = jnp.zeros((2, 128), jnp.int32)
    with pytest.raises(ValueError, match="no segments"):
        run(q, stack[0], Visible(q_segments_BS=segments[:, :1], k_segments_BT=segments))
    with pytest.raises(ValueError, match="a multiple of 8 columns, not 100"):
        run(q, stack[0, :, :100], Visible())
    with pytest.raises(ValueError, match="not 120 of 192"):
        run(q, stack[0], Visible(), values=120)
    with pytest.raises(ValueError, match="it needs bfloat16, not float32"):
        run(q.astype(jnp.float32), stack[0].astype(jnp.float32), Visible())
    with pytest.raises(ValueError, match=r"not cuda 8\.0"):
        run(q, stack[0], Visible(), target=Target("cuda", "8.0"))

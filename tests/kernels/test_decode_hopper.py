"""Decoding's Hopper kernels against float32: on such a GPU with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import InStack, Target, Visible, decode_hopper, decode_hopper_parts, mla_decode

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


@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (3, 128)])
def test_kernels_are_lowered_for_cuda_without_a_gpu(queries, heads):
    """Any jax that the package allows takes them through Mosaic GPU's passes, at the sizes of V2-Lite and V3."""
    q, stack = draw(3, queries, heads, 128, 512)
    visible = seen([3, 100, 128], queries)
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

"""The values of the TPU kernels, in Pallas' interpreters, against references in float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info
from paged import in_pages

from deepseek_kernels import (
    InStack,
    Target,
    Visible,
    attention_reference,
    choose,
    decode_tpu,
    gqa_attention,
    grouped_matmul,
    grouped_matmul_reference,
    mla_decode,
    quantise_entries,
    tpu,
)
from deepseek_kernels.attention_splash_blocks import Blocks, tables, visited

SMALL = tpu.Chip(attention=(256, 128), rows=128, matrix=(256, 256 * 128), dw=(256, 256 * 128), keys=128, cores=2)
CHIP, ONE_CORE = Target("tpu", "TPU v5p"), Target("tpu", "TPU v6e")
exactly = functools.partial(np.testing.assert_allclose, rtol=0)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several blocks of everything at sizes that an interpreter can do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tpu.CHIPS, CHIP.chip, SMALL)
        patch.setitem(tpu.CHIPS, ONE_CORE.chip, dataclasses.replace(SMALL, cores=1))
        patch.setattr(decode_tpu, "_ROWS", 16)
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def wide(*arrays) -> Any:
    return [array.astype(jnp.float32) for array in arrays]


def near(found, expected, share=0.01):
    """Within some roundings of bfloat16 of the largest number."""
    expected = np.asarray(expected, np.float32)
    exactly(np.asarray(found, np.float32), expected, atol=share * max(1e-3, float(np.abs(expected).max())))


def in_interpreter(function) -> Any:
    """Jitted once for all examples; what no kernel wrote is NaN."""
    jitted = jax.jit(function)

    def call(*args):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            return jitted(*args)

    return call


@functools.cache
def grouped():
    def run(x, w, dy, sizes):
        y, gradients = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, target=CHIP), x, w)
        return y, *gradients(dy)

    return in_interpreter(run)


@settings(max_examples=6)
@given(st.lists(st.sampled_from([0, 1, 30, 127, 128, 129, 300]), min_size=5, max_size=5))
@example([0, 0, 300, 0, 0])
@example([0, 0, 0, 0, 0])
def test_grouped_products_and_their_gradients(sizes):
    """Empty and uneven groups, one of all rows, rows of none; widths and rows that are no multiple of a block."""
    ends = np.minimum(np.cumsum(sizes), 300)
    sizes, rest = np.diff(ends, prepend=0), slice(int(ends[-1]), None)
    x, w, dy = normal(0, 300, 300), normal(1, 5, 300, 200), normal(2, 300, 200)
    y, dx, dw = grouped()(x, *wide(w), dy, jnp.array(sizes, jnp.int32))  # masters in float32: so is their gradient
    y_, gradients = jax.vjp(lambda x, w: grouped_matmul_reference(x, w, jnp.array(sizes)), *wide(x, w))
    dx_, dw_ = gradients(dy.astype(jnp.float32))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    near(y, y_)
    near(dx, dx_)
    near(dw, dw_, share=1e-5)
    assert not np.any(np.asarray(y[rest])) and not np.any(np.asarray(dx[rest]))


def test_a_grouped_product_reads_its_layer_of_a_stack():
    x, stack, sizes_E = normal(0, 128, 256), normal(1, 3, 4, 256, 128), jnp.array([1, 0, 90, 30])
    multiply = in_interpreter(lambda w: grouped_matmul(x, w, sizes_E, target=CHIP))
    x_, w_ = wide(x, stack[2])
    near(multiply(InStack(stack, 2)), grouped_matmul_reference(x_, w_, sizes_E))


@functools.cache
def attention(B, H, G, S=300, T=300):
    """In Pallas' other interpreter: the one for TPUs does not take a kernel under vmap that says how its axes run."""
    shapes = (S, H, 192), (T, G, 192), (T, G, 128), (S, H, 128)
    operands = [normal(i, B, *shape) for i, shape in enumerate(shapes)]

    def run(attend, visible, q, k, v, dout):
        out, gradients = jax.vjp(lambda q, k, v: attend(q, k, v, visible, 0.1), q, k, v)
        return out, *gradients(dout.astype(out.dtype))

    (q, k, v, _), attend = operands, functools.partial(gqa_attention, target=CHIP)
    jitted = jax.jit(functools.partial(run, attend))

    def call(visible, gradients=True):
        inner = pl.pallas_call
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pl, "pallas_call", lambda *a, **options: inner(*a, **{**options, "interpret": True}))
            return jitted(visible, *operands) if gradients else attend(q, k, v, visible, 0.1)

    return call, lambda visible: run(attention_reference, visible, *wide(*operands))


def cut(cuts, size=300):
    """Ids of segments that begin at the cuts."""
    return jnp.sum(jnp.arange(size)[:, None] >= jnp.array([0, 1, *cuts]), axis=1)


CUTS = st.lists(st.integers(0, 300), max_size=6)


@settings(max_examples=6)
@given(CUTS, CUTS, st.integers(-1, 3))
@example([128, 256], [], -1)
@example([], [], 1)
def test_attention_within_segments_and_its_gradients(first, second, alone):
    """Two rows cut in different places. Segments of 1, queries that see no key, as none is of their segment, and blocks
    of them; 300 tokens in blocks of 128."""
    call, reference = attention(2, 2, 1)  # cores that cannot share one head
    ids = jnp.stack([cut(first), cut(second)])
    visible = Visible(q_segments_BS=ids, k_segments_BT=jnp.where(ids == alone, 9, ids))
    for found, expected in zip(call(visible), reference(visible), strict=True):
        assert found.dtype == jnp.bfloat16
        near(found, expected, share=0.02)


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(-200, 300), st.integers(0, 300)), min_size=2, max_size=2), CUTS)
@example([(-200, 300), (150, 0)], [])
def test_attention_of_queries_anywhere_in_their_row_and_its_gradients(rows, cuts):
    """As a part of a split row has them, or a piece of a prompt: 150 queries behind so many of 300 keys, of which so
    many exist; of some queries and of whole blocks none."""
    call, reference = attention(2, 4, 2, S=150)
    starts, lengths = jnp.array(rows).T
    positions, ids = starts[:, None] + jnp.arange(150), cut(cuts)[None]
    own = ids[0].at[positions].get(mode="clip")
    visible = Visible(q_positions_BS=positions, q_segments_BS=own, k_segments_BT=ids, lengths_B=lengths)
    for found, expected in zip(call(visible), reference(visible), strict=True):
        near(found, expected, share=0.02)


def test_attention_of_whole_rows_its_gradients_and_prefill():
    """Where nobody asks for gradients the kernel keeps no sums, and gives the same."""
    call, reference = attention(1, 4, 2)
    found = call(Visible())
    for value, expected in zip(found, reference(Visible()), strict=True):
        near(value, expected, share=0.02)
    near(call(Visible(), gradients=False), found[0], share=0)


def of_row(size, block, ids=None) -> Any:
    segments = None if ids is None else splash.SegmentIds(ids, ids)
    return jnp.arange(size, dtype=jnp.int32), segments, Blocks(1, block, block, size // block, block, True)


def test_which_blocks_attention_visits_is_what_jax_finds_by_looking():
    for size, block in ((128, 128), (1280, 256)):
        mask = masks.MultiHeadMask([masks.CausalMask((size, size))])
        rows, _ = mask_info.process_mask(mask, (block, block))
        columns, _ = mask_info.process_mask_dkv(mask, (block, block), shrink_grid=False)
        for found, expected in zip(tables(*of_row(size, block)), (rows, columns), strict=True):
            np.testing.assert_array_equal(found.data_next, expected.data_next)
            np.testing.assert_array_equal(found.block_mask, np.sign(np.asarray(expected.block_mask)))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 640), max_size=8), st.integers(0, 200))
def test_blocks_in_which_no_query_sees_a_key_are_not_visited(cuts, padding):
    """All that are visited have such a pair, in rows packed as they are: rising ids, 0 behind them."""
    ids = jnp.where(jnp.arange(640) < 640 - padding, cut(cuts, 640), 0)
    sees = Visible.rows(ids[None]).mask(1, 640, 640).reshape(5, 128, 5, 128).any((1, 3))
    np.testing.assert_array_equal(visited(*of_row(640, 128, ids))[0], sees)


def test_flops_of_packed_rows():
    """By the blocks visited, of those of a whole row: what equal segments save at V2-Lite's and longer rows."""
    for size, parts, share in ((4096, 1, 1), (4096, 2, 0.6), (4096, 32, 0.4), (32768, 8, 0.15), (32768, 32, 0.06)):
        whole, packed = (
            jnp.sum(visited(*of_row(size, 1024, ids))) for ids in (None, jnp.arange(size) * parts // size + 1)
        )
        assert packed / whole <= share + 0.01, (size, parts, packed / whole)


@functools.cache
def decode(chip):
    def run(q, stack, layer, visible):
        return mla_decode(q, InStack(stack, layer), visible, 0.1, values=stack.shape[-1] - 64, target=chip)

    return in_interpreter(run)


@pytest.mark.parametrize("chip", ["CHIP", "ONE_CORE"])
@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=3, max_size=3))
@example([(0, 0), (1, 1), (300, 300)])
def test_decoding_over_a_layer_of_the_cache(chip, rows):
    """Two cores or one, rows of 0 to 300 columns in blocks of 128, two query tokens of 12 heads as two tiles; what lies
    behind a row's length is finite, what lies behind the cache is NaN."""
    q, stack = normal(0, 3, 2, 12, 192), normal(1, 2, 3, 300, 192)
    lengths, positions = jnp.array(rows).T
    visible = Visible(q_positions_BS=positions[:, None] + jnp.arange(2), lengths_B=lengths)
    out = decode(globals()[chip])(q, stack, 1, visible)
    entry = stack[1][:, :, None].astype(jnp.float32)
    near(out, attention_reference(q.astype(jnp.float32), entry, entry, visible, 0.1)[..., :128])


@pytest.mark.parametrize(
    ("chip", "page", "fp8"), [("CHIP", 64, False), ("ONE_CORE", 256, True), ("CHIP", 64, True), ("ONE_CORE", 0, True)]
)
@settings(max_examples=3)
@given(st.lists(st.integers(0, 512), min_size=3, max_size=3), st.integers(0, 99))
@example([512, 1, 65], 0)
def test_decoding_over_pages_and_fp8(chip, page, fp8, lengths, seed):
    """Blocks of 128 keys: two pages of 64, a half of one of 256, or 500 columns, of which the last block sticks out; a
    page that two rows share. FP8 is compared with the very numbers that it holds."""
    columns = 512 if page else 500
    lengths = np.minimum(lengths, columns)
    q, rows = normal(0, 3, 2, 12, 320), np.array(normal(1, 2, 3, columns, 320))
    rows[:, 2, :64], rows[..., :128] = rows[:, 0, :64], rows[..., :128] * 3
    visible = Visible(q_positions_BS=jnp.asarray(lengths)[:, None] - 2 + jnp.arange(2), lengths_B=jnp.asarray(lengths))
    kept, described = rows, visible
    if page:
        kept, table = in_pages(rows, lengths, page, seed)
        described = dataclasses.replace(visible, pages_BJ=jnp.asarray(table))
    kept, rows = jnp.asarray(kept), jnp.asarray(rows)
    if fp8:
        kept, rows = quantise_entries(kept, 256), quantise_entries(rows, 256).astype(jnp.float32)
    out = decode(globals()[chip])(q, kept, 1, described)
    entry = rows[1][:, :, None].astype(jnp.float32)
    near(out, attention_reference(q.astype(jnp.float32), entry, entry, visible, 0.1)[..., :256])


def test_what_a_tpu_kernel_refuses_has_a_reason():
    rows: Any = {"in_row_order": True, "queries": 64, "keys": 64, "key_width": 192, "value_width": 128}
    for changed, why in (
        ({"in_row_order": False}, "whose positions are their columns"),
        ({"queries": 32}, "at least 128 queries a row, not 32 for 64 keys"),
        ({"devices": 2}, "a shard_map around it"),
        ({"key_width": 100}, "multiples of 64, not 100"),
    ):
        choice = choose("mla_attention", CHIP, jnp.bfloat16, **(rows | changed))
        assert choice.name == "blockwise" and why in choice.reason
    with pytest.raises(ValueError, match="'splash' of mla_attention cannot run on .*: it needs bfloat16, not float32"):
        choose("mla_attention", CHIP, jnp.float32, implementation="splash", **rows)
    decoding: Any = {"by_column": True, "queries": 1, "keys": 4096, "key_width": 576, "value_width": 512}
    assert choose("mla_decode", CHIP, jnp.bfloat16, **decoding, page=64, fp8=True).name == "tpu"
    with pytest.raises(ValueError, match="it needs pages of 64 tokens or of a multiple of 128, not 96"):
        choose("mla_decode", CHIP, jnp.bfloat16, implementation="tpu", **decoding, page=96)
    narrow = choose("grouped_matmul", CHIP, jnp.bfloat16, rows=64, groups=4, widths=(64, 256))
    assert narrow.name == "ragged_dot" and "at least 128, not (64, 256)" in narrow.reason
    v4 = choose("mla_attention", Target("tpu", "TPU v4"), jnp.bfloat16, **rows)
    assert "it needs one of TPU v5 lite, " in v4.reason and "not TPU v4" in v4.reason

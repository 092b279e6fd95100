"""MLA's Hopper kernels against the definition: on such a GPU with ``TEST_ON=cuda``, else in Mosaic's interpreter."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_kernels import (
    Target,
    Visible,
    attention_hopper,
    attention_hopper_forward,
    attention_hopper_keys,
    attention_hopper_queries,
    attention_reference,
    gqa_attention,
    mla_attention,
)
from deepseek_kernels import attention_hopper_tiles as tiles

ON_GPU = jax.default_backend() == "gpu"
HOPPER = Target("cuda", "9.0", 132)
SCALE = 192**-0.5
PLACED = Visible(q_positions_BS=jnp.concatenate([jnp.arange(512), jnp.arange(3584, 4096)])[None], q_run=512)


@pytest.fixture
def hopper_gpu(hopper_gpu, monkeypatch):
    if ON_GPU:
        yield
        return
    room = []

    def launch(name, body, out, scratch, *rest, **options):
        def with_room(here, *refs):
            room[:] = refs[-1:]
            body(here, *refs[:-1])

        more = plgpu.SMEM((2, tiles.HALF, tiles.BLOCK), jnp.bfloat16, transforms=tiles.TILED)
        return tiles.launch(name, with_room, out, (*scratch, more), *rest, **options)

    def times(acc, weights, b):  # the interpreter multiplies what is in shared memory alone
        place = room[0].at[jax.lax.axis_index("warpgroup"), :, : weights.shape[1]]
        place[...] = weights
        plgpu.commit_smem()
        plgpu.wgmma(acc, place, b)

    def product(fill, start, **_):  # and starts sums at zero alone
        return tiles.product(fill, start) if isinstance(start, int) else start + tiles.product(fill, start.shape[1])

    def overlapped(sums, weights, values, score, meanwhile):
        sums = product(lambda acc: times(acc, weights, values), sums)
        return sums, meanwhile(tiles.product(score, tiles.BLOCK))

    for module in attention_hopper_forward, attention_hopper_queries, attention_hopper_keys:
        for function in launch, times, product:
            if hasattr(module, function.__name__):
                monkeypatch.setattr(module, function.__name__, function)
    monkeypatch.setattr(attention_hopper_forward, "_overlapped", overlapped)
    jax.clear_caches()  # of what was traced without all this
    yield
    jax.clear_caches()


def draw(batch, size, heads):
    rng = np.random.default_rng(size)
    shapes = (heads, 192), (heads, 256), (64,), (heads, 128)
    return [jnp.asarray(rng.standard_normal((batch, size, *shape)), jnp.bfloat16) for shape in shapes]


def definition(q, kv, pe, dout, mask_BST):
    """The result and the gradients in q, kv and pe, a head at a time, in float64."""
    q, kv, pe, dout = (np.asarray(x, np.float64) for x in (q, kv, pe, dout))
    out, dq, dkv, dpe = np.zeros_like(dout), np.zeros_like(q), np.zeros_like(kv), np.zeros_like(pe)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        keys, values, mask = np.concatenate([kv[b, :, h, :128], pe[b]], axis=1), kv[b, :, h, 128:], mask_BST[b]
        scores = np.where(mask, q[b, :, h] @ keys.T * SCALE, -np.inf)
        p = np.exp(scores - np.maximum(scores.max(1, keepdims=True), -1e300))
        p /= np.maximum(p.sum(1, keepdims=True), 1e-300)
        dp = dout[b, :, h] @ values.T
        ds = p * (dp - (dp * p).sum(1, keepdims=True)) * SCALE
        dkeys = ds.T @ q[b, :, h]
        out[b, :, h], dq[b, :, h] = p @ values, ds @ keys
        dkv[b, :, h] = np.concatenate([dkeys[:, :128], p.T @ dout[b, :, h]], axis=1)
        dpe[b] += dkeys[:, 128:]
    return out, dq, dkv, dpe


def check(batch, size, heads, visible, places=None):
    """Result and gradients are the definition's, to bfloat16's rounding of weights and results; twice the same bits.
    places: the queries that there are, by default those of all keys."""
    q, kv, pe, dout = draw(batch, size, heads)
    if places is not None:
        q, dout = q[:, places], dout[:, places]

    @jax.jit
    def run(visible, q, kv, pe, dout):
        options = {"target": HOPPER, "implementation": "hopper"}
        out, pullback = jax.vjp(lambda *x: mla_attention(*x, visible=visible, scale=SCALE, **options), q, kv, pe)
        return out, *pullback(dout)

    if ON_GPU:  # memory that is full of NaN
        jax.block_until_ready([jnp.full(1 << 26, jnp.nan) for _ in range(8)])
    found, again = run(visible, q, kv, pe, dout), run(visible, q, kv, pe, dout)
    right = definition(q, kv, pe, dout, np.asarray(visible.mask(batch, q.shape[1], size)))
    for value, same, wanted in zip(found, again, right, strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, same)
        value = np.asarray(value, np.float64)
        assert np.linalg.norm(value - wanted) <= 5e-3 * np.linalg.norm(wanted) + 1e-4
        np.testing.assert_allclose(value, wanted, rtol=2**-6, atol=0.01 * np.abs(wanted).max() + 1e-4)


def segments(size, *rows):
    """Rows of segments 1, 2, … of these sizes; 0 behind the last."""
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return Visible.rows(jnp.asarray(np.stack([np.pad(row, (0, size - len(row))) for row in ids]), jnp.int32))


def test_causal_rows(hopper_gpu):
    check(1, 263, 1, Visible())  # three blocks, no multiple of 8


def test_segments(hopper_gpu):
    check(2, 256, 1, segments(256, [100, 1, 27, 70], [3, 253]))


def test_segments_in_any_order_and_a_query_that_sees_nothing(hopper_gpu):
    ids = np.repeat([7, 2, 7, 2**31 - 1, 0], [100, 30, 70, 40, 16]).astype(np.int32)[None]
    of_keys = ids.copy()
    of_keys[:, 5:9] = 99
    ids[:, 0] = -4  # sees no key
    check(1, 256, 1, Visible(q_segments_BS=jnp.asarray(ids), k_segments_BT=jnp.asarray(of_keys)))


@pytest.mark.parametrize("packed", [False, True])
def test_queries_from_two_places_of_their_row(hopper_gpu, packed):
    """As a device has them that shares rows with another; some keys are seen by none."""
    pieces = (0, 2) if packed else (0, 1)
    places = np.concatenate([np.arange(128) + 128 * piece for piece in pieces])
    visible = Visible(q_positions_BS=jnp.asarray(places, jnp.int32)[None], q_run=128)
    if packed:
        ids = np.asarray(segments(384, [100, 1, 160, 100]).q_segments_BS)
        visible = dataclasses.replace(visible, q_segments_BS=ids[:, places], k_segments_BT=ids)
    check(1, 384, 1, visible, places)


def test_heads_that_share_keys(hopper_gpu, width=64):
    """Packed, and a part of its row: result and gradients are those of the definition's autodiff in float32."""
    places = np.concatenate([np.arange(128), np.arange(256, 384)])
    ids = segments(384, [100, 1, 160, 100]).q_segments_BS
    assert ids is not None
    visible = Visible(jnp.asarray(places, jnp.int32)[None], None, ids[:, places], ids, q_run=128)
    rng = np.random.default_rng(width)
    shapes = (1, 256, 2, width), (1, 384, 1, width), (1, 384, 1, width), (1, 256, 2, width)
    *operands, dout = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    options = {"visible": visible, "scale": width**-0.5}
    out, pullback = jax.vjp(lambda *x: gqa_attention(*x, target=HOPPER, **options), *operands)  # chosen by itself
    exact = [x.astype(jnp.float32) for x in operands]
    right, of_it = jax.vjp(lambda *x: attention_reference(*x, **options), *exact)
    for value, wanted in zip((out, *pullback(dout)), (right, *of_it(dout.astype(jnp.float32))), strict=True):
        assert value.dtype == jnp.bfloat16 and value.shape == wanted.shape
        value, wanted = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(value - wanted) <= 5e-3 * np.linalg.norm(wanted)


@pytest.mark.skipif(not ON_GPU, reason="many shapes need the card")
@settings(max_examples=5)
@given(
    batch=st.integers(1, 2),
    size=st.integers(1, 1000),
    heads=st.sampled_from([1, 3, 16]),
    cuts=st.none() | st.lists(st.integers(1, 999), max_size=40),
)
def test_drawn_shapes(batch, size, heads, cuts):
    if Target.here().chip != "9.0":
        pytest.skip("this GPU is not of compute capability 9.0")
    if cuts is None:
        visible = Visible()
    else:
        at = np.searchsorted(np.unique(cuts), np.arange(size), side="right")
        visible = Visible.rows(jnp.asarray(np.tile(at + 1, (batch, 1)), jnp.int32))
    check(batch, size, heads, visible)


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.data())
def test_what_blocks_see_of_each_other(starts, data):
    """All that any query of a block sees is gone over, and where nothing is hidden all is seen."""
    of_q = np.repeat(np.sort(starts) if data.draw(st.booleans()) else starts, 64).astype(np.int32)
    of_k = of_q if data.draw(st.booleans()) else np.roll(of_q, 64)
    mask = np.tril(of_q[:, None] == of_k[None])
    tile = mask.reshape(3, 128, 3, 128)
    some, whole = tile.any((1, 3)), tile.all((1, 3))
    of_queries, of_keys = (
        np.asarray(x)[0] for x in attention_hopper.seen(jnp.asarray(of_q)[None], jnp.asarray(of_k)[None])
    )
    for i, (first, whole_from) in enumerate(of_queries):
        assert 0 <= first <= whole_from <= i and not some[i, :first].any() and whole[i, whole_from:i].all()
    for j, (whole_end, end) in enumerate(of_keys):
        assert j < whole_end <= end <= 3 and not some[end:, j].any() and whole[j + 1 : whole_end, j].all()


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_what_blocks_see_of_each_other_where_queries_are_a_part(starts, places):
    of_k = np.repeat(starts, 64).astype(np.int32)
    at = np.concatenate([np.arange(128) + 128 * place for place in places])
    of_q = of_k[at]
    mask = (of_q[:, None] == of_k[None]) & (np.arange(512) <= at[:, None])
    tile = mask.reshape(2, 128, 4, 128)
    some, whole = tile.any((1, 3)), tile.all((1, 3))
    arrays = (jnp.asarray(x, jnp.int32)[None] for x in (of_q, of_k, places))
    of_queries, of_keys = (np.asarray(x)[0] for x in attention_hopper.seen(*arrays))
    for i, (first, whole_from) in enumerate(of_queries):
        place = places[i]
        assert 0 <= first <= whole_from <= place and not some[i, :first].any() and whole[i, whole_from:place].all()
    for j, (start, whole_end, end) in enumerate(of_keys):
        assert start <= whole_end <= end <= 2 and not some[:start, j].any() and not some[end:, j].any()
        assert whole[start + 1 : whole_end, j].all()


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("visible", [Visible(), segments(4096, [4096]), PLACED], ids=["causal", "segments", "placed"])
def test_they_are_lowered_for_cuda_without_a_gpu(heads, visible):
    """Chosen by themselves at the widths of V2-Lite and V3; any jax that the package allows takes them."""
    queries = 4096 if visible.q_positions_BS is None else visible.q_positions_BS.shape[1]
    shapes = (1, queries, heads, 192), (1, 4096, heads, 256), (1, 4096, 64)
    q, kv, pe = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def loss(*inputs):
        return jnp.sum(mla_attention(*inputs, visible=visible, scale=0.1, target=HOPPER).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, pe)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu") == 3


def test_packed_rows_of_grouped_heads_are_lowered_for_cuda():
    """cuDNN does not take them; heads of 128 numbers, and narrower ones."""
    for width in 128, 64:
        q, kv = (jax.ShapeDtypeStruct((1, 256, heads, width), jnp.bfloat16) for heads in (4, 2))
        run = functools.partial(gqa_attention, visible=segments(256, [100, 156]), scale=0.1, target=HOPPER)
        lowered = jax.jit(run).trace(q, kv, kv).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_what_they_cannot_take_is_named():
    q, kv, pe, _ = draw(1, 128, 1)
    run = functools.partial(mla_attention, scale=SCALE, target=HOPPER, implementation="hopper")
    positions = jnp.zeros((1, 128), jnp.int32)
    with pytest.raises(ValueError, match="it needs causal rows without positions"):
        run(q, kv, pe, Visible(q_positions_BS=positions, k_positions_BT=positions))
    with pytest.raises(ValueError, match="keys of 192 and values of 128 numbers, not 192 and 64"):
        run(q, kv[..., :192], pe, Visible())
    with pytest.raises(ValueError, match="it needs bfloat16, not float32"):
        run(q.astype(jnp.float32), kv.astype(jnp.float32), pe.astype(jnp.float32), Visible())
    with pytest.raises(ValueError, match=r"not cuda 8\.0"):
        run(q, kv, pe, Visible(), target=Target("cuda", "8.0"))

"""cuDNN's causal attention against the definition: on a GPU with ``TEST_ON=cuda``; elsewhere that it is lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import Target, Visible, attention_blockwise, attention_packed, gqa_attention, mla_attention
from deepseek_kernels.attention import attention_reference

HOPPER = Target("cuda", "9.0", 132)


def draw(dtype, size, heads, groups, key_width, value_width):
    shapes = ((2, size, heads, key_width), (2, size, groups, key_width), (2, size, groups, value_width))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    return q, k, v, jax.random.normal(keys[3], (2, size, heads, value_width), dtype)


def both(attention, dout, *inputs):
    out, pullback = jax.vjp(attention, *inputs)
    return out, *pullback(dout.astype(out.dtype))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: TEST_ON=cuda")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [64, 200, 1024])
@pytest.mark.parametrize(("groups", "key_width", "value_width"), [(4, 192, 128), (4, 128, 128), (2, 64, 64)])
def test_value_and_gradients_equal_the_definition(dtype, size, groups, key_width, value_width):
    scale = key_width**-0.5
    target = Target.here()
    if key_width != value_width and float(target.chip) < 9.0:
        pytest.skip("unequal widths need capability 9.0")
    q, k, v, dout = draw(dtype, size, 4, groups, key_width, value_width)
    attention = functools.partial(gqa_attention, visible=Visible(), scale=scale, implementation="cudnn")
    found = jax.jit(functools.partial(both, attention))(dout, q, k, v)
    exact = (a.astype(jnp.float32) for a in (dout, q, k, v))
    with jax.default_matmul_precision("highest"):
        right = both(functools.partial(attention_reference, visible=Visible(), scale=scale), *exact)
    for mine, wanted in zip(found, right, strict=True):
        assert mine.dtype == dtype
        mine, wanted = (np.asarray(a, np.float64) for a in (mine, wanted))
        assert np.linalg.norm(mine - wanted) <= 2**-7 * np.linalg.norm(wanted)


def cut(size, sizes):
    """Two rows of segments 1, 2, … of these sizes, in one order and the other; 0 behind the last."""
    rows = [np.repeat(np.arange(1, len(sizes) + 1), order) for order in (sizes, sizes[::-1])]
    return np.stack([np.pad(row, (0, size - len(row))) for row in rows]).astype(np.int32)


SEGMENTS = {
    "several": cut(1024, [200, 1, 423, 128, 1, 271]),
    "one": cut(1024, [1024]),
    "padded": cut(1024, [100, 300]),
    "ones": cut(64, [1, 1, 30, 1]),
    "odd": cut(200, [77, 123]),
    "many": cut(1024, [1] * 40 + [984]),
    "too_many": cut(1024, [1] * 200 + [824]),
    "in_two_parts": np.tile(np.repeat([1, 2, 1, 3], 256), (2, 1)).astype(np.int32),
}


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: TEST_ON=cuda")
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize(("key_width", "value_width"), [(192, 128), (128, 128)])
def test_segments_equal_the_definition(case, key_width, value_width):
    """By cuDNN, or by blocks where cuDNN's form does not hold them, decided on the device."""
    if float(Target.here().chip) < 9.0:
        pytest.skip("segments need capability 9.0")
    segments, scale = jnp.asarray(SEGMENTS[case]), key_width**-0.5
    q, k, v, dout = draw(jnp.bfloat16, segments.shape[1], 4, 4, key_width, value_width)

    def attention(q, k, v, segments, function, **options):
        return function(q, k, v, Visible.rows(segments), scale, **options)

    mine = functools.partial(attention, function=gqa_attention, implementation="cudnn")
    found = jax.jit(lambda segments, *rest: both(functools.partial(mine, segments=segments), *rest))(
        segments, dout, q, k, v
    )
    exact = (a.astype(jnp.float32) for a in (dout, q, k, v))
    with jax.default_matmul_precision("highest"):
        right = both(functools.partial(attention, segments=segments, function=attention_reference), *exact)
    for value, wanted in zip(found, right, strict=True):
        value, wanted = (np.asarray(a, np.float64) for a in (value, wanted))
        assert np.linalg.norm(value - wanted) <= 2**-7 * np.linalg.norm(wanted)
        assert np.all(np.abs(value - wanted) <= 0.1 * (1 + np.abs(wanted)))


def test_blocks_give_what_their_gradients_want():
    """The two halves that packed rows fall back on are ``attend``'s."""
    q, k, v, dout = draw(jnp.float32, 64, 4, 2, 16, 8)
    visible = Visible.rows(jnp.asarray(cut(64, [1, 1, 30, 1])))
    right = both(lambda q, k, v: attention_blockwise.attend(q, k, v, visible, 0.25), dout, q, k, v)
    out, log_sum = attention_blockwise.with_sums(q, k, v, visible, 0.25)
    found = out, *attention_blockwise.gradients(q, k, v, visible, 0.25, out, log_sum, dout)
    for mine, wanted in zip(found, right, strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_the_runs_of_packed_rows():
    starts, sizes, most = attention_packed._runs(Visible.rows(jnp.asarray(cut(64, [1, 1, 30, 1]))), 2)
    np.testing.assert_array_equal(starts[:, :6], [[0, 1, 2, 32, 33, -1], [0, 1, 31, 32, 33, -1]])
    np.testing.assert_array_equal(sizes[:, :6], [[1, 1, 30, 1, 31, -1], [1, 30, 1, 1, 31, -1]])
    assert most == 5 and np.all(starts[:, 5:] == -1) and np.all(sizes[:, 5:] == -1)
    ids = jnp.asarray(SEGMENTS["several"])
    apart = Visible.rows(jnp.asarray(SEGMENTS["in_two_parts"])), Visible(q_segments_BS=ids, k_segments_BT=ids[:, ::-1])
    assert all(attention_packed._runs(visible, 2)[2] == 2**31 - 1 for visible in apart)


def test_it_is_lowered_for_cuda_without_a_gpu():
    """Causal rows of V2-Lite's widths, segments too, forward and backward; positions are refused."""
    q, kv, pe = (jax.ShapeDtypeStruct((2, 256, *rest), jnp.bfloat16) for rest in ((4, 192), (4, 256), (64,)))

    def text(visible):
        def loss(*inputs):
            options = {"target": HOPPER, "implementation": "cudnn"}
            return jnp.sum(mla_attention(*inputs, visible=visible, scale=0.1, **options).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, pe)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    plain = text(Visible())
    assert "cudnn$fmhaSoftmax(" in plain and "cudnn$fmhaSoftmaxBackward(" in plain
    assert "PADDING_CAUSAL" in text(Visible.rows(jnp.ones((2, 256), jnp.int32)))
    positions = jnp.zeros((2, 256), jnp.int32)
    with pytest.raises(ValueError, match="without positions"):
        text(Visible(q_positions_BS=positions, k_positions_BT=positions))

"""Attention of every kind against the definition, forward and backward, in every implementation that runs on a CPU."""

import functools
import importlib.util
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import Target, Visible, attention_blockwise, gqa_attention, mla_attention, mla_decode

IMPLEMENTATIONS = ["blockwise", "reference"]
if importlib.util.find_spec("deepseek_kernels.attention_cpu"):
    IMPLEMENTATIONS.append("c")

B, S = 2, 70


def segments(size):
    return jnp.asarray([[1] * 4 + [2] * (size - 4), [1] * (size - 2) + [0] * 2])


# Queries and keys, and what is said of them. In "lengths" a row has no keys at all; in "positions" a query comes before
# every key, and the keys stand in an order of their own.
CASES = {
    "causal": (S, S, Visible()),
    "all": (S, S, Visible(causal=False)),
    "segments": (S, S, Visible.rows(segments(S))),
    "fewer_queries": (20, S, Visible()),
    "fewer_keys": (S, 20, Visible()),
    "lengths": (S, S, Visible(lengths_B=jnp.asarray([0, 40]))),
    "one_query": (1, S, Visible(q_positions_BS=jnp.asarray([[40], [69]]), lengths_B=jnp.asarray([41, 70]))),
    "positions": (
        20,
        S,
        Visible(
            q_positions_BS=jnp.asarray([[*range(-1, 19)], [*range(50, 70)]]),
            k_positions_BT=jnp.asarray([[*range(S)], [*range(S - 1, -1, -1)]]),
            q_segments_BS=segments(20),
            k_segments_BT=segments(S),
        ),
    ),
}


@pytest.fixture(params=["one_block", "blocks_of_32"])
def blocks(request, monkeypatch):
    """As it comes, one block; and blocks that do not divide 70: three of 32 for 70 rows, with 26 of padding."""
    if request.param == "blocks_of_32":
        monkeypatch.setattr(attention_blockwise, "_LARGEST", 32)
        monkeypatch.setattr(attention_blockwise, "_SMALLEST", 16)
    return request.param


def draw(queries, keys, dtype=jnp.float32):
    """q, k, v and dout of 6 query heads, 3 heads of keys, K = 7, V = 4."""
    shapes = (B, queries, 6, 7), (B, keys, 3, 7), (B, keys, 3, 4), (B, queries, 6, 4)
    parts = zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
    return [jax.random.normal(key, shape, dtype) for key, shape in parts]


def definition(q, k, v, visible, scale, dout):
    """out, dq, dk and dv in float64, query after query; grouped heads."""
    mask = np.asarray(visible.mask(B, q.shape[1], k.shape[1]))
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    out, dq, dk, dv = np.zeros(dout.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        t, g = np.flatnonzero(mask[b, s]), h // group
        if not len(t):
            continue
        scores = k[b, t, g] @ q[b, s, h] * scale
        p = np.exp(scores - scores.max())
        p /= p.sum()
        out[b, s, h] = p @ v[b, t, g]
        dp = v[b, t, g] @ dout[b, s, h]
        ds = p * (dp - p @ dp) * scale
        dq[b, s, h] = ds @ k[b, t, g]
        dk[b, t, g] += np.outer(ds, q[b, s, h])
        dv[b, t, g] += np.outer(p, dout[b, s, h])
    return out, dq, dk, dv


def relative(found, right):
    found, right = np.asarray(found, np.float64), np.asarray(right, np.float64)
    assert found.shape == right.shape
    return np.linalg.norm(found - right) / np.linalg.norm(right)


def run(function, dout, *inputs):
    out, pullback = jax.vjp(function, *inputs)
    return out, *pullback(dout)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_equal_the_definition(case, implementation, blocks):
    if blocks != "one_block" and implementation != "blockwise":
        pytest.skip("only blockwise has blocks")
    queries, keys, visible = case
    q, k, v, dout = draw(queries, keys)
    attention = jax.jit(functools.partial(gqa_attention, visible=visible, scale=0.3, implementation=implementation))
    found = run(attention, dout, q, k, v)
    wanted = definition(q, k, v, visible, 0.3, dout)
    for mine, right in zip(found, wanted, strict=True):
        assert relative(mine, right) < 1e-5
    np.testing.assert_array_equal(np.asarray(found[0])[wanted[0] == 0], 0)  # queries that see nothing


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mla_is_attention_over_joined_keys(implementation):
    """N = 5, R = 2, V = 4; the gradient of the shared part is the sum over the heads."""
    q, k, v, dout = draw(S, S)
    q, dout, nope, pe = q[:, :, :3], dout[:, :, :3], k[..., :5], k[:, :, 0, 5:]
    visible = CASES["segments"][2]
    attention = jax.jit(functools.partial(mla_attention, visible=visible, scale=0.3, implementation=implementation))
    kv = jnp.concatenate([nope, v], axis=-1)
    joined = jnp.concatenate([nope, jnp.broadcast_to(pe[:, :, None], (B, S, 3, 2))], axis=-1)
    out, dq, dkv, dpe = run(attention, dout, q, kv, pe)
    right, dq64, dk64, dv64 = definition(q, joined, v, visible, 0.3, dout)
    for mine, wanted in (
        (out, right),
        (dq, dq64),
        (dkv, np.concatenate([dk64[..., :5], dv64], axis=-1)),
        (dpe, dk64[..., 5:].sum(axis=2)),
    ):
        assert relative(mine, wanted) < 1e-5


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("case", ["one_query", "positions"])
def test_decoding_reads_values_from_the_entries(case, implementation, blocks):
    queries, keys, visible = CASES[case]
    q, entry, _, _ = draw(queries, keys)
    entry, dout = entry[:, :, 0], jax.random.normal(jax.random.key(5), (B, queries, 6, 5))
    decode = functools.partial(mla_decode, visible=visible, scale=0.3, values=5, implementation=implementation)
    out, dq, dentry = run(jax.jit(decode), dout, q, entry)
    right = definition(q, entry[:, :, None], entry[:, :, None, :5], visible, 0.3, dout)
    assert relative(out, right[0]) < 1e-5 and relative(dq, right[1]) < 1e-5
    dentry_right = right[2][:, :, 0]
    dentry_right[..., :5] += right[3][:, :, 0]
    assert relative(dentry, dentry_right) < 1e-5


def test_bfloat16_stays_within_its_rounding(blocks):
    queries, keys, visible = CASES["segments"]
    q, k, v, dout = draw(queries, keys, jnp.bfloat16)
    attention = jax.jit(functools.partial(gqa_attention, visible=visible, scale=0.3, implementation="blockwise"))
    found = run(attention, dout, q, k, v)
    for mine, right in zip(found, definition(q, k, v, visible, 0.3, dout), strict=True):
        assert mine.dtype == jnp.bfloat16
        assert relative(mine, right) < 2**-7


def largest_array(jaxpr):
    """Elements of the largest array that a program and its inner ones compute."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["mla", "gqa", "segments"])
def test_the_gradient_at_32k_tokens_holds_no_array_of_half_its_scores(dtype, kind):
    """V2-Lite's widths: 16 heads, keys of 192, values of 128. The reference, as a check of the check, holds several."""
    size, heads = 32768, 16
    q, kv, pe, v = (
        jax.ShapeDtypeStruct((1, size, *rest), dtype) for rest in ((heads, 192), (heads, 256), (64,), (heads, 128))
    )
    segment_ids = jax.ShapeDtypeStruct((1, size), jnp.int32)

    def loss(implementation, segment_ids, *inputs):
        visible = Visible.rows(segment_ids if kind == "segments" else None)
        attention = gqa_attention if kind == "gqa" else mla_attention
        target = Target("tpu", "TPU v5p")
        out = attention(*inputs, visible=visible, scale=0.1, target=target, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    inputs = (q, q, v) if kind == "gqa" else (q, kv, pe)
    for implementation, small in (("auto", True), ("reference", False)):
        gradient = jax.grad(functools.partial(loss, implementation), argnums=(1, 2, 3))
        found = largest_array(jax.make_jaxpr(gradient)(segment_ids, *inputs).jaxpr)
        assert (found < size**2 // 2) == small, found


def test_one_block_has_no_loop_and_no_padding():
    attention = functools.partial(gqa_attention, visible=Visible(), scale=0.3, implementation="blockwise")
    text = str(jax.make_jaxpr(attention)(*draw(1, S)[:3]))
    assert not re.search(r"\b(while|scan|pad|dynamic_slice)\[", text)
    assert "while[" in str(jax.make_jaxpr(attention)(*draw(1200, 1200)[:3]))


def test_what_does_not_fit_is_refused_with_its_shapes():
    q, k, v, _ = draw(S, S)
    kv, pe = jnp.concatenate([k[..., :5], v], axis=-1), k[:, :, 0, 5:]
    q3 = q[:, :, :3]
    mla, gqa, decode = (inspect.unwrap(function) for function in (mla_attention, gqa_attention, mla_decode))
    for arrays in ((q3[:1], kv, pe), (q3, kv[:, 1:], pe), (q3, kv, pe[:, 1:]), (q3[..., :1], kv, pe)):
        with pytest.raises(ValueError, match=rf"q {re.escape(str(arrays[0].shape))}, kv .*, pe .*: expected"):
            mla(*arrays, Visible(), 0.3)
    with pytest.raises(ValueError, match=r"q .*, k .*, v .*: expected .* multiple of G"):
        gqa(q[:, :, :4], k, v, Visible(), 0.3)
    with pytest.raises(ValueError, match=r"values=9: expected"):
        decode(q, pe, Visible(), 0.3, values=9)
    with pytest.raises(ValueError, match="mla_attention of bfloat16, float32: expected one dtype"):
        mla(q3.astype(jnp.bfloat16), kv, pe, Visible(), 0.3)
    with pytest.raises(ValueError, match=r"visible.q_segments_BS \(2, 69\): expected \(2, 70\)"):
        gqa(q, k, v, Visible.rows(segments(69)), 0.3)
    with pytest.raises(ValueError, match="both or not at all"):
        gqa(q, k, v, Visible(q_segments_BS=segments(S)), 0.3)
    with pytest.raises(ValueError, match="implementation='flash' of gqa_attention: expected one of auto, c, cudnn"):
        gqa(q, k, v, Visible(), 0.3, implementation="flash")

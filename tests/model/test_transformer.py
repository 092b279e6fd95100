"""The whole network: against the equations, packed and cached, under every remat mode, and as pure halves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import oracle
from model.tiny import QWEN, V1, V2_LITE, V3, config, float64, relative_error, weights

from deepseek_jax.model.attention import Cache
from deepseek_jax.model.transformer import merge

TINY = config(V3)
# Two rows of three and two sequences, with padding before, between and behind them.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0], [0, 0, 4, 4, 4, 4, 0, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], [0, 0, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)


@functools.cache
def compiled(tiny, mtp=False):
    def run(params, bias, tokens, positions, segments):
        model = merge(tiny, params, bias)
        return model(tokens, positions_BS=positions, segment_ids_BS=segments, mtp=mtp)

    return jax.jit(run)


def forward(tiny=TINY, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS):
    mtp = tiny.num_nextn_predict_layers > 0
    return compiled(tiny, mtp)(*weights(tiny), tokens, positions, segments)


def sequences(segments=SEGMENTS):
    """(row, its columns) of each packed sequence."""
    for row, ids in enumerate(segments):
        for segment in sorted(set(ids[ids > 0].tolist())):
            yield row, np.flatnonzero(ids == segment)


@functools.cache
def expected(tiny):
    """Each sequence by itself, from the equations."""
    params, bias = float64(weights(tiny))
    return [oracle.transformer(params, bias, tiny, TOKENS[row, columns]) for row, columns in sequences()]


@pytest.mark.parametrize(
    "tiny",
    [TINY, config(V2_LITE, scan_unroll=2), config(QWEN)],
    ids=["v3", "v2_lite_unrolled", "dense_tied_bias"],
)
def test_packed_rows_equal_the_equations_of_each_sequence(tiny):
    out = forward(tiny)
    rows = list(zip(sequences(), expected(tiny), strict=True))
    for name in ("hidden", "logits"):
        value = np.concatenate([getattr(out, name)[row, columns] for (row, columns), _ in rows])
        assert relative_error(value, np.concatenate([right[name] for _, right in rows])) < 1e-5, name
    assert out.logits.dtype == jnp.float32 and out.cache is None
    if tiny.num_nextn_predict_layers:
        value = np.concatenate([out.mtp_hidden[row, columns[:-1]] for (row, columns), _ in rows])
        right = np.concatenate([right["mtp_hidden"] for _, right in rows if "mtp_hidden" in right])
        assert relative_error(value, right) < 1e-5
    if not tiny.n_routed_experts:
        assert out.router is None
        return
    # A sequence of one token has no MTP position: its last router row is empty.
    for layer in range(tiny.num_routers):
        stats = [right for _, right in rows if layer < len(right["load"])]
        np.testing.assert_array_equal(out.router.load_E[layer], sum(right["load"][layer] for right in stats))
        np.testing.assert_allclose(
            out.router.balance[layer], sum(right["balance"][layer] for right in stats), rtol=1e-5
        )
    assert out.router.load_E.shape == (tiny.num_routers, tiny.n_routed_experts)
    assert out.router.experts_BSK.shape == (tiny.num_routers, *TOKENS.shape, tiny.num_experts_per_tok)


def test_packed_equals_separate():
    """The same program on rows that hold one sequence each, moved to the row's start."""
    packed = forward()
    load, balance = 0, 0.0
    for row, columns in sequences():
        n = len(columns)
        tokens, positions, segments = (np.zeros_like(TOKENS) for _ in range(3))
        tokens[0, :n], positions[0, :n], segments[0, :n] = TOKENS[row, columns], np.arange(n), 1
        alone = forward(tokens=tokens, positions=positions, segments=segments)
        assert relative_error(packed.hidden[row, columns], alone.hidden[0, :n]) < 1e-5
        if n > 1:
            assert relative_error(packed.mtp_hidden[row, columns[:-1]], alone.mtp_hidden[0, : n - 1]) < 1e-5
        load, balance = load + alone.router.load_E, balance + alone.router.balance
    np.testing.assert_array_equal(packed.router.load_E, load)
    np.testing.assert_allclose(packed.router.balance, balance, rtol=1e-5)


def test_the_future_changes_nothing():
    ones, line = np.ones_like(SEGMENTS), np.tile(np.arange(12, dtype=np.int32), (2, 1))
    base = forward(positions=line, segments=ones)
    for column in (3, 11):
        tokens = TOKENS.copy()
        tokens[:, column] = (tokens[:, column] + 1) % TINY.vocab_size
        changed = forward(tokens=tokens, positions=line, segments=ones)
        np.testing.assert_allclose(changed.hidden[:, :column], base.hidden[:, :column], rtol=1e-5, atol=1e-6)
        assert np.all(np.abs(changed.hidden[:, column:] - base.hidden[:, column:]).max(-1) > 1e-3)
        # MTP reads the next token: it sees one column further, and no more.
        np.testing.assert_allclose(
            changed.mtp_hidden[:, : column - 1], base.mtp_hidden[:, : column - 1], rtol=1e-5, atol=1e-6
        )
        assert np.all(np.abs(changed.mtp_hidden[:, column - 1] - base.mtp_hidden[:, column - 1]).max(-1) > 1e-3)


# The cache

LENGTHS, PREFILL, COLUMNS = (9, 7, 6), 5, 12


def generate(tiny, *, prefill_absorbed, decode_absorbed):
    """Logits of three rows of different lengths: first a chunk, padded on the left, then token by token."""

    params, bias = weights(tiny)

    @functools.partial(jax.jit, static_argnames="absorbed")
    def step(tokens, positions, cache, absorbed):
        return merge(tiny, params, bias)(tokens, positions_BS=positions, cache=cache, absorbed=absorbed)

    rng, total = np.random.default_rng(1), max(LENGTHS)
    tokens = rng.integers(0, tiny.vocab_size, (len(LENGTHS), total)).astype(np.int32)
    positions = np.stack([np.maximum(np.arange(total) - (total - n), -1) for n in LENGTHS]).astype(np.int32)
    out = step(
        tokens[:, :PREFILL],
        positions[:, :PREFILL],
        Cache.empty(tiny, len(LENGTHS), COLUMNS),
        prefill_absorbed,
    )
    logits, load = [out.logits], out.router.load_E if out.router else 0
    for t in range(PREFILL, total):
        out = step(tokens[:, t : t + 1], positions[:, t : t + 1], out.cache, decode_absorbed)
        logits.append(out.logits)
        load = load + (out.router.load_E if out.router else 0)
    assert out.cache.length == total
    return tokens, np.concatenate(logits, axis=1), load


@pytest.mark.parametrize(
    ("tiny", "prefill_absorbed", "decode_absorbed"),
    [(TINY, False, True), (config(V2_LITE), True, False), (config(V1), False, False)],
    ids=["mla_plain_then_absorbed", "mla_absorbed_then_plain_yarn_bias", "gqa"],
)
def test_prefill_then_decode_equals_the_full_forward_at_every_position(tiny, prefill_absorbed, decode_absorbed):
    tokens, logits, load = generate(tiny, prefill_absorbed=prefill_absorbed, decode_absorbed=decode_absorbed)
    # The full forward: each row at the start of a row of twelve, in the scanned, uncached program.
    plain = dataclasses.replace(tiny, num_nextn_predict_layers=0)
    params, bias = weights(tiny)
    params = {name: value for name, value in params.items() if name != "mtp"}
    bias = None if bias is None else bias[: plain.num_routers]
    padded, segments = np.zeros((3, 12), np.int32), np.zeros((3, 12), np.int32)
    for row, n in enumerate(LENGTHS):
        padded[row, :n], segments[row, :n] = tokens[row, -n:], 1
    positions = np.tile(np.arange(12, dtype=np.int32), (3, 1))
    full = compiled(plain)(params, bias, padded, positions, segments)
    for row, n in enumerate(LENGTHS):
        assert relative_error(logits[row, -n:], full.logits[row, :n]) < 1e-5
    np.testing.assert_array_equal(load, full.router.load_E)  # padding on the left is in no load


# Training


def test_remat_modes_give_the_same_loss_and_gradients():
    tiny = config(V3, num_hidden_layers=1, first_k_dense_replace=0)
    params, bias = weights(tiny)
    probe = np.random.default_rng(2).standard_normal((2, *SEGMENTS.shape, tiny.hidden_size)).astype(np.float32)

    def loss(params, remat):
        model = merge(dataclasses.replace(tiny, remat=remat), params, bias)
        tokens, positions, segments = map(jnp.asarray, (TOKENS, POSITIONS, SEGMENTS))
        out = model(tokens, positions_BS=positions, segment_ids_BS=segments, mtp=True, head=False)
        assert out.logits is None and out.router is not None
        return jnp.sum(out.hidden * probe[0] + out.mtp_hidden * probe[1]) + jnp.sum(out.router.balance)

    results = [jax.jit(jax.value_and_grad(functools.partial(loss, remat=m)))(params) for m in ("none", "dots", "full")]
    value, grads = results[0]
    for other, other_grads in results[1:]:
        np.testing.assert_allclose(other, value, rtol=1e-5)
        errors = jax.tree.map(relative_error, _trained(other_grads), _trained(grads))
        assert max(jax.tree.leaves(errors)) < 1e-5, errors


def _trained(grads):
    """Without the head, which this loss does not reach."""
    assert not np.any(grads["head"]["w"])
    return {name: grad for name, grad in grads.items() if name != "head"}


def test_bfloat16_computes_close_to_float64():
    tiny = config(V3, dtype="bfloat16")
    out = compiled(tiny, True)(*weights(TINY), TOKENS, POSITIONS, SEGMENTS)
    assert out.hidden.dtype == out.mtp_hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    errors = [
        relative_error(out.logits[row, column], right["logits"][i])
        for (row, columns), right in zip(sequences(), expected(TINY), strict=True)
        for i, column in enumerate(columns)
    ]
    # Four blocks of roundings of 2⁻⁸; here and there a rounding also picks another expert.
    assert np.median(errors) < 0.04 and max(errors) < 1
    assert jax.tree.leaves(weights(config(V3, param_dtype="bfloat16"))[0])[0].dtype == jnp.bfloat16
    assert Cache.empty(tiny, 1, 1).layers[0].dtype == jnp.bfloat16


def test_mtp_where_there_is_none_is_refused():
    model = merge(config(QWEN), *weights(config(QWEN)))
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        jax.eval_shape(lambda: model(jnp.asarray(TOKENS), mtp=True))

"""The whole network: against the equations, packed and cached, under every remat mode, and as pure halves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import oracle
from model.tiny import QWEN, V1, V2_LITE, V3, Columns, config, float64, relative_error, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.model.parameters import abstract_arrays, merge, unstack
from deepseek_jax.model.transformer import joined
from deepseek_kernels import Visible

TINY = config(V3)
# Two rows of three and two sequences, with padding before, between and behind them.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 0, 0], [0, 0, 4, 4, 4, 4, 0, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], [0, 0, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, SEGMENTS.shape).astype(np.int32)


@functools.cache
def compiled(tiny, mtp=False, compute=ComputeConfig()):
    def run(params, bias, tokens, positions, segments):
        model = merge(tiny, params, bias, compute)
        return model(tokens, positions_BS=positions, segment_ids_BS=segments, mtp=mtp)

    return jax.jit(run)


def forward(tiny=TINY, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS, compute=ComputeConfig()):
    mtp = tiny.num_nextn_predict_layers > 0
    return compiled(tiny, mtp, compute)(*weights(tiny), tokens, positions, segments)


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
    ("tiny", "unroll"),
    [(TINY, 1), (config(V2_LITE), 2), (config(QWEN), 1)],
    ids=["v3", "v2_lite_unrolled", "dense_tied_bias"],
)
def test_packed_rows_equal_the_equations_of_each_sequence(tiny, unroll):
    out = forward(tiny, compute=ComputeConfig(scan_unroll=unroll))
    rows = list(zip(sequences(), expected(tiny), strict=True))
    for name in ("hidden", "logits"):
        value = np.concatenate([getattr(out, name)[row, columns] for (row, columns), _ in rows])
        assert relative_error(value, np.concatenate([right[name] for _, right in rows])) < 1e-5, name
    assert out.logits.dtype == jnp.float32 and out.memories is None
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


# Memories

LENGTHS, PREFILL, COLUMNS = (9, 7, 6), 5, 12


def generate(tiny, *, prefill_absorbed, decode_absorbed, stacked=False):
    """Logits of three rows of different lengths: first a chunk, padded on the left, then token by token."""
    params, bias = weights(tiny)
    params = params if stacked else unstack(params)

    @functools.partial(jax.jit, static_argnames="absorbed")
    def step(tokens, positions, columns, memories, absorbed):
        start = memories[0].length.reshape(-1)[0]
        columns = jax.lax.dynamic_update_slice(columns, positions, (0, start))
        hidden = jnp.where(columns < 0, 99, columns)  # the future of every query
        return columns, merge(tiny, params, bias)(
            tokens,
            positions_BS=positions,
            segment_ids_BS=(positions >= 0).astype(jnp.int32),
            visible=Visible(q_positions_BS=positions, k_positions_BT=hidden),
            memories=memories,
            absorbed=absorbed,
        )

    rng, total = np.random.default_rng(1), max(LENGTHS)
    tokens = rng.integers(0, tiny.vocab_size, (len(LENGTHS), total)).astype(np.int32)
    positions = np.stack([np.maximum(np.arange(total) - (total - n), -1) for n in LENGTHS]).astype(np.int32)
    empty = Columns.empty(tiny, len(LENGTHS), COLUMNS)
    memories = (empty,) * tiny.num_hidden_layers
    if stacked:
        counts = [count for count in (tiny.num_dense_layers, tiny.num_moe_layers) if count]
        memories = tuple(jax.tree.map(lambda leaf, n=n: jnp.stack([leaf] * n), empty) for n in counts)
    columns = jnp.full((len(LENGTHS), COLUMNS), -1, jnp.int32)
    columns, out = step(tokens[:, :PREFILL], positions[:, :PREFILL], columns, memories, prefill_absorbed)
    logits, load = [out.logits], out.router.load_E if out.router else 0
    for t in range(PREFILL, total):
        part = tokens[:, t : t + 1], positions[:, t : t + 1]
        columns, out = step(*part, columns, out.memories, decode_absorbed)
        logits.append(out.logits)
        load = load + (out.router.load_E if out.router else 0)
    return tokens, np.concatenate(logits, axis=1), load


@pytest.mark.parametrize(
    ("tiny", "options"),
    [
        (TINY, dict(prefill_absorbed=False, decode_absorbed=True)),
        (TINY, dict(prefill_absorbed=False, decode_absorbed=True, stacked=True)),
        (config(V2_LITE), dict(prefill_absorbed=True, decode_absorbed=False)),
        (config(V2_LITE), dict(prefill_absorbed=False, decode_absorbed=True, stacked=True)),
        (config(V1), dict(prefill_absorbed=False, decode_absorbed=False)),
    ],
    ids=["mla_plain_then_absorbed", "scanned", "mla_absorbed_then_plain_yarn_bias", "scanned_yarn_bias", "gqa"],
)
def test_prefill_then_decode_equals_the_full_forward_at_every_position(tiny, options):
    tokens, logits, load = generate(tiny, **options)
    # The full forward: each row at the start of a row of twelve, in the scanned program without memories.
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


def test_runs_of_layers_one_after_the_other_are_the_network():
    """A pipeline's stages: cut within the MoE layers, which the second run continues with its own rows of the bias."""
    tiny = config(V3, num_hidden_layers=4)

    def stages(params, bias):
        model = merge(tiny, params, bias)
        context, x = model.context(jnp.asarray(TOKENS)), model.embedded(jnp.asarray(TOKENS))
        found = []
        for first, count in ((0, 2), (2, 1), (3, 1)):
            x, stats, _ = model.run_layers(x, context, first=first, count=count)
            found.append(stats)
        stats = joined(found)
        assert stats is not None
        return model.norm(x), stats.load_E, model(jnp.asarray(TOKENS), head=False)

    for params in (weights(tiny)[0], unstack(weights(tiny)[0])):
        hidden, load_LE, whole = jax.jit(stages)(params, weights(tiny)[1])
        assert relative_error(hidden, whole.hidden) < 1e-6
        np.testing.assert_array_equal(load_LE, whole.router.load_E)


def test_experts_that_a_sampler_chose_are_taken():
    """Every layer's, MTP's too, in another order; -1 leaves a choice to the router."""
    base = forward()
    chosen = base.router.experts_BSK[..., ::-1].at[:, 0, :3].set(-1)
    model = merge(TINY, *weights(TINY))
    rows: Any = dict(positions_BS=jnp.asarray(POSITIONS), segment_ids_BS=jnp.asarray(SEGMENTS), mtp=True)
    same = jax.jit(lambda chosen: model(jnp.asarray(TOKENS), chosen_LBSK=chosen, **rows))(chosen)
    assert relative_error(same.logits, base.logits) < 1e-5
    assert relative_error(same.mtp_hidden, base.mtp_hidden) < 1e-5
    other = jax.jit(lambda chosen: model(jnp.asarray(TOKENS), chosen_LBSK=chosen, **rows))((chosen + 1) % 8)
    np.testing.assert_array_equal(other.router.experts_BSK, (chosen + 1) % 8)
    assert relative_error(other.logits, base.logits) > 0.1


# Training


def test_remat_modes_give_the_same_loss_and_gradients():
    tiny = config(V3, num_hidden_layers=1, first_k_dense_replace=0)
    params, bias = weights(tiny)
    probe = np.random.default_rng(2).standard_normal((2, *SEGMENTS.shape, tiny.hidden_size)).astype(np.float32)

    def loss(params, remat):
        model = merge(tiny, params, bias, ComputeConfig(remat=remat))
        tokens, positions, segments = map(jnp.asarray, (TOKENS, POSITIONS, SEGMENTS))
        out = model(tokens, positions_BS=positions, segment_ids_BS=segments, mtp=True, head=False)
        assert out.logits is None and out.router is not None
        return jnp.sum(out.hidden * probe[0] + out.mtp_hidden * probe[1]) + jnp.sum(out.router.balance)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, remat=m)))(params) for m in ("none", "kernels", "full")
    ]
    value, grads = results[0]
    for other, other_grads in results[1:]:
        np.testing.assert_allclose(other, value, rtol=1e-5)
        errors = jax.tree.map(relative_error, _trained(other_grads), _trained(grads))
        assert max(jax.tree.leaves(errors)) < 1e-5, errors


@pytest.mark.parametrize(("unroll", "looped"), [(1, 1), (2, 0)])
def test_only_a_loops_body_may_be_found_again(unroll, looped):
    """One dense layer, two of experts and the MTP module: XLA may look for equal terms in a real loop alone."""
    model = merge(TINY, *weights(TINY), ComputeConfig(remat="full", scan_unroll=unroll))
    program = str(jax.make_jaxpr(lambda tokens: model(tokens, mtp=True).mtp_hidden)(jnp.asarray(TOKENS)))
    assert (program.count("prevent_cse=False"), program.count("prevent_cse=True")) == (looped, 3 - looped)


def _trained(grads):
    """Without the head, which this loss does not reach."""
    assert not np.any(grads["head"]["w"])
    return {name: grad for name, grad in grads.items() if name != "head"}


def test_bfloat16_computes_close_to_float64():
    out = forward(compute=ComputeConfig(dtype="bfloat16"))
    assert out.hidden.dtype == out.mtp_hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    errors = [
        relative_error(out.logits[row, column], right["logits"][i])
        for (row, columns), right in zip(sequences(), expected(TINY), strict=True)
        for i, column in enumerate(columns)
    ]
    # Four blocks of roundings of 2⁻⁸; here and there a rounding also picks another expert.
    assert np.median(errors) < 0.04 and max(errors) < 1
    stored, _ = abstract_arrays(TINY, ComputeConfig(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}


def test_mtp_where_there_is_none_is_refused():
    model = merge(config(QWEN), *weights(config(QWEN)))
    with pytest.raises(ValueError, match="num_nextn_predict_layers"):
        jax.eval_shape(lambda: model(jnp.asarray(TOKENS), mtp=True))

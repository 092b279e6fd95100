"""Scores of targets against a plain softmax, and the language-model loss against loops over its tokens."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V3, config, relative_error, weights
from train.cases import BATCH, LENGTHS, TINY, S, documents, on_device, pack

from deepseek_jax.model import parameters
from deepseek_jax.model.dropping import Balancing
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.losses import LanguageModelLoss, cross_entropy, score_targets

PARAMS, BIAS = weights(TINY)
ISOLATED = LanguageModelLoss(mtp_weight_late=0.1, mtp_late_from=100, balance_weight=0.01, isolate=True, chunk=6)
JOINED = dataclasses.replace(ISOLATED, isolate=False)
TERMS = ("ce", "mtp", "balance")


@functools.cache
def compiled(loss):
    """One program for the loss, its parts, and the gradient of a combination of loss and terms."""

    def run(params, step, batch, norm, cotangent):
        def values(params):
            value, parts = loss(parameters.merge(TINY, params, BIAS), batch, norm, step)
            return jnp.stack([value, *(parts[name] for name in TERMS)]), parts

        found, gradient, parts = jax.vjp(values, params, has_aux=True)
        return found[0], parts, gradient(cotangent)[0]

    return jax.jit(run)


def evaluate(loss, batch, *, gradient_of="loss", step=0):
    """Batches of less than eight rows are filled up, so that one program serves all."""
    rows = len(batch["tokens"])
    batch = on_device({name: np.pad(value, ((0, max(0, 8 - rows)), (0, 0))) for name, value in batch.items()})
    cotangent = jnp.float32([name == gradient_of for name in ("loss", *TERMS)])
    return jax.device_get(compiled(loss)(PARAMS, jnp.int32(step), batch, loss.normalisers(batch), cotangent))


def gradient_of(name, batch, loss=ISOLATED):
    return evaluate(loss, batch, gradient_of=name)[2]


# Scores


def plain_scores(hidden, w, targets, temperature):
    """log softmax at the targets, entropy, and d(sum of the former)/d(hidden, w), in float64."""
    hidden, w = np.asarray(hidden, np.float64), np.asarray(w, np.float64)
    logits = hidden @ w / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    one_hot = np.eye(w.shape[1])[targets]
    d_logits = (one_hot - p) / temperature
    gradients = d_logits @ w.T, np.einsum("bsd,bsw->dw", hidden, d_logits)
    return np.log((p * one_hot).sum(-1)), -(p * np.log(p)).sum(-1), gradients


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_chunked_scores_equal_the_plain_softmax(chunk, temperature):
    rng = np.random.default_rng(chunk)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 5)), jnp.float32)
    w = jnp.asarray(2 * rng.standard_normal((5, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32)
    divisor = None if temperature is None else jnp.float32([[temperature], [1.0]])

    def total(hidden, w):
        scores = score_targets(hidden, w, targets, chunk=chunk, temperature_B1=divisor)
        return jnp.sum(scores.logprob_BS), scores

    (_, scores), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, w)
    by = 1.0 if divisor is None else np.asarray(divisor)[..., None]
    logprob, entropy, expected = plain_scores(hidden, w, targets, by)
    assert scores.logprob_BS.dtype == jnp.float32
    assert relative_error(scores.logprob_BS, logprob) < 1e-6
    assert relative_error(scores.entropy_BS, entropy) < 5e-5
    for gradient, plain in zip(gradients, expected, strict=True):
        assert relative_error(gradient, plain) < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("dtype, w_dtype", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_cross_entropy_and_its_gradient_equal_the_scores(chunk, dtype, w_dtype):
    """Weighted, zero weights included, behind a factor; bfloat16 within its rounding of 2⁻⁸."""
    rng = np.random.default_rng(chunk)
    hidden = jnp.asarray(rng.standard_normal((2, 7, 5)), dtype)
    w = jnp.asarray(2 * rng.standard_normal((5, 11)), jnp.bfloat16).astype(w_dtype)
    targets = jnp.asarray(rng.integers(0, 11, (2, 7)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(2, 7)) * rng.integers(0, 2, (2, 7)), jnp.float32)

    def fused(hidden, w):
        return 3 * cross_entropy(hidden, w, targets, weights, chunk)

    def plain(hidden, w):
        return -3 * jnp.sum(jax.nn.log_softmax(hidden @ w)[*np.indices((2, 7)), targets] * weights)

    value, gradients = jax.value_and_grad(fused, argnums=(0, 1))(hidden, w)
    expected, exact = jax.value_and_grad(plain, argnums=(0, 1))(*(x.astype(jnp.float32) for x in (hidden, w)))
    assert relative_error(value, expected) < 1e-6 and relative_error(fused(hidden, w), expected) < 1e-6
    for gradient, right, wanted in zip(gradients, exact, (dtype, w_dtype), strict=True):
        assert gradient.dtype == wanted
        assert relative_error(gradient, right) < (1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("function", ["cross_entropy", "score_targets"])
def test_the_heads_products_against_float64(function, dtype, error):
    """Float32 sums of products in the compute dtype; w's gradient is not rounded to it."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 60, 48)), dtype)
    w = jnp.asarray(0.2 * rng.standard_normal((48, 96)), jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, 96, (2, 60)), jnp.int32)

    def total(hidden, w):
        if function == "cross_entropy":
            return -cross_entropy(hidden, w, targets, jnp.ones((2, 60)), 16)
        return jnp.sum(score_targets(hidden, w, targets, chunk=16).logprob_BS)

    value, (d_hidden, d_w) = jax.value_and_grad(total, argnums=(0, 1))(hidden, w)
    logprob, _, expected = plain_scores(hidden, w, targets, 1.0)
    assert relative_error(value, logprob.sum()) < 1e-6
    assert (d_hidden.dtype, d_w.dtype) == (dtype, jnp.float32)
    assert relative_error(d_hidden, expected[0]) < error and relative_error(d_w, expected[1]) < error
    assert dtype == "float32" or np.any(d_w != d_w.astype(dtype))


def test_entropy_has_no_gradient():
    hidden, w = jnp.ones((1, 3, 2)), jnp.arange(8.0).reshape(2, 4)
    targets = jnp.zeros((1, 3), jnp.int32)
    entropy = lambda hidden, w: jnp.sum(score_targets(hidden, w, targets, chunk=2).entropy_BS)  # noqa: E731
    assert all(not np.any(g) for g in jax.grad(entropy, argnums=(0, 1))(hidden, w))


def largest_array(jaxpr) -> int:
    """Elements of the largest value that any equation makes, those inside scans and calls included."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            largest = max(largest, math.prod(getattr(variable.aval, "shape", ())))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                largest = max(largest, largest_array(inner))
    return largest


@pytest.mark.parametrize("chunk, holds_all", [(4, False), (S, True)])
def test_all_logits_are_never_held_at_once(chunk, holds_all):
    """In the loss with MTP and its gradient, for a vocabulary that outweighs everything else."""
    wide = config(V3, num_hidden_layers=2, vocab_size=4096)
    loss = LanguageModelLoss(chunk=chunk, isolate=True)
    params, bias = jax.eval_shape(lambda: parameters.init(wide))
    run = lambda p, b, x: loss(parameters.merge(wide, p, b), x, loss.normalisers(x), jnp.int32(0))  # noqa: E731
    found = largest_array(jax.make_jaxpr(jax.grad(run, has_aux=True))(params, bias, on_device(BATCH)).jaxpr)
    assert (found >= len(LENGTHS) * S * wide.vocab_size) == holds_all


# The language-model loss


@functools.cache
def forward():
    return jax.jit(
        lambda params, bias, batch: parameters.merge(TINY, params, bias)(
            batch["tokens"], positions_BS=batch["positions"], segment_ids_BS=batch["segment_ids"], mtp=True
        )
    )


def token_loop(batch, isolate):
    """Cross-entropy and MTP loss, target by target: token t is guessed at t-1, and by MTP at t-2."""
    if not isolate:
        segments = (batch["segment_ids"] > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(S, dtype=np.int32), segments.shape)
        batch = batch | {"segment_ids": segments, "positions": positions}
    out = forward()(PARAMS, BIAS, on_device(batch))
    head = np.asarray(PARAMS["head"]["w"], np.float64)
    sums = {}
    for name, hidden, ahead in (("ce", out.hidden, 1), ("mtp", out.mtp_hidden, 2)):
        logits = np.asarray(hidden, np.float64) @ head
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats = [
            -logprobs[row, t - ahead, batch["tokens"][row, t]]
            for row in range(len(logits))
            for t in range(ahead, S)
            if batch["loss_mask"][row, t] and batch["segment_ids"][row, t] == batch["segment_ids"][row, t - ahead] > 0
        ]
        sums[name] = np.sum(nats) / len(nats)
    return sums, out.router


@pytest.mark.parametrize("loss", [ISOLATED, JOINED], ids=["isolated", "joined"])
def test_loss_equals_a_loop_over_its_targets(loss):
    value, parts, *_ = evaluate(loss, BATCH)
    expected, router = token_loop(BATCH, loss.isolate)
    assert parts["ce"] == pytest.approx(expected["ce"], rel=1e-5)
    assert parts["mtp"] == pytest.approx(expected["mtp"], rel=1e-5)
    sequences = sum(len(row) if loss.isolate else bool(row) for row in LENGTHS)
    balance = float(np.sum(router.balance)) / sequences
    assert parts["balance"] == pytest.approx(balance, rel=1e-5)
    total = expected["ce"] + 0.3 * expected["mtp"] + 0.01 * balance
    assert value == pytest.approx(total, rel=1e-5)
    np.testing.assert_array_equal(parts["load"], router.load_E)


@pytest.mark.parametrize("target", [1, 2, 9, S - 1])
def test_a_target_is_guessed_from_the_tokens_before_it(target):
    """With one target in the row, gradient reaches the embeddings of the tokens before it, and no other."""
    tokens = np.random.default_rng(0).permutation(TINY.vocab_size)[:S].tolist()
    batch = pack([[(tokens, [int(t == target) for t in range(S)])]])
    embeds = {name: gradient_of(name, batch)["embed"] for name in ("ce", "mtp")}
    reached = {name: set(np.flatnonzero(np.any(embed, axis=1)).tolist()) for name, embed in embeds.items()}
    assert reached["ce"] == set(tokens[:target])
    # MTP guesses t from the hidden state at t-2 and the token t-1: token 1 has no such state.
    assert reached["mtp"] == (set(tokens[:target]) if target >= 2 else set())


def test_every_term_counts_and_has_a_gradient():
    _, parts, total = evaluate(ISOLATED, BATCH)
    terms = {name: gradient_of(name, BATCH) for name in TERMS}
    assert all(parts[name] > 0.1 for name in TERMS)
    for name in TERMS:
        assert np.linalg.norm(terms[name]["moe_layers"]["mlp"]["router"]) > 1e-3, name
        assert np.linalg.norm(terms[name]["embed"]) > 1e-3, name
    assert np.linalg.norm(terms["mtp"]["mtp"]["proj"]["w"]) > 1e-3
    assert not np.any(terms["ce"]["mtp"]["proj"]["w"])
    assert np.linalg.norm(terms["balance"]["mtp"]["block"]["mlp"]["router"]) > 1e-3
    summed = jax.tree.map(lambda *g: g[0] + 0.3 * g[1] + 0.01 * g[2], *(terms[name] for name in TERMS))
    assert_same(total, summed)


def assert_same(tree, expected):
    """Within 1e-5 of each array's norm."""

    def check(path, value, wanted):
        assert np.linalg.norm(value - wanted) <= 1e-5 * np.linalg.norm(wanted), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, tree, expected)


def separate(rows):
    """The same documents, one to a row."""
    return pack([[document] for row in rows for document in row])


def assert_same_loss(loss, batch, other):
    value, parts, gradient = evaluate(loss, batch)
    other_value, other_parts, other_gradient = evaluate(loss, other)
    assert value == pytest.approx(other_value, rel=1e-5)
    for name in TERMS:
        assert parts[name] == pytest.approx(other_parts[name], rel=1e-5), name
    np.testing.assert_array_equal(parts["load"], other_parts["load"])
    assert_same(gradient, other_gradient)
    for name in TERMS:
        assert_same(gradient_of(name, batch, loss), gradient_of(name, other, loss))


def test_packed_documents_give_the_loss_of_separate_ones():
    rows = [documents(10, [5, 7, 4]), documents(11, [8, 2]), documents(12, [2, 1, 6])]
    assert_same_loss(ISOLATED, pack(rows), separate(rows))


@pytest.mark.parametrize("loss", [ISOLATED, JOINED], ids=["isolated", "joined"])
def test_padding_changes_nothing(loss):
    """Neither its tokens, nor rows of nothing else."""
    rows = [documents(20, [5, 6]), documents(21, [9]), documents(22, [3, 3, 3])]
    assert_same_loss(loss, pack(rows), pack([[], *rows, []], pad=7))


def test_more_padding_behind_each_row_changes_nothing():
    rows = [documents(20, [5, 6]), documents(21, [9])]
    assert_same_loss(ISOLATED, pack(rows), pack(rows, size=S + 5, pad=3))


def test_attention_across_documents_is_a_field():
    """Another first document changes what the second is predicted with, unless it is isolated."""
    (tokens, _), second = documents(30, [6, 8])
    rows = [[([(token + shift) % TINY.vocab_size for token in tokens], [0] * 6), second] for shift in (0, 1)]
    joined = [evaluate(JOINED, pack([row]))[1]["ce"] for row in rows]
    isolated = [evaluate(ISOLATED, pack([row]))[1]["ce"] for row in rows]
    assert abs(joined[0] - joined[1]) > 1e-3
    assert isolated[0] == pytest.approx(isolated[1], rel=1e-6)


def test_mtp_weight_falls_at_its_step():
    values = []
    for step in (99, 100):
        value, parts, *_ = evaluate(ISOLATED, BATCH, step=step)
        values.append((value - parts["ce"] - 0.01 * parts["balance"]) / parts["mtp"])
    np.testing.assert_allclose(values, [0.3, 0.1], rtol=1e-4)


V2S = dataclasses.replace(ISOLATED, device_balance_weight=0.05, communication_weight=0.02, balance_devices=4)
DROPPING = dataclasses.replace(V2S, drop_capacity=1.0, drop_spared=0.5)


@pytest.fixture(scope="module")
def v2s_terms():
    """(value, parts, gradient) of V2's losses and dropping, on one device."""
    return evaluate(DROPPING, BATCH)


def test_v2s_losses_over_devices_are_means_over_sequences():
    value, parts, _ = evaluate(V2S, BATCH)
    batch = on_device(BATCH)

    @jax.jit
    def routers(params, tokens, positions, segments):
        model = parameters.merge(TINY, params, BIAS)
        options = {"positions_BS": positions, "segment_ids_BS": segments, "mtp": True, "head": False}
        return model(tokens, balancing=Balancing(4), **options).router

    router = routers(PARAMS, *(batch[name] for name in ("tokens", "positions", "segment_ids")))
    sequences = sum(map(len, LENGTHS))
    for name in ("device_balance", "communication"):
        assert parts[name] == pytest.approx(float(jnp.sum(getattr(router, name))) / sequences, rel=1e-5)
    plain, alone, _ = evaluate(ISOLATED, BATCH)
    assert value == pytest.approx(plain + 0.05 * parts["device_balance"] + 0.02 * parts["communication"], rel=1e-6)
    assert alone.keys() == parts.keys() - {"device_balance", "communication"} and "dropped" not in parts


def test_dropping_changes_the_loss_and_is_counted(v2s_terms):
    value, parts, gradient = v2s_terms
    whole, all_parts, _ = evaluate(V2S, BATCH)
    assert parts["dropped"].shape == (TINY.num_routers,) and np.all(parts["dropped"] > 0)
    assert parts["ce"] != all_parts["ce"] and value != whole
    np.testing.assert_array_equal(parts["load"][0], all_parts["load"][0])  # what was chosen, in the first layer
    most = TINY.num_experts_per_tok * np.sum(BATCH["segment_ids"] > 0)
    assert np.all(parts["dropped"] < 0.5 * most)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    found, parts, _ = evaluate(dataclasses.replace(DROPPING, drop_spared=1.0), BATCH)
    assert found == pytest.approx(whole, rel=1e-6) and not np.any(parts["dropped"])  # no one may lose any


@pytest.mark.parametrize("axes", [{"data": 2, "expert": 4}, {"expert": 2, "fsdp": 2, "context": 2}], ids=str)
def test_a_mesh_changes_neither_v2s_losses_nor_what_is_dropped(v2s_terms, axes):
    mesh = make_mesh(MeshConfig(**axes))

    def run(params, batch):
        norm = DROPPING.normalisers(batch)
        return DROPPING(parameters.merge(TINY, params, BIAS), batch, norm, jnp.int32(0))

    with jax.set_mesh(mesh):
        (value, parts), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(PARAMS, place_batch(BATCH, mesh))
    assert value == pytest.approx(v2s_terms[0], rel=1e-5)
    np.testing.assert_array_equal(parts["dropped"], v2s_terms[1]["dropped"])
    assert_same(gradient, v2s_terms[2])


def test_a_batch_without_targets_gives_zero_not_nan():
    value, parts, gradient = evaluate(ISOLATED, pack([[]]))
    assert value == 0 and not np.any(parts["load"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk=0"):
        LanguageModelLoss(chunk=0)
    with pytest.raises(ValueError, match="balance_devices=1: must be at least 2"):
        LanguageModelLoss(balance_devices=1)
    with pytest.raises(ValueError, match=r"drop_spared=1.5: must lie in \[0, 1\]"):
        LanguageModelLoss(drop_spared=1.5)
    with pytest.raises(ValueError, match="isolate='yes'.*bool"):
        LanguageModelLoss(isolate="yes")  # pyright: ignore[reportArgumentType]

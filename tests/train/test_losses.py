"""The language-model loss against loops over its tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import weights
from train.cases import BATCH, LENGTHS, TINY, S, documents, on_device, pack

from deepseek_jax.model import parameters
from deepseek_jax.model.dropping import Balancing
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.losses import LanguageModelLoss

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

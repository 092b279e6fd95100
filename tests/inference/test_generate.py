"""Generation against the full forward pass, in one batch of prompts of different length."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V1, V3, config, weights

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.requests import make_requests, shared
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import sampling_config, sampling_rules, sampling_weights
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules

MODELS = {"v3": config(V3, num_hidden_layers=2), "v1": config(V1, num_hidden_layers=2)}
TINY = MODELS["v3"]
PROMPTS = [[5, 9, 2, 7], [3], [8, 8, 1, 30, 22, 4, 17], [11, 6]]
WIDTH, NEW, PAD = 8, 10, 0
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, max_tokens=NEW)
ONE = make_mesh(devices=jax.devices()[:1])


@functools.cache
def prepared(tiny, compute, mesh):
    arrays = jax.device_put(weights(tiny), jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        return sampling_weights(*arrays, config=tiny, compute=compute, mesh=mesh)


def run(prompts=PROMPTS, *, tiny=TINY, sampling: Any = GREEDY, seed=0, stop=(), scan=False, experts=False, once=False):
    compute = ComputeConfig(scan_decode=scan).on(ONE)
    requests = make_requests(prompts, sampling, jax.random.key(seed), stop_ids=stop, pad_id=PAD, width=WIDTH)
    requests = shared(requests, 1) if once else requests
    with jax.set_mesh(ONE):
        out = generate(sampling_config(tiny), compute, *prepared(tiny, compute, ONE), requests, experts=experts)
    return trimmed(out, len(prompts))


def trimmed(out, rows):
    """On the host, without what fills the buckets."""
    cut = {"tokens_BN": out.tokens_BN[:rows, :NEW], "logprobs_BN": out.logprobs_BN[:rows, :NEW]}
    cut |= {"lengths_B": out.lengths_B[:rows], "stopped_B": out.stopped_B[:rows]}
    return jax.device_get(dataclasses.replace(out, **cut))


@functools.cache
def forward(tiny):
    return jax.jit(lambda params, bias, tokens: parameters.merge(tiny, params, bias)(tokens).logits)


def logprobs_of(rows, tiny=TINY, temperature=1.0):
    """Log-probabilities (token by token, over the vocabulary) by the full forward pass of each whole row."""
    tokens = np.zeros((len(rows), WIDTH + NEW), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids  # what stands behind changes nothing before it
    logits = np.asarray(forward(tiny)(*weights(tiny), jnp.asarray(tokens)), np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name, scan", [("v3", False), ("v3", True), ("v1", False)])
def test_greedy_is_the_argmax_of_the_full_forward_step_by_step(name, scan):
    tiny = MODELS[name]
    out = run(tiny=tiny, scan=scan)
    rows = [[*prompt, *answer.tolist()] for prompt, answer in zip(PROMPTS, out.tokens_BN, strict=True)]
    logprobs = logprobs_of(rows, tiny)
    for row, prompt in enumerate(PROMPTS):
        steps = logprobs[row, len(prompt) - 1 : len(prompt) + NEW - 1]
        assert out.tokens_BN[row].tolist() == steps.argmax(axis=-1).tolist()
        np.testing.assert_allclose(out.logprobs_BN[row], steps.max(axis=-1), atol=1e-5)
    assert out.lengths_B.tolist() == [NEW] * 4 and not np.any(out.stopped_B)
    assert len({tuple(answer) for answer in out.tokens_BN.tolist()}) == 4


def test_an_answer_depends_on_its_prompt_alone():
    """Not on the other rows, nor on how far its own is padded."""
    together = run().tokens_BN
    shuffled = run([PROMPTS[2], PROMPTS[1], PROMPTS[1], PROMPTS[0]]).tokens_BN
    np.testing.assert_array_equal(shuffled, together[[2, 1, 1, 0]])


def test_answers_end_with_a_stop_token():
    """The row whose third token is the stop token ends there; the others go on as before."""
    whole = run()
    stop = int(whole.tokens_BN[2, 2])
    out = run(stop=(stop,))
    for row in range(4):
        answer = whole.tokens_BN[row].tolist()
        length = answer.index(stop) + 1 if stop in answer else NEW
        assert out.lengths_B[row] == length and out.stopped_B[row] == (stop in answer)
        assert out.tokens_BN[row].tolist() == answer[:length] + [PAD] * (NEW - length)
        np.testing.assert_allclose(out.logprobs_BN[row, :length], whole.logprobs_BN[row, :length], atol=1e-5)
        assert not np.any(out.logprobs_BN[row, length:])
    assert out.lengths_B[2] <= 3


def test_a_first_token_can_stop_and_all_rows_can():
    first = {int(token) for token in run().tokens_BN[:, 0]}
    out = run(stop=tuple(sorted(first)))
    assert out.lengths_B.tolist() == [1] * 4 and np.all(out.stopped_B)
    assert np.all(out.tokens_BN[:, 1:] == PAD)


def test_the_seed_reproduces_tokens_and_each_row_draws_its_own():
    first, again, other = (run([PROMPTS[0]] * 4, sampling=SAMPLED, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.tokens_BN, again.tokens_BN)
    np.testing.assert_array_equal(first.logprobs_BN, again.logprobs_BN)
    assert not np.array_equal(first.tokens_BN, other.tokens_BN)
    assert len({tuple(answer) for answer in first.tokens_BN.tolist()}) == 4


def test_log_probabilities_are_those_of_the_full_forward():
    """At the temperature, before top-k: what a learner computes."""
    out = run(sampling=SAMPLED, seed=3)
    rows = [[*prompt, *answer.tolist()] for prompt, answer in zip(PROMPTS, out.tokens_BN, strict=True)]
    logprobs = logprobs_of(rows, temperature=0.8)
    for row, prompt in enumerate(PROMPTS):
        steps = logprobs[row, len(prompt) - 1 : len(prompt) + NEW - 1]
        answer = out.tokens_BN[row]
        np.testing.assert_allclose(out.logprobs_BN[row], steps[np.arange(NEW), answer], atol=1e-5)
        ranks = np.sum(steps > steps[np.arange(NEW), answer][:, None], axis=-1)
        assert np.all(ranks < 20) and np.any(ranks > 0)


def count_programs() -> int:
    return generate._cache_size()  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


def test_another_setting_or_length_compiles_nothing():
    run(sampling=SamplingParams(temperature=0.5, top_p=0.9, max_tokens=9), seed=1, stop=(4,))
    programs = count_programs()
    settings = [
        SamplingParams(temperature=0.0, max_tokens=10),
        SamplingParams(temperature=1.3, top_k=5, max_tokens=16),
        SamplingParams(top_p=0.3, max_tokens=12, stop_token_ids=(1, 2)),
        [SamplingParams(temperature=t, seed=9, max_tokens=9) for t in (0.0, 0.4, 2.0)],
    ]
    for seed, sampling in enumerate(settings):
        run([[1] * (seed + 1), [2, 3], [4] * 7], sampling=sampling, seed=seed, stop=range(seed))
    assert count_programs() == programs
    run(sampling=SamplingParams(max_tokens=17))  # the next bucket
    assert count_programs() == programs + 1


def test_the_limit_is_each_rows_own_and_what_fills_the_batch_is_not_answered():
    limits = [3, 1, 10]
    out = run(PROMPTS[:3], sampling=[dataclasses.replace(GREEDY, max_tokens=limit) for limit in limits])
    whole = run().tokens_BN
    assert out.lengths_B.tolist() == limits and not np.any(out.stopped_B)
    for row, limit in enumerate(limits):
        assert out.tokens_BN[row].tolist() == [*whole[row, :limit].tolist(), *[PAD] * (NEW - limit)]


def test_a_learner_that_takes_the_samplers_experts_routes_and_scores_the_same():
    """Also where its own router would choose others: with another bias, the experts and log-probabilities stay."""
    out = run(sampling=SAMPLED, seed=3, experts=True, stop=(7,))
    assert out.experts_LBTK is not None
    params, bias = weights(TINY)
    assert bias is not None
    size = WIDTH + NEW
    tokens = np.zeros((4, size), np.int32)
    run_BT = np.zeros((4, size), bool)
    for row, prompt in enumerate(PROMPTS):
        ids = [*prompt, *out.tokens_BN[row, : out.lengths_B[row]].tolist()]
        tokens[row, : len(ids)], run_BT[row, : len(ids) - 1] = ids, True
    chosen = out.experts_LBTK[:, :, :size]
    assert np.all((chosen >= 0) == run_BT[None, :, :, None])

    @jax.jit
    def learn(bias, chosen):
        network = parameters.merge(TINY, params, bias)
        seen = network(jnp.asarray(tokens), chosen_LBSK=chosen)
        assert seen.router is not None and seen.logits is not None
        return seen.router.experts_BSK, jax.nn.log_softmax(seen.logits / 0.8)

    own, _ = learn(bias, None)
    np.testing.assert_array_equal(own[:, run_BT], chosen[:, run_BT])
    changed = bias + 5 * jax.random.normal(jax.random.key(1), bias.shape)
    other, _ = learn(changed, None)
    assert np.mean(other[:, run_BT] != chosen[:, run_BT]) > 0.3
    taken, logprobs = learn(changed, jnp.asarray(chosen))
    np.testing.assert_array_equal(taken[:, run_BT], chosen[:, run_BT])
    for row, prompt in enumerate(PROMPTS):
        n = int(out.lengths_B[row])
        at = len(prompt) - 1 + np.arange(n)
        np.testing.assert_allclose(logprobs[row, at, out.tokens_BN[row, :n]], out.logprobs_BN[row, :n], atol=1e-5)


def test_experts_of_a_network_without_any_are_refused():
    dense = config(V1, n_routed_experts=0, first_k_dense_replace=2, num_hidden_layers=2)
    with pytest.raises(ValueError, match="experts=True, but n_routed_experts=0"):
        run(tiny=dense, experts=True)


@pytest.mark.parametrize("name, scan", [("v3", True), ("v1", False)])
def test_samples_of_one_prompt_read_it_once(name, scan):
    """Products of few rows may differ in their last digits from those of many."""
    asked = [prompt for prompt in PROMPTS[:3] for _ in range(5)]
    options = {"tiny": MODELS[name], "sampling": SAMPLED, "scan": scan, "experts": True}
    found, expected = run(asked, once=True, **options), run(asked, **options)
    np.testing.assert_array_equal(found.tokens_BN, expected.tokens_BN)
    np.testing.assert_array_equal(found.experts_LBTK[:, :15], expected.experts_LBTK[:, :15])
    np.testing.assert_allclose(found.logprobs_BN, expected.logprobs_BN, atol=1e-5)


SPREAD = MeshConfig(data=2, fsdp=2, expert=2)


@pytest.mark.parametrize(
    ("mesh", "scan"), [(SPREAD, False), (SPREAD, True), (MeshConfig(fsdp=4, tensor=2), False)], ids=str
)
def test_each_device_answers_its_rows(mesh, scan):
    """On eight devices each decodes B / ways rows, in the compiled loop too, and the answers are one device's."""
    mesh = make_mesh(mesh)
    ways, prompts = mesh.size // mesh.shape["tensor"], PROMPTS * 3 + PROMPTS[:1]
    if scan or ways == 4:  # two rows of a device ask the same, which is read in once
        prompts = [prompt for prompt in PROMPTS * 2 for _ in range(2)][:13]
    compute = ComputeConfig(rules=sampling_rules(ShardingRules()), scan_decode=scan).on(mesh)
    requests = make_requests(prompts, SAMPLED, jax.random.key(3), pad_id=PAD, width=WIDTH, ways=ways)
    batch, width = 16, TINY.cache_numbers_per_token_layer
    assert requests.tokens_BP.shape[0] == batch
    requests = shared(requests, ways)
    with jax.set_mesh(mesh):
        made = prepared(TINY, compute, mesh)
        program = generate.lower(sampling_config(TINY), compute, *made, requests, experts=True).compile()
        out = generate(sampling_config(TINY), compute, *made, requests, experts=True)
    assert out.tokens_BN.addressable_shards[0].data.shape == (batch // ways, requests.answers)
    text = program.as_text() or ""
    buffer = f"{',' if scan else '['}{{}},{requests.columns},{width}]"
    assert buffer.format(batch // ways) in text and buffer.format(batch) not in text
    if ways == mesh.size:  # no weight is gathered for a token; what top_k gathers is the router's scores
        loop = [line for line in text.splitlines() if "decode/while/body" in line]
        gathered = [line for line in loop if "all-gather(" in line and "router/" not in line]
        # Tokens come to the two devices of their experts.
        assert gathered and all("experts/" in line and f"[{2 * batch // ways}," in line for line in gathered), gathered
    expected = run(prompts, sampling=SAMPLED, seed=3, experts=True)
    found = trimmed(out, len(prompts))
    np.testing.assert_array_equal(found.tokens_BN, expected.tokens_BN)
    np.testing.assert_allclose(found.logprobs_BN, expected.logprobs_BN, atol=1e-5)
    np.testing.assert_array_equal(found.experts_LBTK, expected.experts_LBTK)

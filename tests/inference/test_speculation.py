"""Drafts by the MTP module change how fast an answer comes, and nothing of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.ahead import sent_ahead
from inference.test_continuous import GREEDY, MARGIN, SERVING, Asked, finish, step, submit
from model.tiny import QWEN, config, weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference.continuous import Continuous
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.speculation import kept
from deepseek_jax.inference.weights import sampling_compute, sampling_weights
from deepseek_jax.model import parameters
from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import tree_shardings


@functools.cache
def guessing(model: Any = SPEAKER) -> tuple[Any, Any]:
    """Weights by which what is said hangs mostly on the last token, and a module that hands the next token's embedding
    on nearly as it is: so it is right about every other time."""
    params, bias = weights(model)

    def damped(path, leaf):
        name = jax.tree_util.keystr(path)
        if not name.endswith(("['attention']['o']", "['wo']")):
            return leaf
        return leaf * (0.03 if "mtp" in name else 0.3)

    params = jax.tree_util.tree_map_with_path(damped, params)
    width = model.hidden_size
    hands_on = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
    own = {"proj": {"w": hands_on + 0.05 * params["mtp"]["proj"]["w"]}, "embed_norm": {"gain": jnp.ones(width)}}
    return params | {"embed": 10 * params["embed"], "mtp": params["mtp"] | own | {"norm": params["norm"]}}, bias


def made(drafts: int, mesh: Any = None, serving: ServingConfig = SERVING, **compute: Any) -> Engine:
    params, bias = guessing()
    if mesh is not None:
        params = jax.device_put(params, tree_shardings(mesh, logical_axes(SPEAKER), params))
    model = whole(SPEAKER, params, bias, tokenizer(), mesh)
    model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, **compute))
    return Engine(model, serving=dataclasses.replace(serving, drafts=drafts))


@functools.cache
def engine(drafts: int, ahead: bool = False) -> Engine:
    """With every program compiled."""
    serving = sent_ahead(made(drafts)) if ahead else made(drafts)
    serving.warm_up()
    return serving


def answers(serving: Engine, *asked: Asked) -> list[list[int]]:
    numbers = submit(serving, every := dict[int, Asked](), *asked)
    finish(serving, every)
    return [every[number].ids for number in numbers]


def share(metrics: dict[str, float], k: int) -> float:
    """Of drafts in the k-th place, those that were kept."""
    return metrics[f"drafts_{k}_kept"] / metrics[f"drafts_{k}"]


def bare(model: Any, *, slots: int, forced: float = 0.0) -> tuple[Continuous, Any]:
    """Two drafts, without tokenizer and stop ids, and the weights for it."""
    compute, mesh = sampling_compute(whole(model, None, None).compute), make_mesh(devices=jax.devices()[:1])
    made = sampling_weights(*guessing(model), config=model, compute=compute, mesh=mesh, mtp=True)
    serving = ServingConfig(slots=slots, pages=64, page=16, chunk=16, drafts=2)
    return Continuous(model, compute, mesh, serving, (), forced=forced), made


def wishes(rng: np.random.Generator) -> SamplingParams:
    """Any of them, together."""
    maybe = lambda value, none: value if rng.random() < 0.3 else none  # noqa: E731
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0, 0.5]).item(),
        max_tokens=rng.integers(1, 17).item(),
        seed=rng.integers(5).item(),
        top_p=maybe(0.9, 1.0),
        top_k=maybe(20, 0),
        min_p=maybe(0.02, 0.0),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.5, 0.0),
        frequency_penalty=maybe(-0.5, 0.0),
        logit_bias=maybe(((7, 3.0), (11, -5.0)), ()),
        stop_token_ids=tuple(rng.integers(0, 300, 8 * rng.integers(2)).tolist()),
        alternatives=maybe(2, 0),
    )


def mix(drafts: int, seed: int, ahead: bool) -> None:
    """Prompts that share beginnings come in bursts, some are given up, new weights, the same, come between: each is
    answered what it is answered alone without drafts."""
    rng, asked, serving = np.random.default_rng(seed), dict[int, Asked](), engine(drafts, ahead)
    beginnings = [rng.integers(3, 300, rng.integers(4, 24)).tolist() for _ in range(3)]
    for _ in range(rng.integers(5, 20)):
        if rng.random() < 0.6:
            beginning = beginnings[rng.integers(3)][: rng.integers(1, 24)]
            prompt = [*beginning, *rng.integers(3, 300, rng.integers(2) * rng.integers(8)).tolist()]
            sampling = wishes(rng)
            submit(serving, asked, *(Asked(prompt, sampling, draw) for draw in range(rng.integers(1, 4))))
        if asked and rng.random() < 0.2:
            serving.cancel(int(rng.choice(list(asked))))
        if rng.random() < 0.05:
            serving.update(*guessing())
        step(serving, asked)
    finish(serving, asked)
    whole = [answer for answer in asked.values() if answer.reason != "cancelled"]
    expected = {i: Asked(answer.prompt, answer.sampling, answer.draw) for i, answer in enumerate(whole)}
    plain = engine(0)
    numbers = submit(plain, every := dict[int, Asked](), *expected.values())
    finish(plain, every)
    for answer, number in zip(whole, numbers, strict=True):
        assert (answer.ids, answer.reason) == (every[number].ids, every[number].reason), answer
        np.testing.assert_allclose(answer.logprobs, every[number].logprobs, atol=MARGIN)


@pytest.mark.parametrize(("drafts", "ahead"), [(1, False), (3, False), (3, True)])
def test_answers_are_those_without_drafts_in_any_company(drafts, ahead):
    """And nothing is compiled for them: counted by jax itself."""
    before, compiled = (engine(0), engine(drafts, ahead))[1].metrics(), list[str]()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: compiled.append(event))
    for seed in range(4):
        mix(drafts, seed, ahead)
    assert not [name for name in compiled if "compile" in name]
    metrics = {name: value - before[name] for name, value in engine(drafts, ahead).metrics().items()}
    assert metrics["found_tokens"] and not metrics["compiles"] and (ahead or metrics["preemptions"])
    shares = [share(metrics, k) for k in range(1, 1 + drafts)]
    assert 0.2 < shares[0] < 0.9 and min(shares) > 0.02 and shares == sorted(shares, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("drafts", "ahead"), [(drafts, ahead) for drafts in (1, 2, 3) for ahead in (False, True)])
def test_answers_are_those_without_drafts_in_two_hundred_mixes(drafts, ahead):
    for seed in range(100, 167):
        mix(drafts, seed, ahead)
    assert not engine(drafts, ahead).metrics()["compiles"]


@functools.cache
def ahead():
    """Of rows of tokens of which n are known: the module's guess of the next one, and of the one behind it."""
    width = SERVING.context

    def guesses(params, bias, tokens_1S, n):
        network = parameters.merge(SPEAKER, params, bias)
        hidden, following = network(tokens_1S).hidden, jnp.roll(tokens_1S, -1, axis=1)
        best = lambda hidden, at: jnp.argmax(network.logits(hidden[0, at])).astype(jnp.int32)  # noqa: E731
        context = network.context(tokens_1S)
        own, _, _ = network.predict_next(hidden, following, context)
        first, here_S = best(own, n - 2), (jnp.arange(width) == n - 1)[None]
        hidden = jnp.where(here_S[..., None], jnp.roll(own, 1, axis=1), hidden)
        further, _, _ = network.predict_next(hidden, jnp.where(here_S, first, following), context)
        return first, best(further, n - 1)

    return jax.jit(guesses)


def test_drafts_are_the_modules_own_over_the_whole_row():
    """Behind a prompt that is read in piece by piece, and through all that is kept and not kept."""
    serving, asked = engine(3), dict[int, Asked]()
    serving.update(*guessing())  # nothing of other tests is found
    rng = np.random.default_rng(0)
    asks = [
        Asked(rng.integers(3, 300, length).tolist(), dataclasses.replace(GREEDY, max_tokens=16)) for length in (29, 5)
    ]
    submit(serving, asked, *asks)
    seen = 0
    while serving.busy:
        step(serving, asked)
        for request, _ in serving.requests.continuous._asked.values():
            if request.drafts:
                row = np.zeros((1, SERVING.context), np.int32)
                row[0, : len(request.ids)] = request.ids
                assert request.drafts[:2] == [int(x) for x in ahead()(*guessing(), row, len(request.ids))]
                seen += 1
    assert seen > 4


def test_draws_have_the_plain_distribution():
    """Three tokens in a row over a vocabulary of six, by chi-square against the plain forward pass; the second and the
    third are kept drafts, or not."""
    count, temperature, top_p, prompt = 3000, 1.5, 0.9, [1, 5, 2]
    tiny = config(num_hidden_layers=2, vocab_size=6, max_position_embeddings=16)
    requests, weights = bare(tiny, slots=64)
    sampling = SamplingParams(max_tokens=3, temperature=temperature, top_p=top_p, seed=7)
    found = {requests.submit(prompt, sampling, draw=draw): list[int]() for draw in range(count)}
    while requests.busy:
        for event in requests.step(weights):
            found[event.number] += event.token_ids
    assert 0.2 < share(requests.metrics(), 1) < 0.95

    rows = jnp.array([[*prompt, a, b] for a in range(6) for b in range(6)])
    logits = np.asarray(parameters.merge(tiny, *guessing(tiny))(rows).logits, np.float64)[:, 2:] / temperature
    p_ABSW = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).reshape(6, 6, 3, 6)
    likely = np.sort(p_ABSW)[..., ::-1]
    least = np.min(np.where(np.cumsum(likely, -1) - likely < top_p, likely, 1), axis=-1, keepdims=True)
    p_ABSW = np.where(p_ABSW >= least, p_ABSW, 0)
    p_ABSW /= p_ABSW.sum(-1, keepdims=True)
    expected = count * p_ABSW[0, 0, 0][:, None, None] * p_ABSW[:, 0, 1][:, :, None] * p_ABSW[:, :, 2]
    times = np.zeros_like(expected)
    np.add.at(times, tuple(np.array([*found.values()]).T), 1)
    assert not times[expected == 0].any()
    many = expected >= 5
    freedom, square = many.sum() - 1, np.sum((times - expected)[many] ** 2 / expected[many])
    assert freedom > 20 and square < freedom + 4 * (2 * freedom) ** 0.5


PROMPTS = [[5, 9, 2, 7], [8, 8, 1, 30, 22] * 5, [7] * 23, [7] * 23]


def pair(*engines: Engine) -> list[list[list[int]]]:
    """What each answers to a few, greedy and not."""
    asks = [
        Asked(prompt, dataclasses.replace(GREEDY, temperature=i % 2, max_tokens=12)) for i, prompt in enumerate(PROMPTS)
    ]
    return [answers(serving, *(dataclasses.replace(ask, ids=[], logprobs=[]) for ask in asks)) for serving in engines]


def test_on_a_mesh():
    """Two devices of the batch, which split the experts too, each with two that split heads."""
    serving = made(2, make_mesh(MeshConfig(expert=2, tensor=2), devices=jax.devices()[:4]))
    found, expected = pair(serving, engine(0))
    assert found == expected and serving.metrics()["drafts_2_kept"]


def test_over_pages_in_fp8_and_scanned_layers():
    wide = dataclasses.replace(SPEAKER, kv_lora_rank=128)
    model = whole(wide, *guessing(wide), tokenizer())
    model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, scan_decode=True))
    engines = [Engine(model, serving=dataclasses.replace(SERVING, cache="float8_e4m3", drafts=n)) for n in (2, 0)]
    found, expected = pair(*engines)
    assert found == expected and engines[0].metrics()["drafts_1_kept"]


def test_generate_needs_no_module():
    """With the weights of an engine that drafts."""
    expected = [each.token_ids for each in engine(0).generate(PROMPTS, GREEDY)]
    assert [each.token_ids for each in engine(1).generate(PROMPTS, GREEDY)] == expected


def test_which_are_kept():
    """Up to the first that was not guessed, that ends the answer, or that there is no room for."""
    drafts = np.array([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    drawn, ends = np.tile([1, 2, 3, 4], (6, 1)), np.zeros((6, 4), bool)
    ends[3, 1] = True
    count = np.asarray(kept(*map(jnp.asarray, (drafts, drawn, ends, np.array([9, 9, 9, 9, 2, 0]))))).sum(axis=1)
    assert count.tolist() == [4, 2, 1, 2, 2, 0]


def test_a_measurement_keeps_the_share_that_it_is_told_to():
    requests, weights = bare(SPEAKER, slots=16, forced=0.85)
    for draw in range(16):
        requests.submit([3, 5, 8], SamplingParams(temperature=0.0, max_tokens=60), draw=draw)
    while not any(event.finish_reason for event in requests.step(weights)):
        pass
    metrics = requests.metrics()
    assert 16 * 45 < metrics["tokens"] < 16 * 60
    assert abs(share(metrics, 1) - 0.85) < 0.06 and abs(share(metrics, 2) - 0.85**2) < 0.08


def test_what_cannot_be_had_is_refused():
    model = whole(students := config(QWEN, vocab_size=300, max_position_embeddings=64), *weights(students), tokenizer())
    with pytest.raises(ValueError, match="drafts=1: num_nextn_predict_layers=0, no MTP module"):
        Engine(model, serving=dataclasses.replace(SERVING, drafts=1))
    with pytest.raises(ValueError, match="drafts=4: expected 0…3"):
        ServingConfig(drafts=4)

"""Requests as they come, against the plain forward pass: whoever else comes, goes, or gives way."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.ahead import sent_ahead
from model.tiny import QWEN, V2_LITE, config, weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference import decoding, paged
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.model import parameters
from deepseek_jax.model.parameters import logical_axes
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import tree_shardings

SIZES = {"num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 64}
MODELS = {"v3": SPEAKER, "v2-lite": config(V2_LITE, **SIZES), "qwen": config(QWEN, **SIZES)}
SERVING = ServingConfig(slots=3, pages=16, page=4, context=48, chunk=12, turns=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
MARGIN = 1e-4  # of float32, by which another batch may change which of two tokens is the best
ROWS = 8


@functools.cache
def engine(name: str, ahead: bool = False) -> Engine:
    """With every program compiled. ahead: as on devices other than a CPU."""
    made = Engine(whole(MODELS[name], *weights(MODELS[name]), tokenizer()), serving=SERVING)
    if ahead:
        made = sent_ahead(made)
    made.warm_up()
    return made


AHEAD = pytest.mark.parametrize("ahead", [False, True])


@functools.cache
def forward(name: str):
    def logits(params, bias, tokens_BS):
        return parameters.merge(MODELS[name], params, bias)(tokens_BS).logits

    return jax.jit(logits)


@functools.cache
def noise():
    """Of token n of an answer, as ``decode`` says it is drawn."""
    key = lambda seed, draw, n: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), draw), n)  # noqa: E731
    gumbel = lambda *at: jax.random.gumbel(key(*at), (SIZES["vocab_size"],))  # noqa: E731
    return jax.jit(jax.vmap(gumbel, in_axes=(None, None, 0)))


@dataclasses.dataclass
class Asked:
    prompt: list[int]
    sampling: SamplingParams
    draw: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str = ""


def step(engine: Engine, asked: dict[int, Asked]) -> None:
    for event in engine.step():
        answer = asked[event.number]
        assert not answer.reason and len(event.token_ids) == len(event.logprobs)
        answer.ids += event.token_ids
        answer.logprobs += event.logprobs
        answer.reason = event.finish_reason
    engine.requests.continuous.check()


def finish(engine: Engine, asked: dict[int, Asked]) -> None:
    for _ in range(2000):
        if not engine.busy:
            break
        step(engine, asked)
    assert not engine.busy and all(answer.reason for answer in asked.values())
    assert engine.metrics()["pages_held"] == 0


def submit(engine: Engine, asked: dict[int, Asked], *answers: Asked) -> list[int]:
    numbers = [engine.submit(answer.prompt, answer.sampling, draw=answer.draw) for answer in answers]
    asked |= dict(zip(numbers, answers, strict=True))
    return numbers


def assert_right(name: str, answers: list[Asked]) -> None:
    """Each token is the best, or the drawn one, by the plain forward pass over its whole row; log-probabilities too."""
    for first in range(0, len(answers), ROWS):
        some = answers[first : first + ROWS]
        tokens = np.zeros((ROWS, SERVING.context), np.int32)
        for row, answer in enumerate(some):
            tokens[row, : len(answer.prompt) + len(answer.ids)] = [*answer.prompt, *answer.ids]
        logits = np.asarray(forward(name)(*weights(MODELS[name]), jnp.asarray(tokens)), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, answer in enumerate(some):
            count, at = len(answer.ids), len(answer.prompt) - 1
            scores, places = logprobs[row, at : at + count], np.arange(count)
            np.testing.assert_allclose(answer.logprobs, scores[places, answer.ids], atol=1e-4)
            sampling = answer.sampling
            if sampling.temperature:
                drawn = noise()(sampling.seed, answer.draw, np.arange(16))
                scores = scores / sampling.temperature + np.asarray(drawn)[:count]
            assert np.all(scores[places, answer.ids] >= scores.max(axis=1) - MARGIN), answer
            whole_answer = answer.reason == "length" and count == sampling.max_tokens
            assert whole_answer or (answer.reason == "stop" and answer.ids[-1] in ends(sampling)) or not answer.reason


def ends(sampling: SamplingParams) -> tuple[int, ...]:
    return (*tokenizer().stop_ids, *sampling.stop_token_ids)


def mix(name: str, seed: int, ahead: bool) -> None:
    """Prompts that share beginnings, or all, come in bursts; some are given up; new weights, the same, come between."""
    rng, asked = np.random.default_rng(seed), dict[int, Asked]()
    serving = engine(name, ahead)
    beginnings = [rng.integers(3, 300, rng.integers(4, 24)).tolist() for _ in range(3)]
    for _ in range(rng.integers(5, 25)):
        if rng.random() < 0.6:
            beginning = beginnings[rng.integers(3)][: rng.integers(1, 24)]
            prompt = [*beginning, *rng.integers(3, 300, rng.integers(2) * rng.integers(8)).tolist()]
            sampling = SamplingParams(
                temperature=rng.choice([0.0, 1.0, 0.6]).item(),
                max_tokens=rng.integers(1, 17).item(),
                seed=rng.integers(5).item(),
                stop_token_ids=tuple(rng.integers(0, 300, 8 * rng.integers(2)).tolist()),
            )
            submit(serving, asked, *(Asked(prompt, sampling, draw) for draw in range(rng.integers(1, 5))))
        if asked and rng.random() < 0.2:
            serving.cancel(int(rng.choice(list(asked))))
        if rng.random() < 0.03:
            serving.update(*weights(MODELS[name]))
        step(serving, asked)
    finish(serving, asked)
    assert_right(name, [answer for answer in asked.values() if answer.reason != "cancelled"])


@AHEAD
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_plain_forwards_in_any_company(name, ahead):
    for seed in range(4):
        mix(name, seed, ahead)
    metrics = engine(name, ahead).metrics()
    assert metrics["preemptions"] and metrics["found_tokens"] and not metrics["compiles"]


@AHEAD
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_plain_forwards_in_two_hundred_mixes(name, ahead):
    for seed in range(100, 167):
        mix(name, seed, ahead)
    assert not engine(name, ahead).metrics()["compiles"]


def test_a_sample_is_the_one_that_generate_gives():
    """The i-th of several is the i-th of equal prompts there."""
    serving, asked = engine("v3"), dict[int, Asked]()
    sampling = SamplingParams(max_tokens=12, seed=3, temperature=0.7, top_k=40)
    submit(serving, asked, *(Asked([5, 9, 2, 7], sampling, draw) for draw in range(3)), Asked([8] * 20, GREEDY))
    finish(serving, asked)
    expected = [each.token_ids for each in serving.generate([[5, 9, 2, 7]] * 3, sampling)]
    assert [answer.ids for answer in asked.values()][:3] == expected


def test_an_answer_goes_on_behind_its_beginning():
    """From any token on what it would have said: noise, penalties and limit are those of its place. With the noise of
    a first token it would say others."""
    serving, prompt = engine("v3"), [5, 9, 2, 7]
    drawn = SamplingParams(max_tokens=12, seed=3, frequency_penalty=1.5)
    ((whole_answer,),) = serving.answer([prompt], drawn)
    ids, asked = whole_answer.token_ids, dict[int, list[int]]()
    for begun in (1, 5, 11):
        asked |= {serving.submit([*prompt, *ids[:begun]], drawn, begun=begun): ids[begun:]}
    anew = serving.submit([*prompt, *ids[:5]], dataclasses.replace(drawn, max_tokens=7))
    found = collections.defaultdict[int, list[int]](list)
    while serving.busy:
        for event in serving.step():
            found[event.number] += event.token_ids
    assert found.pop(anew) != ids[5:] and found == asked
    for begun in (-1, 4, 12):
        with pytest.raises(ValueError, match=f"begun={begun} of 4 tokens: expected from 0 to below max_tokens=12"):
            serving.submit(prompt, drawn, begun=begun)


def test_each_request_has_its_own_wishes():
    """A ban, a push and alternatives, beside one who asks for nothing and is answered as ever."""
    serving, asked = engine("v3"), dict[int, Asked]()
    prompt, more = [5, 9, 2, 7], dataclasses.replace
    (plain,) = serving.generate([prompt], GREEDY)
    ban = tuple((token, -100.0) for token in dict.fromkeys(plain.token_ids))
    once = more(GREEDY, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=100.0)
    ways = [GREEDY, more(GREEDY, logit_bias=ban), more(GREEDY, logit_bias=((11, 100.0),)), once]
    submit(serving, asked, *(Asked(prompt, way) for way in ways))
    finish(serving, asked)
    same, banned, pushed, varied = (answer.ids for answer in asked.values())
    assert same == plain.token_ids and not set(banned) & set(same) and pushed == [11] * 8
    assert len(set(varied)) == 8 and not set(varied) & set(prompt)
    number, found = serving.submit(prompt, more(GREEDY, alternatives=3)), []
    while serving.busy:
        found += [event for event in serving.step() if event.number == number]
    likely = [each for event in found for each in event.alternatives]
    assert [each[0][0] for each in likely] == same and all(len(each) == 3 for each in likely)
    np.testing.assert_allclose([each[0][1] for each in likely], plain.logprobs, atol=1e-4)
    assert all(each[0][1] >= each[1][1] >= each[2][1] for each in likely)


def test_logits_are_sorted_and_weighed_where_a_row_asks_for_it_alone(monkeypatch):
    """Rows that only fill the batch ask for nothing."""
    plain, seen = decoding.adjusted, list[int]()

    def seen_adjusted(*given):
        jax.debug.callback(lambda: seen.append(1))
        return plain(*given)

    monkeypatch.setattr(decoding, "adjusted", seen_adjusted)
    serving = dataclasses.replace(SERVING, turns=2)  # a program of its own
    made = Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()), serving=serving)
    asks: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3},
        {"top_p": 0.9},
        {"alternatives": 1},
    )
    for wishes, expected in zip(asks, (False, False, True, True), strict=True):
        made.answer([[5, 9, 2], [8, 1]], SamplingParams(max_tokens=3, **wishes))
        jax.effects_barrier()
        assert bool(seen) == expected, wishes
        seen.clear()


def test_samples_of_one_prompt_read_it_once():
    serving, asked = engine("v3"), dict[int, Asked]()
    serving.update(*weights(SPEAKER))  # nothing of other tests is found
    before = serving.metrics()
    submit(serving, asked, *(Asked([7] * 23, GREEDY, draw) for draw in range(3)))
    finish(serving, asked)
    read = {name: serving.metrics()[name] - before[name] for name in ("prompt_tokens", "found_tokens")}
    assert read == {"prompt_tokens": 3 * 22, "found_tokens": 2 * 22}


@AHEAD
def test_new_weights_answer_what_is_running_and_their_prefixes_alone_are_found(ahead):
    """A running answer goes on over what the former weights have read in; its twin that comes later finds nothing."""
    params, bias = weights(SPEAKER)
    serving, asked = engine("v3", ahead), dict[int, Asked]()
    submit(serving, asked, running := Asked([7] * 20, dataclasses.replace(GREEDY, max_tokens=20)))
    while not running.ids:
        step(serving, asked)
    known = len(running.ids)
    other = params | {"head": {"w": params["head"]["w"][:, ::-1]}}  # the same cache, other words
    serving.update(other, bias)
    found = serving.metrics()["found_tokens"]
    submit(serving, asked, later := Asked([7] * 20, GREEDY))
    finish(serving, asked)
    assert serving.metrics()["found_tokens"] == found
    serving.update(params, bias)
    (first,) = serving.generate([[7] * 20], dataclasses.replace(GREEDY, max_tokens=1))
    assert running.ids[0] == first.token_ids[0] and later.ids[0] == SIZES["vocab_size"] - 1 - first.token_ids[0]
    assert known < 20 and len(running.ids) == 20


def test_no_request_waits_for_a_compiler():
    """Whatever its shape: counted by jax itself, not by the engine."""
    serving = dataclasses.replace(SERVING, slots=4, chunk=64, pages=24)
    made = Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()), serving=serving)
    made.warm_up()
    compiled = list[str]()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: compiled.append(event))
    rng, asked = np.random.default_rng(0), dict[int, Asked]()
    for length in (1, 2, 5, 17, 40, 3, 3, 3, 3, 9):
        submit(made, asked, Asked(rng.integers(3, 300, length).tolist(), GREEDY))
        step(made, asked)
    finish(made, asked)
    assert not [name for name in compiled if "compile" in name]
    assert made.metrics()["compiles"] == 0
    assert_right("v3", [*asked.values()])


@pytest.mark.parametrize("name", ["v2-lite", "qwen"])
def test_pages_stay_where_they_lie_while_tokens_are_made(name):
    """One row's too, of whose writes XLA would make copies of all pages."""
    network = MODELS[name]
    made = Engine(whole(network, *weights(network), tokenizer()), serving=dataclasses.replace(SERVING, pages=8192))
    made.submit([3, 4], GREEDY)
    programs = made.requests.continuous.programs
    job = programs._decodes([[]], 1, programs.buckets.tables[-1], 0, until_end=False)
    with jax.set_mesh(made.mesh):
        found = programs._lowered(made.model.weights(), job).compile().memory_analysis()
    page = jax.tree.leaves(programs._pages)[0]
    assert page.shape[:2] == (8192, SERVING.page) and found.temp_size_in_bytes < page.nbytes / 2


@AHEAD
@pytest.mark.parametrize("what", ["read", "decode"])
@pytest.mark.parametrize("carried_out", [False, True])
def test_a_step_that_is_interrupted_is_done_again(carried_out, what, ahead, monkeypatch):
    """While it is read in and while it is answered, before or behind what the device does."""
    serving, asked = engine("v3", ahead), dict[int, Asked]()
    submit(serving, asked, Asked([5, 9, 2, 7, 30, 22, 8] * 3, GREEDY), Asked([8, 8, 1], GREEDY))
    programs, times = serving.requests.continuous.programs, 0
    done = getattr(programs, what)

    def interrupted(*given):
        if carried_out:
            done(*given)
        raise KeyboardInterrupt

    while serving.busy:
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            if times < 4:
                patch.setattr(programs, what, interrupted)
            times += 1
            step(serving, asked)
        serving.requests.continuous.check()
        step(serving, asked)
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


def test_the_next_step_is_sent_before_the_last_one_is_told(monkeypatch):
    """Of the same rows, with nothing from the host in between; and what they bring is told while it is under way."""
    serving, asked, order = engine("v3", True), dict[int, Asked](), list[str]()
    submit(serving, asked, Asked([5, 9, 2], GREEDY))
    continuous = serving.requests.continuous
    decode, settle = continuous.programs.decode, continuous._settle

    def sent(weights, plans, before=None):
        order.append("ahead" if before is not None else "sent")
        return decode(weights, plans, before)

    def settled(what):
        order.append("settled")
        return settle(what)

    monkeypatch.setattr(continuous.programs, "decode", sent)
    monkeypatch.setattr(continuous, "_settle", settled)
    serving.step()
    assert order == ["sent"]
    step(serving, asked)
    assert order == ["sent", "ahead", "settled"] and [len(answer.ids) for answer in asked.values()] == [1]
    finish(serving, asked)
    assert order.count("sent") == 1
    assert_right("v3", [*asked.values()])


@AHEAD
def test_a_step_that_fails_keeps_no_pages(ahead, monkeypatch):
    """The next one needs the room for its own, and nobody looks for circles of objects before."""
    serving, asked = engine("v3", ahead), dict[int, Asked]()
    submit(serving, asked, Asked([5, 9, 2], GREEDY))
    step(serving, asked)
    programs = serving.requests.continuous.programs
    programs.wait()
    pages = [weakref.ref(page) for page in jax.tree.leaves(programs._pages)]

    def fails(*arrays):
        raise MemoryError("RESOURCE_EXHAUSTED")

    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(programs, "_programs", dict.fromkeys(programs._programs, fails))
            with contextlib.suppress(MemoryError):
                for _ in range(3):
                    step(serving, asked)
                pytest.fail("it has not failed")
        for _ in range(500):  # the other thread may still be letting go
            if not any(page() is not None for page in pages):
                break
            time.sleep(0.01)
        assert pages and not any(page() is not None for page in pages)
    finally:
        gc.enable()
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


@AHEAD
@pytest.mark.parametrize("what", [paged.read, paged.copy_pages])
def test_nothing_is_decoded_behind_what_could_not_be_read(what, ahead, monkeypatch):
    """Whether or not anybody looks at what that brings: the step fails, and the next one reads it in."""
    serving, asked, prompt = engine("v3", ahead), dict[int, Asked](), [*range(3, 26)]
    serving.update(*weights(SPEAKER))  # so that nothing is found yet
    if what is paged.copy_pages:
        submit(serving, asked, Asked(prompt, GREEDY))
        finish(serving, asked)
    submit(serving, asked, Asked(prompt, GREEDY))
    programs = serving.requests.continuous.programs

    def fails(*arrays):
        raise MemoryError("no room")

    some = {key: fails if key[0] is what else each for key, each in programs._programs.items()}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(programs, "_programs", some)
        for _ in range(3):
            step(serving, asked)
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


def test_nothing_is_under_way_when_nobody_asks():
    """Whoever has the devices next, as a train step does, is not beside another thread's calls."""
    serving, asked = engine("v3", True), dict[int, Asked]()
    submit(serving, asked, whole_answer := Asked([5, 9, 2], dataclasses.replace(GREEDY, max_tokens=20)))
    finish(serving, asked)
    for stop in dict.fromkeys(whole_answer.ids):
        params = dataclasses.replace(whole_answer.sampling, stop_token_ids=(stop,))
        submit(serving, asked, Asked([5, 9, 2], params))
        finish(serving, asked)
        assert serving.requests.continuous._sent is None


def test_an_end_that_came_before_a_step_was_interrupted_is_told(monkeypatch):
    """Nobody else asks: there is something to be told, all the same."""
    serving, asked = engine("v3", True), dict[int, Asked]()
    submit(serving, asked, Asked([5, 9, 2], GREEDY))

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(serving.requests.continuous.programs, "wait", interrupted)
        while serving.busy:
            step(serving, asked)
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


@AHEAD
def test_the_former_weights_are_let_go_though_a_step_is_under_way(ahead, monkeypatch):
    """Before the new ones are made."""
    serving, asked = engine("v3", ahead), dict[int, Asked]()
    serving.update(*weights(SPEAKER))  # whose copies nobody else has
    submit(serving, asked, Asked([5, 9, 2], dataclasses.replace(GREEDY, max_tokens=20)))
    programs, model, held = serving.requests.continuous.programs, serving.model, list[bool]()
    former, made = [weakref.ref(array) for array in jax.tree.leaves(model.weights())], model._made

    def slow(program, *arrays):
        time.sleep(0.1)
        return program(*arrays)

    def noted():
        if model._weights is None:
            held.extend(array() is not None for array in former)
        return made()

    with monkeypatch.context() as patch:
        some = {key: functools.partial(slow, program) for key, program in programs._programs.items()}
        patch.setattr(programs, "_programs", some)
        for _ in range(3):
            step(serving, asked)
    monkeypatch.setattr(model, "_made", noted)
    serving.update(*weights(SPEAKER))
    assert held and not any(held)
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


def test_what_a_step_had_to_say_before_it_failed_the_next_one_says(monkeypatch):
    serving = engine("v3")
    gone, other = (serving.submit([7, 8, first], GREEDY) for first in (1, 2))
    serving.step()
    serving.cancel(gone)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(serving.requests.continuous.programs, "decode", None)
        serving.step()
    told = serving.step()
    assert [event.number for event in told if event.finish_reason == "cancelled"] == [gone]
    serving.cancel(other)
    serving.step()


def test_who_comes_and_goes_while_the_engine_looks_is_given_up(monkeypatch):
    """By another thread, between a look at who has come and one at who has gone."""
    serving, late = engine("v3"), list[int]()

    class Gone(collections.deque[int]):
        def popleft(self) -> int:
            if not late:
                late.append(serving.submit([7, 8], GREEDY))
                serving.cancel(late[0])
            return super().popleft()

    monkeypatch.setattr(serving.requests.continuous, "_gone", Gone([10**6]))
    serving.step()
    (number,), found = late, dict[int, str]()
    while serving.busy:
        found |= {event.number: event.finish_reason for event in serving.step()}
    assert found == {number: "cancelled"}


def test_any_thread_may_ask():
    """At once: each gets a number and an answer of its own."""
    serving, prompts = engine("v3"), [[5, 9, 2, 7], [3], [8, 8, 1], [11, 6]] * 4
    expected, asked = serving.generate(prompts, GREEDY), dict[int, Asked]()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda prompt: serving.submit(prompt, GREEDY), prompts))
    asked |= {number: Asked(prompt, GREEDY) for number, prompt in zip(numbers, prompts, strict=True)}
    finish(serving, asked)
    assert [asked[number].ids for number in numbers] == [each.token_ids for each in expected]


def spread(mesh_config: MeshConfig, serving: ServingConfig = SERVING, **compute: Any) -> Engine:
    mesh = make_mesh(mesh_config)
    params, bias = weights(SPEAKER)
    params = jax.device_put(params, tree_shardings(mesh, logical_axes(SPEAKER), params))
    model = whole(SPEAKER, params, bias, tokenizer(), mesh)
    return Engine(dataclasses.replace(model, compute=dataclasses.replace(model.compute, **compute)), serving=serving)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_a_mesh_each_device_of_the_batch_has_its_own_pages(scan):
    """Experts split by two of the four that share the batch, heads by two more."""
    serving, asked = spread(MeshConfig(data=2, expert=2, tensor=2), scan_decode=scan), dict[int, Asked]()
    rng = np.random.default_rng(0)
    for length in rng.integers(1, 30, 12).tolist():
        submit(serving, asked, Asked(rng.integers(3, 300, length).tolist(), GREEDY))
    submit(serving, asked, *(Asked([7] * 23, GREEDY) for _ in range(4)))
    step(serving, asked)
    assert serving.metrics()["running"] >= 4
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


def answers_nearly_the_same(serving: Engine, least: float, most: float) -> None:
    """By requests as by ``generate``, whose cache is not rounded; the first log-probabilities differ by so much."""
    asked, prompts = dict[int, Asked](), [[5, 9, 2, 7], [8, 8, 1, 30, 22] * 5]
    submit(serving, asked, *(Asked(prompt, GREEDY) for prompt in prompts))
    finish(serving, asked)
    for answer, expected in zip(asked.values(), serving.generate(prompts, GREEDY), strict=True):
        assert answer.ids[0] == expected.token_ids[0]
        assert least < abs(answer.logprobs[0] - expected.logprobs[0]) < most


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_in_fp8_answers_nearly_the_same(scan):
    wide = dataclasses.replace(SPEAKER, kv_lora_rank=128)
    model = whole(wide, *weights(wide), tokenizer())
    model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, scan_decode=scan))
    serving = Engine(model, serving=dataclasses.replace(SERVING, cache="float8_e4m3"))
    answers_nearly_the_same(serving, 1e-5, 0.3)
    with pytest.raises(ValueError, match="cache='float8_e4m3': only MLA's latents"):
        Engine(whole(MODELS["qwen"], *weights(MODELS["qwen"]), tokenizer()), serving=serving.serving).submit([1])


@pytest.mark.parametrize("kind", ["qwen", "v3"])
def test_a_cache_in_bfloat16_answers_nearly_the_same(kind):
    model = whole(MODELS[kind], *weights(MODELS[kind]), tokenizer())
    serving = Engine(model, serving=dataclasses.replace(SERVING, cache="bfloat16"))
    if jax.__version_info__ < (0, 11):
        with pytest.raises(ValueError, match="cache='bfloat16', jax 0.10"):
            serving.submit([1])
        return
    answers_nearly_the_same(serving, 1e-6, 0.02)


def test_zeros_behind_each_entry_change_nothing(monkeypatch):
    """As on TPUs, where entries are as wide as registers."""
    monkeypatch.setattr(paged, "entry_width", lambda config, compute: 128)
    serving = Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()), serving=dataclasses.replace(SERVING, pages=15))
    asked = dict[int, Asked]()
    submit(serving, asked, Asked([5, 9, 2, 7, 30, 22, 8] * 3, GREEDY), Asked([8, 8, 1], GREEDY))
    finish(serving, asked)
    assert_right("v3", [*asked.values()])


def test_what_can_never_be_answered_is_refused():
    serving = engine("v3")
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        serving.submit([])
    with pytest.raises(ValueError, match="the prompt has the ids 3…300: expected ids from 0 to below vocab_size=300"):
        serving.submit([3, 300])
    with pytest.raises(ValueError, match="a prompt of 41 tokens and max_tokens=8 pass context=48"):
        serving.submit([3] * 41, GREEDY)
    with pytest.raises(ValueError, match="1[0-9] ids that end an answer.*: expected at most 16"):
        serving.submit([3], dataclasses.replace(GREEDY, stop_token_ids=tuple(range(17))))
    for wrong in ({"stop_token_ids": (300,)}, {"logit_bias": ((300, 1.0),)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} has the id 300: expected below vocab_size=300"):
            serving.submit([3], dataclasses.replace(GREEDY, **wrong))
    for draw in (-1, 2**31):
        with pytest.raises(ValueError, match=f"draw={draw}: expected from 0"):
            serving.submit([3], GREEDY, draw=draw)
    assert not serving.busy
    serving.cancel(10**6)  # who is not there is not given up
    assert serving.step() == []

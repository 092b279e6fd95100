"""Log-probabilities of prompts, against the plain forward pass: in pieces, over prefixes that are there, by whom gives
way, on a mesh, and beside who asks for none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.ahead import sent_ahead
from inference.test_continuous import GREEDY, MODELS, SERVING, Asked, assert_right, forward, spread
from model.tiny import weights, whole
from small import tokenizer

from deepseek_jax.inference import scores
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.events import Event
from deepseek_jax.inference.prompt_scores import PromptScores
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.parallel.mesh import MeshConfig

SCORING = dataclasses.replace(SERVING, score=True)
SCORED = dataclasses.replace(GREEDY, prompt_logprobs=True)
ALONE = dataclasses.replace(SCORED, max_tokens=0)
RNG = np.random.default_rng(0)
LONG = RNG.integers(3, 300, 40).tolist()


@functools.cache
def engine(name: str, serving: ServingConfig = SCORING, ahead: bool = False) -> Engine:
    made = Engine(whole(MODELS[name], *weights(MODELS[name]), tokenizer()), serving=serving)
    if ahead:
        made = sent_ahead(made)
    made.warm_up()
    return made


def answered(made: Engine, *asked: tuple[list[int], SamplingParams]) -> list[list[Event]]:
    """The events of each request, all asked for together; no page is lost between them."""
    numbers = [made.submit(*each) for each in asked]
    found = dict[int, list[Event]]({number: [] for number in numbers})
    while made.busy:
        for event in made.step():
            found[event.number].append(event)
        made.requests.continuous.check()
    assert made.metrics()["pages_held"] == made.metrics()["compiles"] == 0
    return [found[number] for number in numbers]


def scored(events: list[Event]) -> PromptScores:
    """With the first event, and with no other."""
    first, *others = events
    assert first.prompt is not None and not any(event.prompt for event in others)
    return first.prompt


def assert_the_forwards(name: str, prompt: list[int], told: PromptScores, alternatives: int = 0) -> None:
    tokens = np.zeros((1, SERVING.context), np.int32)
    tokens[0, : len(prompt)] = prompt
    logits = np.asarray(forward(name)(*weights(MODELS[name]), jnp.asarray(tokens)), np.float64)[0, : len(prompt) - 1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(told.logprobs, logprobs[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-4)
    assert len(told.alternatives) == (len(prompt) - 1 if alternatives else 0)
    for row, one, given in zip(logprobs, told.logprobs, told.alternatives, strict=False):
        best = np.sort(row)[::-1][:alternatives]
        np.testing.assert_allclose([logprob for _, logprob in given], best, atol=1e-4)
        np.testing.assert_allclose(row[[token for token, _ in given]], best, atol=1e-4)
        assert max(logprob for _, logprob in given) >= one


@pytest.mark.parametrize(("name", "ahead"), [*((name, False) for name in MODELS), ("v3", True)])
def test_a_prompts_log_probabilities_are_the_plain_forwards(name, ahead):
    """Alone and beside others, in one chunk and in several; the answers are right, too."""
    made, asks = engine(name, ahead=ahead), dataclasses.replace
    cases = [([5], ALONE), ([5], SCORED), ([7, 9], ALONE), (LONG[:5], SCORED)]
    cases += [
        (LONG[:12], asks(SCORED, alternatives=1)),
        (LONG, asks(SCORED, alternatives=3)),
        (LONG[::-1], asks(ALONE, alternatives=20)),
        (LONG[3:30], GREEDY),
    ]
    cases += [(LONG, GREEDY), (LONG, asks(SCORED, seed=3, temperature=0.8)), ([*LONG, *LONG[:8]], ALONE)]
    for (prompt, sampling), events in zip(cases, answered(made, *cases), strict=True):
        if sampling.prompt_logprobs:
            assert not events[0].cached
            assert_the_forwards(name, prompt, scored(events), sampling.alternatives)
        ids = [token for event in events for token in event.token_ids]
        logprobs = [logprob for event in events for logprob in event.logprobs]
        assert_right(name, [Asked(prompt, sampling, 0, ids, logprobs, events[-1].finish_reason)])


def test_who_is_the_likeliest_has_the_number_of_the_alternative():
    """To the last bit, which harnesses look at to tell whether an answer is the greedy one."""
    made = engine("v3")
    (best,) = answered(made, ([7, 9], dataclasses.replace(GREEDY, max_tokens=16)))
    prompt = [7, 9, *(token for event in best for token in event.token_ids)]
    for alternatives in (1, 2):
        (events,) = answered(made, (prompt, dataclasses.replace(ALONE, alternatives=alternatives)))
        told = scored(events)
        for token, one, given in list(zip(prompt[1:], told.logprobs, told.alternatives, strict=True))[1:]:
            assert given[0] == (token, one)


def test_the_most_likely_of_prompt_and_answer_are_found_by_parts_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr("deepseek_jax.inference.sampling.PART", 8)  # 38 of them, for 20 tokens
    serving = dataclasses.replace(SCORING, slots=2, turns=1)  # programs of its own
    made = Engine(whole(MODELS["v3"], *weights(MODELS["v3"]), tokenizer()), serving=serving)
    made.warm_up()
    (events,) = answered(made, (LONG[:9], dataclasses.replace(SCORED, alternatives=20)))
    told, ids = scored(events), [token for event in events for token in event.token_ids]
    logprobs = [*told.logprobs, *(logprob for event in events for logprob in event.logprobs)]
    alternatives = [*told.alternatives, *(likely for event in events for likely in event.alternatives)]
    assert_the_forwards("v3", [*LONG[:9], *ids], PromptScores(logprobs, alternatives), 20)


def test_what_the_cache_has_is_read_again_and_lent_to_others():
    made = engine("v3")
    made.update(*weights(MODELS["v3"]))
    found = lambda: made.metrics()["found_tokens"]  # noqa: E731
    before = found()
    answered(made, (LONG, GREEDY))
    first, second = (scored(answered(made, (LONG, ALONE))[0]) for _ in range(2))
    assert found() == before and first == second
    assert_the_forwards("v3", LONG, first)
    made.update(*weights(MODELS["v3"]))
    answered(made, (LONG, ALONE))
    (events,) = answered(made, (LONG, GREEDY))
    assert events[0].cached == found() - before == len(LONG) - 1


@pytest.mark.parametrize("ahead", [False, True])
def test_who_gives_way_is_told_once(ahead, monkeypatch):
    """Pages run out while answers grow: behind what was told it finds its prefix; and a step that fails loses what it
    had read, none of it twice."""
    made = engine("v3", dataclasses.replace(SCORING, pages=12), ahead)
    cases = [(LONG[first : first + 14], dataclasses.replace(SCORED, max_tokens=30)) for first in range(6)]
    before = made.metrics()
    for (prompt, _), events in zip(cases, answered(made, *cases), strict=True):
        assert_the_forwards("v3", prompt, scored(events))
    assert made.metrics()["preemptions"] > before["preemptions"]
    number, events = made.submit(LONG, SCORED), list[Event]()
    made.step()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(made.requests.continuous.programs, "read", None)
        made.step()
    while made.busy:
        events += made.step()
    assert {event.number for event in events} == {number}
    assert_the_forwards("v3", LONG, scored(events))


def test_no_request_waits_for_a_compiler():
    """Counted by jax itself; with an MTP module, which takes the token more as well, the scores are the same."""
    network = MODELS["v3"]
    serving = dataclasses.replace(SCORING, chunk=64, pages=24, drafts=2)
    made = Engine(whole(network, *weights(network), tokenizer()), serving=serving)
    made.warm_up()
    compiled = list[str]()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: compiled.append(event))
    sizes = (1, 2, 5, 17, 40, 3, 3, 9)
    cases = [(LONG[:size], dataclasses.replace(ALONE, alternatives=size % 3)) for size in sizes]
    cases += [(LONG[-size:], GREEDY) for size in sizes]
    found = answered(made, *cases)
    assert not [name for name in compiled if "compile" in name]
    for (prompt, sampling), events in list(zip(cases, found, strict=True))[: len(sizes)]:
        assert_the_forwards("v3", prompt, scored(events), sampling.alternatives)


def test_on_a_mesh(monkeypatch):
    """Rows by four, the vocabulary by two; and more rows than logits are held of at a time."""
    monkeypatch.setattr(scores, "ROWS", 3)
    monkeypatch.setattr("deepseek_jax.inference.sampling.PART", 8)
    made = spread(MeshConfig(data=2, expert=2, tensor=2), serving=SCORING)
    cases = [(LONG[first : first + 22], dataclasses.replace(ALONE, alternatives=first % 3)) for first in range(6)]
    for (prompt, sampling), events in zip(cases, answered(made, *cases), strict=True):
        assert_the_forwards("v3", prompt, scored(events), sampling.alternatives)


def test_a_prompt_whose_scores_are_nan_ends_with_an_error():
    """With an answer and without; the one beside it is right."""
    params, bias = weights(MODELS["v3"])
    params = params | {"embed": params["embed"].at[298].set(jnp.nan)}
    made = Engine(whole(MODELS["v3"], params, bias, tokenizer()), serving=SCORING)
    *ailing, well = answered(made, ([3, 298, 4], ALONE), ([3, 298, 4], SCORED), (LONG, ALONE))
    for (event,) in ailing:
        assert (event.finish_reason, event.ours, event.prompt) == ("error", True, None) and "NaN" in event.error
    assert_the_forwards("v3", LONG, scored(well))


def test_what_is_not_to_be_had():
    plain = Engine(whole(MODELS["v3"], *weights(MODELS["v3"]), tokenizer()), serving=SERVING)
    with pytest.raises(ValueError, match="prompt_logprobs .*: for an engine with ServingConfig.score=True"):
        plain.submit([3, 4], SCORED)
    with pytest.raises(ValueError, match="prompt_logprobs=True: for requests"):
        plain.generate([[3, 4]], SCORED)
    with pytest.raises(ValueError, match="max_tokens=0"):
        SamplingParams(max_tokens=0)
    made = engine("v3")
    with pytest.raises(ValueError, match="a prompt of 49 tokens and max_tokens=0 pass context=48"):
        made.submit([3] * 49, ALONE)

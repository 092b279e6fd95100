"""Any number of prompts answered to their ends, on top of requests as they come."""

import concurrent.futures
import dataclasses

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig

SERVING = ServingConfig(slots=3, pages=32, page=4, chunk=16, turns=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
DRAWN = SamplingParams(max_tokens=8, seed=3)
PROMPTS = ["def", "12+", "a", "7*8", "(a, b)"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(whole(SPEAKER, *weights(SPEAKER), tokenizer()), serving=SERVING)


def test_answers_are_those_of_generate(engine):
    """More prompts than slots; of each several samples, which are those of as many equal prompts."""
    for sampling in (GREEDY, DRAWN, [dataclasses.replace(DRAWN, seed=seed) for seed in range(5)]):
        one = [answer for (answer,) in engine.answer(PROMPTS, sampling)]
        for found, expected in zip(one, engine.generate(PROMPTS, sampling), strict=True):
            assert dataclasses.replace(found, logprobs=[]) == dataclasses.replace(expected, logprobs=[])
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    several = engine.answer(PROMPTS[:2], DRAWN, n=3)
    expected = engine.generate([prompt for prompt in PROMPTS[:2] for _ in range(3)], DRAWN)
    assert [answer.text for answers in several for answer in answers] == [answer.text for answer in expected]
    assert engine.answer([]) == [] and not engine.busy


def test_a_prompt_with_its_own_parameters_is_answered_as_alone(engine):
    alone = engine.answer(["def"], [DRAWN], n=2)
    among = engine.answer(["a", "def", "12+"], [GREEDY, DRAWN, DRAWN], n=2)
    assert [answer.token_ids for answer in among[1]] == [answer.token_ids for answer in alone[0]]
    assert alone[0][0].token_ids != alone[0][1].token_ids


def test_alternatives_come_with_the_answer(engine):
    ((answer,),) = engine.answer(["def"], dataclasses.replace(GREEDY, alternatives=2))
    assert [each[0][0] for each in answer.alternatives] == answer.token_ids


def test_threads_and_who_steps_share_the_engine(engine):
    """Each has its own answers; those of who submits are kept for ``step``."""
    expected = engine.generate(PROMPTS, GREEDY)
    number = engine.submit("a", GREEDY)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: engine.answer([prompt], GREEDY)[0][0].token_ids, PROMPTS))
    assert found == [answer.token_ids for answer in expected]
    ids, ended = [], ""
    while engine.busy:
        for event in engine.step():
            assert event.number == number and not ended
            ids, ended = ids + event.token_ids, event.finish_reason
    assert ids == expected[2].token_ids and ended == "length"


def test_an_error_gives_up_what_was_asked(engine, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.requests.continuous.programs, "decode", interrupted)
        engine.answer(PROMPTS, GREEDY)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        engine.answer([[5], []], GREEDY)
    while engine.busy:
        assert engine.step() == []
    assert engine.metrics()["pages_held"] == 0 and not engine.requests.awaited


def test_what_makes_no_sense_is_refused(engine):
    for n in (0, True):
        with pytest.raises(ValueError, match=f"n={n}: expected an int of at least 1"):
            engine.answer(["a"], n=n)
    with pytest.raises(ValueError, match="prompts='a' is one text"):
        engine.answer("a")
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling parameters"):
        engine.answer(["a", "b"], [GREEDY])

"""Seeds and log-probabilities: a request's own, whatever stands beside it, and those that a learner computes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.test_continuous import MARGIN, MODELS, SERVING, Asked, engine, finish, forward, noise, step, submit
from model.tiny import weights, whole
from small import tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import parameters

WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 30, "min_p": 0.01},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": ((7, 3.0),)},
    {"regex": "[a-z0-9+]{16}"},
)


def a_request(rng: np.random.Generator) -> Asked:
    prompt = rng.integers(3, 300, rng.integers(1, 24)).tolist()
    sampling = SamplingParams(max_tokens=16, seed=rng.integers(9).item(), **WAYS[rng.integers(len(WAYS))])
    return Asked(prompt, sampling, rng.integers(3).item())


def in_company(name: str, mine: Asked, seed: int) -> None:
    """Others come before it and while it is answered, more than there are slots; some are given up."""
    rng, asked = np.random.default_rng(seed), dict[int, Asked]()
    submit(engine(name), asked, *(a_request(rng) for _ in range(rng.integers(3))))
    for _ in range(rng.integers(3)):
        step(engine(name), asked)
    submit(engine(name), asked, mine)
    while engine(name).busy and not mine.reason:
        if rng.random() < 0.5:
            submit(engine(name), asked, *(a_request(rng) for _ in range(rng.integers(3))))
        if rng.random() < 0.3:
            engine(name).cancel(
                int(rng.choice([number for number, other in asked.items() if other is not mine] or [-1]))
            )
        step(engine(name), asked)
    finish(engine(name), asked)


def margin(name: str, mine: Asked, other: Asked) -> float:
    """By how much the plain forward pass prefers one of the two at the first place where they differ."""
    at = next(i for i, (a, b) in enumerate(zip(mine.ids, other.ids, strict=False)) if a != b)
    row = np.zeros((8, SERVING.context), np.int32)
    row[0, : len(mine.prompt) + at] = [*mine.prompt, *mine.ids[:at]]
    scores = np.asarray(forward(name)(*weights(MODELS[name]), jnp.asarray(row)))[0, len(mine.prompt) + at - 1]
    if temperature := mine.sampling.temperature:
        scores = scores / temperature + np.asarray(noise()(mine.sampling.seed, mine.draw, np.array([at] * 16)))[0]
    return abs(float(scores[mine.ids[at]] - scores[other.ids[at]]))


@pytest.mark.parametrize("name", ["v3", "qwen"])
def test_a_request_is_answered_as_alone_in_any_company(name):
    """Drawn in every way; where the sums of another batch have chosen another token, the two were within ``MARGIN``."""
    same, rng = 0, np.random.default_rng(5)
    for seed in range(10):
        mine = a_request(rng)
        alone = Asked(mine.prompt, mine.sampling, mine.draw)
        submit(engine(name), asked := dict[int, Asked](), alone)
        finish(engine(name), asked)
        in_company(name, mine, seed)
        if mine.ids == alone.ids:
            same += 1
            np.testing.assert_allclose(mine.logprobs, alone.logprobs, atol=1e-4)
        else:
            assert margin(name, mine, alone) < MARGIN
    assert same >= 9 and engine(name).metrics()["compiles"] == 0


@pytest.mark.parametrize("name, dtype, most", [("v3", "float32", 1e-8), ("qwen", "bfloat16", 1e-3)])
def test_log_probabilities_are_those_of_the_learner(name, dtype, most):
    """KL between the two, over tokens that were drawn: prefill, then one token a time over a cache, against one pass of
    the network that is trained, of its dtypes. In float32 each within 1e-4. In bfloat16 of a network without experts:
    of a random one with eight, some of which are chosen in one pass and in the other just not, the KL is 0.008."""
    model = whole(MODELS[name], *weights(MODELS[name]), tokenizer())
    model = dataclasses.replace(model, compute=dataclasses.replace(model.compute, dtype=dtype))
    prompts = np.random.default_rng(0).integers(3, 300, (16, 8)).tolist()
    answers = Engine(model, serving=SERVING).answer(prompts, SamplingParams(max_tokens=32))
    rows = [[*prompt, *answer.token_ids] for prompt, (answer,) in zip(prompts, answers, strict=True)]
    tokens = np.array([[*row, *[0] * (40 - len(row))] for row in rows], np.int32)

    @jax.jit
    def learner(params, bias, tokens_BS):
        logits_BSW = parameters.merge(MODELS[name], params, bias, model.compute)(tokens_BS).logits
        assert logits_BSW is not None
        return jax.nn.log_softmax(logits_BSW)

    logprobs = np.asarray(learner(*weights(MODELS[name]), jnp.asarray(tokens)), np.float64)
    ratios = []
    for row, (answer,) in enumerate(answers):
        places = 7 + np.arange(len(answer.token_ids))
        ratios += [*(logprobs[row, places, answer.token_ids] - answer.logprobs)]
    ratio = np.array(ratios)
    assert len(ratio) > 200 and np.mean(np.exp(ratio) - 1 - ratio) < most
    assert dtype == "bfloat16" or np.abs(ratio).max() < 1e-4

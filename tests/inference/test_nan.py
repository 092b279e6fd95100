"""Where scores are NaN: the request that has them ends with an error, and nobody else learns of it."""

import dataclasses

import jax.numpy as jnp
import pytest
from inference.ahead import sent_ahead
from model.tiny import QWEN, config, weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig

POISON = 7  # a token whose embedding is NaN
STUDENT = config(QWEN, vocab_size=300, max_position_embeddings=64, tie_word_embeddings=False)
SERVING = ServingConfig(slots=3, pages=20, page=4, context=48, chunk=8, turns=3)
WELL = SamplingParams(max_tokens=12, temperature=0.0, logit_bias=((POISON, -1e5),))
PROMPTS = [[5, 9, 2, 30], [8, 8, 1, 22] * 4, [11], [40, 41, 42] * 7]


def engine(model: ModelConfig, *, poisoned: bool, drafts: int = 0) -> Engine:
    params, bias = weights(model)
    if poisoned:
        params = params | {"embed": params["embed"].at[POISON].set(jnp.nan)}
    serving = dataclasses.replace(SERVING, drafts=drafts)
    return Engine(whole(model, params, bias, tokenizer()), serving=serving)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("model", "drafts"), [(SPEAKER, 0), (SPEAKER, 2), (STUDENT, 0)], ids=["mla", "drafts", "gqa"])
def test_who_has_them_ends_with_an_error_and_the_others_answer_as_ever(model, drafts, ahead):
    """Of a prompt that holds the token, and of one that is answered with it; routers and caches have NaN in them."""
    ailing = engine(model, poisoned=True, drafts=drafts)
    if ahead:
        ailing = sent_ahead(ailing)
    says_it = dataclasses.replace(WELL, logit_bias=((POISON, 1e5),))
    asked = [(PROMPTS[0], WELL), ([3, POISON, 4, 4, 4], WELL), (PROMPTS[1], WELL), ([6, 6], says_it)]
    asked += [(prompt, WELL) for prompt in PROMPTS[2:]]
    found = [answer for (answer,) in ailing.answer(*zip(*asked, strict=True))]
    assert [found[1].finish_reason, found[3].finish_reason] == ["error", "error"]
    assert [found[1].token_ids, found[3].token_ids] == [[], [POISON]]
    expected = [answer for (answer,) in engine(model, poisoned=False).answer(PROMPTS, [WELL] * len(PROMPTS))]
    for answer, right in zip([found[i] for i in (0, 2, 4, 5)], expected, strict=True):
        assert answer.token_ids == right.token_ids
        assert answer.logprobs == pytest.approx(right.logprobs, abs=1e-4)
    assert ailing.metrics()["pages_held"] == 0


def test_what_is_left_in_pages_hurts_nobody():
    """It is given up before anybody has seen its scores, and others get its pages."""
    ailing = engine(STUDENT, poisoned=True)
    for _ in range(3):
        number = ailing.submit([POISON] * 36, WELL)
        ailing.step()
        ailing.cancel(number)
    found = [answer.token_ids for (answer,) in ailing.answer(PROMPTS, WELL)]
    assert found == [answer.token_ids for (answer,) in engine(STUDENT, poisoned=False).answer(PROMPTS, WELL)]


def test_what_is_told():
    ailing = engine(STUDENT, poisoned=True)
    number = ailing.submit([POISON], WELL)
    events = [event for _ in range(8) for event in ailing.step()]
    (event,) = events
    assert (event.number, event.finish_reason, event.ours) == (number, "error", True) and "NaN" in event.error
    assert not ailing.busy


def test_rows_that_are_answered_in_turn_are_none_to_learn_from():
    params, bias = weights(STUDENT)
    model = whole(STUDENT, params | {"embed": params["embed"].at[POISON].set(jnp.nan)}, bias, tokenizer())
    in_turn = Engine(model, at_once=2)
    with pytest.raises(ArithmeticError, match="prompt 1: .*NaN"):
        in_turn.generate([[5, 9], [POISON], [6]], SamplingParams(max_tokens=4))
    assert len(in_turn.generate([[5, 9], [6]], SamplingParams(max_tokens=1, temperature=0.0))) == 2

"""The engine: text in, text out, the same for a prompt by itself and in a batch."""

import dataclasses

import jax
import numpy as np
import pytest
from model.tiny import weights
from small import SPEAKER, tokenizer

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import transformer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(transformer.merge(SPEAKER, *weights(SPEAKER)), tokenizer())


def test_text_is_completed_from_its_beginning(engine):
    """A text gets the begin-of-sentence token in front; ids are taken as they are."""
    prompt = "12+34="
    ids = [tokenizer().bos_id, *tokenizer().encode(prompt)]
    (by_text,), (by_ids,) = engine.generate([prompt], GREEDY), engine.generate([ids], GREEDY)
    assert by_text == by_ids
    logits = jax.jit(lambda p, b, x: transformer.merge(SPEAKER, p, b)(x).logits)
    row = np.zeros((1, 24), np.int32)
    row[0, : len(ids)] = ids
    assert by_text.token_ids[0] == int(np.argmax(logits(*weights(SPEAKER), jax.numpy.asarray(row))[0, len(ids) - 1]))
    assert len(by_text.token_ids) == len(by_text.logprobs) == 8 and by_text.finish_reason == "length"
    assert by_text.text == tokenizer().decode(by_text.token_ids, skip_special_tokens=False)


def test_a_batch_answers_each_prompt_as_by_itself(engine):
    prompts = ["def", "12+", "a"]
    together = engine.generate(prompts, GREEDY)
    assert [c.token_ids for c in together] == [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    assert engine.generate([], GREEDY) == []


def test_an_answer_ends_with_its_stop_token(engine):
    (whole,) = engine.generate(["def"], GREEDY)
    stop = whole.token_ids[4]
    length = whole.token_ids.index(stop) + 1
    stopping = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(stop,))
    (answer,) = engine.generate(["def"], stopping)
    assert answer.finish_reason == "stop" and answer.token_ids == whole.token_ids[:length]
    assert answer.text == tokenizer().decode(whole.token_ids[: length - 1], skip_special_tokens=False)
    np.testing.assert_allclose(answer.logprobs, whole.logprobs[:length], atol=1e-5)


def test_the_end_of_sentence_stops(engine):
    """With the head's columns of the first answer token and the end of sentence swapped, the latter comes first."""
    first, eos = engine.generate(["def"], GREEDY)[0].token_ids[0], tokenizer().eos_id
    params, bias = weights(SPEAKER)
    w = params["head"]["w"].at[:, [first, eos]].set(params["head"]["w"][:, [eos, first]])
    other = Engine.from_params(SPEAKER, params | {"head": {"w": w}}, bias, tokenizer())
    (answer,) = other.generate(["def"], GREEDY)
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([eos], "", "stop")


def test_a_seed_reproduces_its_answers(engine):
    sampled = [
        [c.token_ids for c in engine.generate(["def"] * 2, SamplingParams(max_tokens=8, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][0] != sampled[0][1]


def test_what_cannot_be_answered_is_refused(engine):
    with pytest.raises(ValueError, match="prompt of 60 tokens and max_tokens=8 pass max_position_embeddings=64"):
        engine.generate([[1] * 60], GREEDY)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(ValueError, match="tokenizer has 294 tokens, the model only vocab_size=40"):
        Engine.from_params(dataclasses.replace(SPEAKER, vocab_size=40), *weights(SPEAKER), tokenizer())

"""Generation against the full forward pass, in one batch of prompts of different length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model.tiny import V1, V3, config, weights

from deepseek_jax.inference.generate import generate, pad_prompts
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model import transformer

MODELS = {"v3": config(V3, num_hidden_layers=2), "v1": config(V1, num_hidden_layers=2)}
TINY = MODELS["v3"]
PROMPTS = [[5, 9, 2, 7], [3], [8, 8, 1, 30, 22, 4, 17], [11, 6]]
WIDTH, NEW, PAD = 8, 10, 0
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, max_tokens=NEW)


def run(prompts=PROMPTS, *, tiny=TINY, sampling=GREEDY, seed=0, stop=(-1,)):
    tokens, positions = map(jnp.asarray, pad_prompts(prompts, PAD, WIDTH))
    key = jax.random.key(seed)
    out = generate(tiny, *weights(tiny), tokens, positions, key, sampling=sampling, stop_ids=stop, pad_id=PAD)
    return jax.device_get(out)


@functools.cache
def forward(tiny):
    return jax.jit(lambda params, bias, tokens: transformer.merge(tiny, params, bias)(tokens).logits)


def logprobs_of(rows, tiny=TINY, temperature=1.0):
    """Log-probabilities (token by token, over the vocabulary) by the full forward pass of each whole row."""
    tokens = np.zeros((len(rows), WIDTH + NEW), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids  # what stands behind changes nothing before it
    logits = np.asarray(forward(tiny)(*weights(tiny), jnp.asarray(tokens)), np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_full_forward_step_by_step(name):
    tiny = MODELS[name]
    out = run(tiny=tiny)
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
    out = run(stop=(-1, stop))
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


def test_prompts_are_aligned_on_the_right():
    tokens, positions = pad_prompts([[7], [4, 5, 6]], 2, 4)
    assert tokens.tolist() == [[2, 2, 2, 7], [2, 4, 5, 6]]
    assert positions.tolist() == [[-1, -1, -1, 0], [-1, 0, 1, 2]]


@pytest.mark.parametrize("prompt, size", [([], 0), ([1] * 5, 5)])
def test_prompts_that_do_not_fit_are_refused(prompt, size):
    with pytest.raises(ValueError, match=rf"prompt 1 has {size} tokens: expected 1…4"):
        pad_prompts([[1], prompt], 2, 4)

"""Thinking within a budget, with a model whose every token is known beforehand."""

import dataclasses

import jax.numpy as jnp
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.evals.budget import Words, conclude, think
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.inference.sampling import SamplingParams

TEXT = tokenizer()
WORDS = Words(begin="<think>", wait="Wait", end="</think>")


class Scripted(Engine):
    """An engine whose model thinks "1+1=2", then wants to stop; after "Wait" it thinks "7*8=56"; it answers "4"."""

    def __init__(self):
        self.tokenizer, self.asked = TEXT, []

    def generate_ids(self, prompts, sampling, key=None, *, experts=False):
        rows = []
        assert not isinstance(sampling, SamplingParams)
        for prompt, params in zip(prompts, sampling, strict=True):
            self.asked.append(self.decode(prompt))
            said = self.asked[-1].partition("<think>")[2]
            thought = "7*8=56" if said.endswith("Wait") else "1+1=2"
            ids = TEXT.encode("4") if "</think>" in said else TEXT.encode(thought)
            ids += [TEXT.eos_id if "</think>" in said else TEXT.end_think_id]
            rows.append(ids[: params.max_tokens])
        width = max(map(len, rows))
        return Generated(
            tokens_BN=jnp.array([row + [0] * (width - len(row)) for row in rows]),
            logprobs_BN=jnp.zeros((len(rows), width)),
            lengths_B=jnp.array([len(row) for row in rows]),
            stopped_B=jnp.array([row[-1] in (TEXT.eos_id, TEXT.end_think_id) for row in rows]),
        )


def thought(most: int, waits: int = 0):
    engine = Scripted()
    (found,) = think(engine, [TEXT.encode("?")], [SamplingParams(max_tokens=most)], waits=waits, words=WORDS)
    return engine, found


def test_a_thought_ends_by_itself_is_cut_or_is_sent_on():
    first, later = TEXT.encode("1+1=2"), TEXT.encode("7*8=56")
    wait = TEXT.encode("Wait")
    engine, found = thought(30)
    assert (found.ids, found.ended) == (first, True) and engine.asked == ["?<think>"]
    _, found = thought(3)
    assert (found.ids, found.ended) == (first[:3], False)
    _, found = thought(40, waits=2)
    assert (found.ids, found.ended) == ([*first, *wait, *later, *wait, *later], True)
    _, found = thought(len(first) + len(wait) + 2, waits=5)
    assert (found.ids, found.ended) == ([*first, *wait, *later[:2]], False)
    _, found = thought(len(first) + len(wait), waits=5)  # no room to go on
    assert (found.ids, found.ended) == (first, True)


def test_the_answer_follows_what_a_budget_leaves():
    engine, found = thought(30)
    engine.asked.clear()
    budgets = [2, len(found.ids), 30]
    sampling = [SamplingParams(max_tokens=5), SamplingParams(max_tokens=5), SamplingParams(max_tokens=1)]
    words = dataclasses.replace(WORDS, end="\n</think>\n\nAnswer: ")
    replies = conclude(engine, [found] * 3, budgets, sampling, words=words)
    cut = TEXT.decode(found.ids[:2])
    assert engine.asked[0] == f"?<think>{cut}\n</think>\n\nAnswer: "
    assert engine.asked[1:] == ["?<think>1+1=2</think>"] * 2
    assert [reply.thought for reply in replies] == [f"<think>{cut}\n</think>", *["<think>1+1=2</think>"] * 2]
    assert [(reply.text, reply.ended) for reply in replies] == [("\n\nAnswer: 4", True), ("4", True), ("4", False)]
    with pytest.raises(ValueError, match="expected a text with </think> in it"):
        conclude(engine, [found], [1], sampling[:1], words=Words(end="so:"))


def test_a_smaller_budget_is_the_beginning_of_a_greater():
    """By a real engine: the thought of a small budget, sampled anew, is the large one's beginning."""
    engine = Engine(whole(SPEAKER, *weights(SPEAKER), TEXT))
    prompts = [TEXT.encode(text) for text in ("12+34=", "def add", "7*8")]
    sampling = [SamplingParams(max_tokens=24, seed=seed) for seed in (3, 4, 5)]
    long = think(engine, prompts, sampling, words=WORDS)
    short = think(engine, prompts, [dataclasses.replace(params, max_tokens=9) for params in sampling], words=WORDS)
    assert [found.ids[:9] for found in long] == [found.ids for found in short]
    assert len({tuple(found.ids) for found in long}) == 3

"""Thinking for a given number of tokens: cut where it is too long, sent on with a word where it ends too soon
(budget forcing, arXiv 2501.19393, section 3.1)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.special_tokens import THINK
from deepseek_jax.data.template import opens_thinking
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import any_process


@dataclasses.dataclass(frozen=True)
class Words:
    """What is written for the model. Special tokens count as such."""

    begin: str = "<think>\n"
    """Opens the thinking, where the chat template has not."""
    wait: str = "Wait"
    """In the place of an end of thinking that comes before the budget."""
    end: str = "\n</think>\n\n"
    """Ends thinking that is cut; the answer follows."""


@dataclasses.dataclass(frozen=True)
class Thought:
    """prompt: with the opening. ids: what was thought, the words to go on included, `</think>` left out. ended: by the
    model itself, not by the longest budget."""

    prompt: list[int]
    ids: list[int]
    ended: bool

    def within(self, budget: int) -> tuple[list[int], bool]:
        """The ids of it that a budget allows, and whether they are all of a thought that has ended."""
        return self.ids[:budget], self.ended and len(self.ids) <= budget


@dataclasses.dataclass(frozen=True)
class Reply:
    """text: what is answered behind `</think>`. thought: what stands before that, from `<think>` to `</think>`.
    ended: by itself, not by the limit."""

    thought: str
    text: str
    tokens: int
    ended: bool


def think(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    *,
    waits: int = 0,
    words: Words = Words(),
) -> list[Thought]:
    """A thought of `sampling.max_tokens` at most for each prompt.

    Where one ends sooner, by `</think>` or with the turn, `words.wait` is put in the end's place, `waits` times at
    most. What is thought within a smaller budget is the beginning of it, so one thought serves all budgets.
    ValueError for a tokenizer in which `</think>` is no token.

    Of several processes each has prompts of its own, or none, at the same time; and so it is with `conclude`.
    """
    stop, wait = engine.tokenizer.end_think_id, engine.tokenizer.encode(words.wait, allow_special=True)
    opened = [_opened(engine, prompt, words) for prompt in prompts]
    ids: list[list[int]] = [[] for _ in prompts]
    ended, left = [False] * len(prompts), list(range(len(prompts)))
    for turn in range(waits + 1):
        each = [
            dataclasses.replace(
                sampling[row],
                max_tokens=sampling[row].max_tokens - len(ids[row]),
                stop_token_ids=(*sampling[row].stop_token_ids, stop),
                seed=_seed(sampling[row].seed, turn),
            )
            for row in left
        ]
        out = engine.generate_ids([[*opened[row], *ids[row]] for row in left], each).here()
        for place, row in enumerate(left):
            ended[row] = bool(out.stopped_B[place])
            ids[row] += np.asarray(out.tokens_BN[place, : int(out.lengths_B[place]) - ended[row]]).tolist()
        left = [row for row in left if ended[row] and len(ids[row]) + len(wait) < sampling[row].max_tokens]
        if turn == waits or not any_process(bool(left)):
            break
        for row in left:
            ids[row] += wait
    return [Thought(*found) for found in zip(opened, ids, ended, strict=True)]


def conclude(
    engine: Engine,
    thoughts: Sequence[Thought],
    budgets: Sequence[int],
    sampling: Sequence[SamplingParams],
    *,
    words: Words = Words(),
) -> list[Reply]:
    """The reply to each thought within its budget: cut there and ended with `words.end`, or as the model ended it."""
    end, stop = engine.tokenizer.encode(words.end, allow_special=True), engine.tokenizer.end_think_id
    if stop not in end:
        raise ValueError(f"words.end={words.end!r}: expected a text with </think> in it")
    prompts, parts = [], []
    for thought, budget in zip(thoughts, budgets, strict=True):
        ids, own = thought.within(budget)
        closing = [stop] if own else end
        prompts.append([*thought.prompt, *ids, *closing])
        behind = closing.index(stop) + 1
        parts.append(([*ids, *closing[:behind]], closing[behind:]))
    out = engine.generate_ids(prompts, sampling).here()
    replies = []
    for row, (thinking, first) in enumerate(parts):
        length, ended = int(out.lengths_B[row]), bool(out.stopped_B[row])
        ids = np.asarray(out.tokens_BN[row, : length - ended]).tolist()
        replies.append(Reply(THINK + engine.decode(thinking), engine.decode([*first, *ids]), length, ended))
    return replies


def _opened(engine: Engine, prompt: Sequence[int], words: Words) -> list[int]:
    if opens_thinking(engine.decode(prompt[-8:])):
        return [*prompt]
    return [*prompt, *engine.tokenizer.encode(words.begin, allow_special=True)]


def _seed(seed: int, part: int) -> int:
    """Of a part's draws, which would else repeat those of the part before it."""
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0] >> 1)

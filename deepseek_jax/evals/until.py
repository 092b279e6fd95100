"""Answers up to a text that ends them, which may run across tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.data.template import opens_thinking
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams

_FIRST = 64  # tokens until the texts are looked for; then twice as many, and so on


@dataclasses.dataclass
class _Answer:
    prompt: list[int]
    sampling: SamplingParams
    until: Sequence[str]
    thinks: bool
    ids: list[int] = dataclasses.field(default_factory=list)
    text: str | None = None  # once it has ended


def answers_until(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    until: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> list[str]:
    """What is said to each prompt before the first of its `until`, a stop token or its limit.

    Thinking is left out, and not searched: what a prompt's end or the answer opens with `<think>` ends with `</think>`,
    and is all there is where it never does. Between searches a batch goes on from where it was, so that an answer which
    ends early costs little; greedy answers are the same as in one go.
    """
    answers = [
        _Answer([*ids], params, texts, opens_thinking(engine.decode(ids[-8:])))
        for ids, params, texts in zip(prompts, sampling, until, strict=True)
    ]
    order = sorted(answers, key=lambda answer: -len(answer.prompt))
    for start in range(0, len(order), batch_size):
        left, room = order[start : start + batch_size], _FIRST
        while left:
            _go_on(engine, left, room)
            left, room = [answer for answer in left if answer.text is None], 2 * room
    return [answer.text or "" for answer in answers]


def _go_on(engine: Engine, answers: Sequence[_Answer], room: int) -> None:
    sampling = []
    for answer in answers:
        # A seed of its own for each part, or it would draw what the part before it drew.
        seed = int(np.random.SeedSequence((answer.sampling.seed, len(answer.ids))).generate_state(1)[0] >> 1)
        most = min(room, answer.sampling.max_tokens - len(answer.ids))
        sampling.append(dataclasses.replace(answer.sampling, max_tokens=most, seed=seed))
    out = jax.device_get(engine.generate_ids([[*answer.prompt, *answer.ids] for answer in answers], sampling))
    for row, answer in enumerate(answers):
        stopped = bool(out.stopped_B[row])
        answer.ids += np.asarray(out.tokens_BN[row, : int(out.lengths_B[row]) - stopped]).tolist()
        said = engine.tokenizer.decode(answer.ids)
        begins = said.rfind(END_THINK) + len(END_THINK) if END_THINK in said else 0
        thinking = not begins and (answer.thinks or said.lstrip().startswith(THINK))
        ends = [] if thinking else [at for text in answer.until if (at := said.find(text, begins)) >= 0]
        if ends or stopped or len(answer.ids) >= answer.sampling.max_tokens:
            reply = said[begins : min(ends, default=None)]
            answer.text = reply.lstrip() if begins else reply

"""How much an answer thinks: counted, and ended where a request says so."""

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.asking import Asker, Event
from deepseek_jax.serve.prompts import CLOSING, thinks

_EFFORTS = {"none": 0, "minimal": 0, "low": 1024, "medium": 8192}  # tokens of thinking
GRAMMARS = ("json_schema", "regex")  # fields of a sampling that bind every token
BEHIND = "\n\n"  # `</think>`
_OPENS_WITHIN = 4  # tokens: white space may stand before `<think>`


def budget_of(budget: int | None, effort: str | None) -> int | None:
    """Tokens of thinking at most: what is said, or what an effort of OpenAI's stands for; None: as many as it likes."""
    return _EFFORTS.get(effort or "") if budget is None else budget


class Thoughts:
    """Counts the tokens between `<think>`, which the prompt may have ``opened``, and `</think>`; none where these are
    no tokens."""

    def __init__(self, tokenizer: Tokenizer, *, opened: bool):
        known = thinks(tokenizer)
        self._begin, self._end = (tokenizer.think_id, tokenizer.end_think_id) if known else (-1, -1)
        self.open, self.count, self._seen = opened and known, 0, 0

    def push(self, token_id: int) -> bool:
        """Whether this is a token of the thinking."""
        self._seen += 1
        if token_id == self._end:
            self.open = False
        elif token_id == self._begin and self._seen <= _OPENS_WITHIN:
            self.open = True
        elif self.open:
            self.count += 1
            return True
        return False


async def in_stages(
    asker: Asker,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: dict[str, Any],
    draw: int,
    *,
    opened: bool,
    budget: int | None,
) -> AsyncGenerator[Event]:
    """The events of an answer whose thinking has at most ``budget`` tokens and, where the prompt has ``opened`` it,
    is bound to no grammar: at its end the answer is cancelled, and gone on with behind its thoughts and `</think>`,
    which the cache of prefixes makes cheap. All of them count as its tokens, and what it draws behind them is drawn by
    the noise of its place there: no noise is used twice."""
    thoughts, made, ended = Thoughts(tokenizer, opened=opened), [], False
    freed = opened and any(name in sampling for name in GRAMMARS)
    first = {name: value for name, value in sampling.items() if not (freed and name in GRAMMARS)}
    if freed:  # a grammar that is none is refused now, not behind all that thinking
        first["behind"] = {name: value for name, value in sampling.items() if name in GRAMMARS}
    async with aclosing(asker.submit(ids, first, draw)) as events:
        async for event in events:
            for place, token_id in enumerate(event.ids):
                thoughts.push(token_id)
                made.append(token_id)
                last = event.finish_reason and place + 1 == len(event.ids)
                spent = budget is not None and thoughts.open and thoughts.count >= budget
                if ended := not last and (spent or (freed and not thoughts.open)):
                    event = _cut(event, place + 1)
                    break
            yield event
            if ended:
                break
    if not ended:
        return
    closing = tokenizer.encode(CLOSING if thoughts.open else BEHIND, allow_special=True)
    closing = closing[: sampling["max_tokens"] - len(made)]
    begun = [*made, *closing]
    left = sampling["max_tokens"] - len(begun)
    yield Event(closing, [0.0] * len(closing), [[] for _ in closing], "" if left else "length")
    if left:
        async with aclosing(asker.submit([*ids, *begun], {**sampling, "begun": len(begun)}, draw)) as events:
            async for event in events:
                if event.ids:
                    yield dataclasses.replace(event, cached=0)


def _cut(event: Event, length: int) -> Event:
    lists = {name: getattr(event, name)[:length] for name in ("ids", "logprobs", "alternatives")}
    return dataclasses.replace(event, **lists, finish_reason="")

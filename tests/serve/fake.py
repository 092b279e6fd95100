"""An engine that says what it is told to, and the app around it."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from small import tokenizer

from deepseek_jax.serve.app import make_app
from deepseek_jax.serve.asking import Event, RefusedError, Served, State
from deepseek_jax.serve.config import ServeConfig

SERVED = Served("fake", context=4096, vocab_size=300, slots=8)


class FakeAsker:
    """Answers each prompt with the tokens of ``answer`` and the end of sentence, ``at_once`` together, ``seconds``
    apart."""

    def __init__(self, answer: str = "12+34=46, é", at_once: int = 1, seconds: float = 0.0, served: Served = SERVED):
        self.tokenizer = tokenizer()
        self.answer = [*self.tokenizer.encode(answer, allow_special=True), self.tokenizer.eos_id]
        self.at_once, self.seconds, self.served = at_once, seconds, served
        self.state: State = "ready"
        self.asked: list[tuple[list[int], dict[str, Any], int]] = []
        self.open = self.cancelled = 0
        self.refuses = ""

    async def submit(self, ids: list[int], sampling: dict[str, Any], draw: int) -> AsyncGenerator[Event]:
        self.asked.append((ids, sampling, draw))
        if self.refuses:
            raise RefusedError(self.refuses)
        self.open += 1
        left, stops = self.answer[: sampling["max_tokens"] - sampling.get("begun", 0)], True
        try:
            yield Event([])
            while left:
                await asyncio.sleep(self.seconds)
                now, left = left[: self.at_once], left[self.at_once :]
                reason = "" if left else "stop" if now[-1] == self.answer[-1] else "length"
                likely = [[(i, -0.5), (5, -2.0)][: sampling["alternatives"]] for i in now]
                yield Event(now, [-0.5] * len(now), likely, reason, min(len(ids), 4))
            stops = False
        finally:
            self.open -= 1
            self.cancelled += stops

    async def metrics(self) -> dict[str, float]:
        return {"waiting": 0.0, "running": float(self.open), "tokens": 7.0}


def fake_app(asker: FakeAsker | None = None, config: ServeConfig = ServeConfig()) -> FastAPI:
    asker = asker or FakeAsker()
    return make_app(asker, asker.tokenizer, config)

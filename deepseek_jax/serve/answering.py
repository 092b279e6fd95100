"""From ids to text: the answers to a request, in pieces, as they are made."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from deepseek_jax.data.streaming import EndingText, TextStream
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.asking import Asker
from deepseek_jax.serve.prompts import Prompt
from deepseek_jax.serve.thinking import Thoughts, in_stages


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request comes down to. prompts: of each, ``n`` answers; number i of all has draw i. sampling: fields of
    ``SamplingParams``. stops: strings that end an answer. alternatives: beside each token; None: without
    log-probabilities. usage: a stream of chunks tells the tokens at its end. echo: each answer begins with its prompt.
    prompt: of a chat, what its one prompt is. thinking_budget: tokens of thinking at most."""

    prompts: list[list[int]]
    sampling: dict[str, Any]
    n: int = 1
    stops: tuple[str, ...] = ()
    alternatives: int | None = None
    usage: bool = False
    echo: bool = False
    prompt: Prompt | None = None
    thinking_budget: int | None = None

    @property
    def count(self) -> int:
        return len(self.prompts) * self.n

    @property
    def grammar(self) -> str | None:
        """The field of a body that has bound the answers."""
        if self.prompt is not None and self.prompt.schema:
            return "tools"
        fields = {"json_schema": "response_format", "regex": "structured_outputs"}
        return next((field for name, field in fields.items() if name in self.sampling), None)

    @property
    def scored(self) -> bool:
        """Whether the prompts' tokens have log-probabilities, too."""
        return "prompt_logprobs" in self.sampling


@dataclasses.dataclass(frozen=True)
class Token:
    """offset: where its text begins in the answer's, or the prompt's. logprob: None for what nothing stands before."""

    id: int
    logprob: float | None
    alternatives: Sequence[tuple[int, float]]
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has come of answer ``index``; the first of each has nothing in it. count: tokens made; thought: of a chat,
    those of them that are thinking. tokens: where log-probabilities are asked for, those whose text this is.
    finish_reason: as OpenAI has it, "" while it goes on. prompt: its tokens, where they are scored; once."""

    index: int
    text: str = ""
    count: int = 0
    tokens: tuple[Token, ...] = ()
    finish_reason: str = ""
    cached: int = 0
    thought: int = 0
    prompt: tuple[Token, ...] = ()


async def answers(asker: Asker, tokenizer: Tokenizer, asked: Asked) -> AsyncGenerator[Piece]:
    """The pieces of all, in whatever order they come. Who closes it early cancels what goes on."""
    each = [_answer(asker, tokenizer, asked, index) for index in range(asked.count)]
    if len(each) == 1:
        async with aclosing(each[0]) as pieces:
            async for piece in pieces:
                yield piece
        return
    came: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pour(pieces: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    came.put_nowait(piece)
            came.put_nowait(None)
        except Exception as error:
            came.put_nowait(error)

    tasks = [asyncio.create_task(pour(pieces)) for pieces in each]
    try:
        left = len(tasks)
        while left:
            piece = await came.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece is None
            if piece is not None:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(asker: Asker, tokenizer: Tokenizer, asked: Asked, index: int) -> AsyncGenerator[Piece]:
    text = EndingText(tokenizer, asked.stops)
    if not (asked.sampling["max_tokens"] or asked.scored):  # the prompt alone, which is known
        yield Piece(index, finish_reason="length")
        return
    given = count = 0  # characters given out, tokens made since the last piece
    held: list[Token] = []
    opened = asked.prompt is not None and asked.prompt.opened and not asked.prompt.begun
    thoughts, thought = Thoughts(tokenizer, opened=opened), 0
    question = asked.prompts[index // asked.n], asked.sampling, index
    if asked.thinking_budget is None and not (opened and asked.grammar):
        events = asker.submit(*question)
    else:
        events = in_stages(asker, tokenizer, *question, opened=opened, budget=asked.thinking_budget)
    async with aclosing(events):
        async for event in events:
            spoken = event.ids[:-1] if event.finish_reason == "stop" else event.ids
            each = asked.alternatives is not None
            certain, offsets, found = text.push(spoken, ended=bool(event.finish_reason), each=each)
            if found:  # what else has come is no part of the answer
                spoken = spoken[: len(offsets)]
            if asked.prompt is not None:
                thought += sum(map(thoughts.push, spoken))
            if each:
                for i, offset in enumerate(offsets):
                    likely = event.alternatives[i] if asked.alternatives else ()
                    held.append(Token(spoken[i], event.logprobs[i], likely, offset))
            count += len(offsets) if found else len(event.ids)
            given += len(certain)
            reason = "stop" if found else event.finish_reason
            prompt = ()
            if event.prompt is not None:
                prompt = await asyncio.to_thread(_of_prompt, tokenizer, question[0], *event.prompt)
            if asked.scored and len(spoken) < len(event.ids) and not found:  # else the prompt's end would not be told
                likely = event.alternatives[-1] if asked.alternatives else ()
                held.append(Token(event.ids[-1], event.logprobs[-1], likely, given))
            if certain or reason or prompt or not event.ids:
                tokens = tuple(token for token in held if token.offset < given or (reason and not found))
                held = held[len(tokens) :]
                yield Piece(index, certain, count, tokens, reason, event.cached, thought, prompt)
                count = thought = 0
            if found:
                return


def _of_prompt(
    tokenizer: Tokenizer,
    ids: list[int],
    logprobs: Sequence[float],
    alternatives: Sequence[Sequence[tuple[int, float]]],
) -> tuple[Token, ...]:
    """offsets: in the text as it is echoed, without special tokens."""
    text, offset, tokens = TextStream(tokenizer, skip_special_tokens=True), 0, list[Token]()
    scores = [(None, ()), *zip(logprobs, alternatives or [()] * len(logprobs), strict=True)]
    for token_id, (logprob, likely) in zip(ids, scores, strict=True):
        tokens.append(Token(token_id, logprob, likely, offset))
        offset += len(text.push(token_id))
    return tuple(tokens)

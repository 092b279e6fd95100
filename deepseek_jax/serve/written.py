"""Answers as OpenAI writes them: whole, or in chunks."""

import abc
import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.answering import Asked, Piece, Token
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.parsing import Parser, delta, message
from deepseek_jax.serve.prompts import Prompt


def packed(content: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event, which may have a name."""
    named = f"event: {name}\n" if name else ""
    return f"{named}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Tally:
    """Tokens of a request so far."""

    def __init__(self, asked: Asked):
        self.prompt, self.completion, self.thought = sum(map(len, asked.prompts)), 0, 0
        self._cached, self._n = [0] * len(asked.prompts), asked.n

    def add(self, piece: Piece) -> None:
        self.completion += piece.count
        self.thought += piece.thought
        at = piece.index // self._n
        self._cached[at] = max(self._cached[at], piece.cached)

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
            "completion_tokens_details": {"reasoning_tokens": self.thought},
        }


class Choices(abc.ABC):
    """A ``Form`` of choices, one for each answer, and of chunks with some of them while they are made."""

    name, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked):
        self.tokenizer, self.asked, self.tally = tokenizer, asked, Tally(asked)
        self._head = {"id": f"{self.name}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    @abc.abstractmethod
    def add(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of chunks that a piece brings, kept for ``whole`` too."""

    @abc.abstractmethod
    def choices(self) -> list[dict[str, Any]]:
        """Of all that was added, one for each answer."""

    def whole(self) -> dict[str, Any]:
        told = {"choices": self.choices(), "usage": self.tally.usage()}
        return {**self._head, "object": self.whole_object, **told}

    def begin(self) -> bytes:
        return b""

    def told(self, piece: Piece) -> bytes:
        more = {"usage": None} if self.asked.usage else {}
        return b"".join(self._chunk([choice], more) for choice in self.add(piece))

    def end(self) -> bytes:
        last = self._chunk([], {"usage": self.tally.usage()}) if self.asked.usage else b""
        return last + b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        return packed(error.body)

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return packed({**self._head, "object": self.chunk_object, "choices": choices, **more})


class CompletionForm(Choices):
    name, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked, echo: bool):
        super().__init__(model, tokenizer, asked)
        echoed = [tokenizer.decode(ids) if echo else "" for ids in asked.prompts]
        self._echoed = [echoed[index // asked.n] for index in range(asked.count)]
        self._parts: list[list[dict[str, Any]]] = [[] for _ in range(asked.count)]

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        self.tally.add(piece)
        parts = self._parts[piece.index]
        text = piece.text if parts else self._echoed[piece.index] + piece.text
        logprobs = None
        if self.asked.alternatives is not None:
            logprobs = self._logprobs(piece.tokens, len(self._echoed[piece.index]))
        told = {"text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason or None}
        parts.append({"index": piece.index, **told})
        return parts[-1:] if text or piece.tokens or piece.finish_reason else []

    def choices(self) -> list[dict[str, Any]]:
        return [self._joined(parts) for parts in self._parts]

    def _joined(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        logprobs = None
        if self.asked.alternatives is not None:
            told = [part["logprobs"] for part in parts]
            logprobs = {name: [one for each in told for one in each[name]] for name in told[0]}
        return {**parts[-1], "text": "".join(part["text"] for part in parts), "logprobs": logprobs}

    def _logprobs(self, tokens: Iterable[Token], before: int) -> dict[str, list[Any]]:
        tokens = [*tokens]
        text = lambda token_id: token_text(self.tokenizer, token_id)  # noqa: E731
        return {
            "tokens": [text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text(i): logprob for i, logprob in token.alternatives} for token in tokens],
            "text_offset": [before + token.offset for token in tokens],
        }


class ChatForm(Choices):
    name, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked):
        super().__init__(model, tokenizer, asked)
        prompt = asked.prompt or Prompt([])
        self._parsers = [Parser(opened=prompt.opened, tools=prompt.tools) for _ in range(asked.count)]
        self._parts = [parser.push(prompt.begun) for parser in self._parsers]
        self._begun = [False] * asked.count
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(asked.count)]
        self._reasons = [""] * asked.count

    def add(self, piece: Piece) -> list[dict[str, Any]]:
        self.tally.add(piece)
        index, parser = piece.index, self._parsers[piece.index]
        parts = [*parser.push(piece.text), *(parser.finish() if piece.finish_reason else ())]
        deltas = [delta(part) for part in parts]
        if not self._begun[index]:
            deltas = [{"role": "assistant", "content": ""}, *map(delta, self._parts[index]), *deltas]
            self._begun[index] = True
        self._parts[index] += parts
        self._reasons[index] = "tool_calls" if piece.finish_reason == "stop" and parser.calls else piece.finish_reason
        logprobs = None
        if self.asked.alternatives is not None:
            logprobs = {"content": [chat_logprob(self.tokenizer, token) for token in piece.tokens]}
            self._logprobs[index] += logprobs["content"]
        if piece.finish_reason or (piece.tokens and not deltas):
            deltas.append({})
        told = [{"index": index, "delta": one, "logprobs": None, "finish_reason": None} for one in deltas]
        if told:
            told[0]["logprobs"], told[-1]["finish_reason"] = logprobs, self._reasons[index] or None
        return told

    def choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": {**message(parts), "refusal": None},
                "logprobs": None if self.asked.alternatives is None else {"content": self._logprobs[index]},
                "finish_reason": self._reasons[index] or None,
            }
            for index, parts in enumerate(self._parts)
        ]


def chat_logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    told = _token(tokenizer, token.id, token.logprob)
    return told | {"top_logprobs": [_token(tokenizer, *other) for other in token.alternatives]}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token_id)
    return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Of one token by itself; part of a character is U+FFFD."""
    return tokenizer.decode([token_id], skip_special_tokens=False)

"""What DeepSeek's models write, told apart while it comes: thinking, tool calls and the answer's own text.

    <think>…</think>text<｜tool▁calls▁begin｜>CALL…<｜tool▁calls▁end｜>

where a CALL is, in V3's and R1's format and in V3.1's,

    <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME⏎```json⏎{…}⏎```<｜tool▁call▁end｜>
    <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>
"""

import dataclasses
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from deepseek_jax.data.special_tokens import END_THINK, THINK, TOOL_TOKENS

CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, *_, SEPARATOR = TOOL_TOKENS
_NAME = r"([\w.-]{1,64})"
# Every run in a head is bounded, so that whether a text opens a call is known within HEAD characters.
_FENCED = re.compile(rf"\s{{0,8}}function{SEPARATOR}\s{{0,8}}{_NAME}[ \t\r]{{0,8}}\n```(?:json)?[ \t\r]{{0,8}}\n")
_PLAIN = re.compile(rf"\s{{0,8}}{_NAME}{SEPARATOR}(?=\s{{0,8}}\{{)")
HEAD = 256


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer. text: of a "call" the function's name; the "arguments" that follow are its JSON.
    call: which of the answer's calls it is of, from 0."""

    kind: Literal["thinking", "content", "call", "arguments"]
    text: str
    call: int = 0


class Parser:
    """Pieces out of the text of an answer, as it comes.

    opened: the prompt has opened `<think>` already. tools: calls are looked for; otherwise they are content.

    The texts of each kind, joined, are the same wherever the answer is cut into what is pushed. Thinking, arguments and
    the content behind thinking lose the white space beside their marks. Thinking that is never closed is all thinking.
    What does not open a call as above is content, with its marks; arguments are handed on as they come, JSON or not,
    since clients read them while the model still writes.
    """

    def __init__(self, *, opened: bool = False, tools: bool = False) -> None:
        self._opened, self._tools = opened, tools
        self._held = self._raw = ""  # text that is not told apart yet, and marks that may have to be given as content
        self._fresh = self._fenced = self._final = False  # fresh: white space that comes now is left out
        self._calls, self._state = 0, self._start

    @property
    def thinking(self) -> bool:
        """Whether what comes next may be thinking."""
        return self._state == self._thinking or (self._opened and self._state == self._start)

    @property
    def calls(self) -> int:
        """Calls that have been opened so far."""
        return self._calls

    def push(self, text: str) -> list[Piece]:
        self._held += text
        return [*_joined(self._run())]

    def finish(self) -> list[Piece]:
        """What was held back, where no more comes."""
        self._final = True
        return [*_joined(self._run())]

    def _run(self) -> Iterator[Piece]:
        before = None
        while before != (before := (self._state, self._held, self._raw)):
            yield from self._state()

    # ---- the states: each takes what it is sure of from what is held ----

    def _start(self) -> Iterator[Piece]:
        begun = self._held.lstrip()
        if begun.startswith(THINK):
            self._held, self._fresh, self._state = begun.removeprefix(THINK), True, self._thinking
        elif self._final or not THINK.startswith(begun):
            self._fresh, self._state = self._opened, self._thinking if self._opened else self._content
        yield from ()

    def _thinking(self) -> Iterator[Piece]:
        thought, end, rest = self._held.partition(END_THINK)
        if not end and not self._final:
            thought = _sure(thought, END_THINK)
        yield from self._give("thinking", thought.rstrip())
        if end:
            self._held, self._fresh, self._state = rest, True, self._content

    def _content(self) -> Iterator[Piece]:
        said, begin, rest = self._held.partition(CALLS_BEGIN) if self._tools else (self._held, "", "")
        if self._tools and not begin and not self._final:
            said = _sure(said, CALLS_BEGIN)
        yield from self._give("content", said)
        if begin:
            self._held, self._raw, self._state = rest, begin, self._between

    def _between(self) -> Iterator[Piece]:
        """Before the first call or behind one."""
        begun = self._held.lstrip()
        if begun.startswith(CALL_BEGIN):
            white = self._held[: len(self._held) - len(begun)]
            self._raw += white + CALL_BEGIN
            self._held, self._state = begun.removeprefix(CALL_BEGIN), self._head
        elif begun.startswith(CALLS_END) and not self._raw:
            self._held, self._fresh, self._state = begun.removeprefix(CALLS_END), True, self._content
        elif self._final or not (CALL_BEGIN.startswith(begun) or CALLS_END.startswith(begun)):
            yield from self._no_call()

    def _head(self) -> Iterator[Piece]:
        if found := _FENCED.match(self._held) or _PLAIN.match(self._held):
            self._held = self._held[found.end() :]
            self._fenced, self._raw, self._fresh, self._state = found.re is _FENCED, "", True, self._arguments
            yield Piece("call", found.group(1), self._calls)
            self._calls += 1
        elif self._final or len(self._held) >= HEAD:
            yield from self._no_call()

    def _no_call(self) -> Iterator[Piece]:
        raw, self._raw, self._state = self._raw, "", self._content
        self._fresh = not raw
        yield from self._give("content", raw, held=False)

    def _arguments(self) -> Iterator[Piece]:
        ends = [at for mark in (CALL_END, CALLS_END) if (at := self._held.find(mark)) >= 0]
        ended, whole = self._final or bool(ends), self._held
        given = whole[: min(ends)] if ends else whole if ended else _sure(whole, CALL_END, CALLS_END)
        given = given.rstrip()
        if self._fenced:
            given = given.removesuffix("```").rstrip() if ended else given.rstrip("`").rstrip()
        empty = self._fresh and not given.strip()
        yield from self._give("arguments", given)
        if ended:
            if empty:
                yield Piece("arguments", "{}", self._calls - 1)
            self._held = whole[min(ends) :].removeprefix(CALL_END) if ends else ""
            self._state = self._between

    def _give(self, kind: Any, text: str, *, held: bool = True) -> Iterator[Piece]:
        """The text as a piece; it is the beginning of what is held."""
        if held:
            self._held = self._held[len(text) :]
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        if text:
            yield Piece(kind, text, self._calls - 1 if kind == "arguments" else 0)


def _sure(text: str, *marks: str) -> str:
    """The text without an end that may yet become one of the marks."""
    longest = min(len(text), max(map(len, marks)) - 1)
    held = (n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks))
    return text[: len(text) - next(held, 0)]


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Neighbours of one kind and call together."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and last.kind != "call" and (last.kind, last.call) == (piece.kind, piece.call):
            last = dataclasses.replace(last, text=last.text + piece.text)
        else:
            if last is not None:
                yield last
            last = piece
    if last is not None:
        yield last


# ---- as OpenAI's clients read it ----


def delta(piece: Piece) -> dict[str, Any]:
    """A piece as the `delta` of a streamed choice; thinking under both names that clients look for."""
    if piece.kind == "content":
        return {"content": piece.text}
    if piece.kind == "thinking":
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    if piece.kind == "arguments":
        return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.text}}]}
    return {"tool_calls": [{"index": piece.call, **_called(piece.text)}]}


def message(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Pieces together as an assistant's message; `content` is None where it only thought or called."""
    said, thought, calls = "", "", []
    for piece in pieces:
        if piece.kind == "content":
            said += piece.text
        elif piece.kind == "thinking":
            thought += piece.text
        elif piece.kind == "call":
            calls.append(_called(piece.text))
        else:
            calls[piece.call]["function"]["arguments"] += piece.text
    answer: dict[str, Any] = {"role": "assistant", "content": said or (None if thought or calls else "")}
    answer |= {"reasoning_content": thought, "reasoning": thought} if thought else {}
    return answer | ({"tool_calls": calls} if calls else {})


def _called(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}

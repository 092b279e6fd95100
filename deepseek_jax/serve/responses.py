"""``/v1/responses``: a chat's answer as OpenAI's items, whole or in named events."""

import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from deepseek_jax.serve.answering import Asked, Piece
from deepseek_jax.serve.asked import asked_by_chat
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.parsing import Parser
from deepseek_jax.serve.parsing import Piece as Part
from deepseek_jax.serve.prompts import Prompt
from deepseek_jax.serve.responding import Desk
from deepseek_jax.serve.responses_schema import NamedFunction, ResponsesBody, as_chat
from deepseek_jax.serve.written import Tally, packed

Event = dict[str, Any]
_ITEMS = {"thinking": "reasoning", "content": "message", "call": "function_call", "arguments": "function_call"}
_ECHOED = ("instructions", "max_output_tokens", "user", "metadata")
_CALLED = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}
_OF_AN_ERROR = ("code", "message", "param")
_MARKS = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def add_responses(app: FastAPI, desk: Desk, refused: dict[int | str, dict[str, Any]]) -> None:
    @app.post("/v1/responses", responses=refused)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answer a text, or a talk's items."""
        desk.check()
        served = desk.asker.served
        try:
            asked = await asked_by_chat(as_chat(body), desk.tokenizer, served, desk.config.limits)
            form = ResponseForm(body, served.name, asked)
            return await desk.respond(request, asked, form, stream=bool(body.stream))
        except ApiError as error:
            raise _renamed(error) from error


def _renamed(error: ApiError) -> ApiError:
    """A chat's error, by this route's names of fields."""
    param = _CALLED.get(error.param or "", error.param)
    rest = error.message.removeprefix(error.param or "")
    message = error.message if rest == error.message else f"{param}{rest}"
    return ApiError(error.status, message, param=param, code=error.code, wait=error.wait)


class _Item:
    """What is being said: thinking, a message, or a call (name) with its arguments as the text."""

    def __init__(self, kind: str, name: str = ""):
        self.kind, self.name, self.text = kind, name, ""
        self.id, self._call = f"{_MARKS[kind]}_{secrets.token_hex(12)}", f"call_{secrets.token_hex(12)}"

    def shown(self, status: str) -> dict[str, Any]:
        told: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        parts = [self.part()] if status != "in_progress" else []
        if self.kind == "function_call":
            return told | {"call_id": self._call, "name": self.name, "arguments": self.text}
        if self.kind == "reasoning":
            return told | {"summary": [], "content": parts}
        return told | {"role": "assistant", "content": parts}

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}


class ResponseForm:
    """A ``Form`` of one answer as items. ``add`` gives the events of a piece, ``whole`` is the object so far."""

    def __init__(self, body: ResponsesBody, model: str, asked: Asked):
        prompt = asked.prompt or Prompt([])
        self._parser = Parser(opened=prompt.opened, tools=prompt.tools)
        self._begun = self._parser.push(prompt.begun)
        self._tally, self._body, self._number = Tally(asked), body, 0
        self._drawn = {name: asked.sampling.get(name, 1.0) for name in ("temperature", "top_p")}
        self._items: list[_Item] = []
        self._done: list[dict[str, Any]] = []
        self._id, self._created, self._model = f"resp_{secrets.token_hex(12)}", int(time.time()), model
        self.status = "in_progress"

    def begin(self) -> bytes:
        return b"".join(self._so_far(name) for name in ("created", "in_progress"))

    def told(self, piece: Piece) -> bytes:
        return b"".join(map(self._packed, self.add(piece)))

    def end(self) -> bytes:
        return self._so_far(self.status)

    def failed(self, error: ApiError) -> bytes:
        error = _renamed(error)
        return self._packed({"type": "error", **{name: error.body["error"][name] for name in _OF_AN_ERROR}})

    def add(self, piece: Piece) -> list[Event]:
        self._tally.add(piece)
        parts, self._begun = [*self._begun, *self._parser.push(piece.text)], []
        if piece.finish_reason:
            parts += self._parser.finish()
        events = [event for part in parts for event in self._part(part)]
        if piece.finish_reason:
            self.status = "incomplete" if piece.finish_reason == "length" else "completed"
            events += self._close(self.status)
        return events

    def _so_far(self, name: str) -> bytes:
        return self._packed({"type": f"response.{name}", "response": self.whole()})

    def _packed(self, event: Event) -> bytes:
        self._number += 1
        return packed({**event, "sequence_number": self._number - 1}, event["type"])

    def whole(self) -> dict[str, Any]:
        body, usage, choice = self._body, self._tally.usage(), self._body.tool_choice
        asked = body.model_dump(include={*_ECHOED}) | self._drawn
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "model": self._model,
            "output": [*self._done],
            **asked,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "text": {"format": {"type": body.text.format.type if body.text and body.text.format else "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedFunction) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }

    def _part(self, part: Part) -> list[Event]:
        kind, events = _ITEMS[part.kind], []
        open_ = self._items[-1] if len(self._items) > len(self._done) else None
        if open_ is None or open_.kind != kind or part.kind == "call":
            events = self._close("completed") + self._open(_Item(kind, part.text if part.kind == "call" else ""))
        if part.kind == "call":
            return events
        item = self._items[-1]
        item.text += part.text
        more = {"logprobs": []} if kind == "message" else {}
        return [*events, self._event(f"{_named(kind)}.delta", {"delta": part.text} | more)]

    def _open(self, item: _Item) -> list[Event]:
        self._items.append(item)
        events = [
            {"type": "response.output_item.added", "output_index": len(self._done), "item": item.shown("in_progress")}
        ]
        return events + (
            [self._event("content_part.added", {"part": item.part()})] if item.kind != "function_call" else []
        )

    def _close(self, status: str) -> list[Event]:
        if len(self._items) == len(self._done):
            return []
        item = self._items[-1]
        if item.kind == "function_call":
            events = [self._event("function_call_arguments.done", {"arguments": item.text, "name": item.name})]
        else:
            more = {"logprobs": []} if item.kind == "message" else {}
            events = [
                self._event(f"{_named(item.kind)}.done", {"text": item.text} | more),
                self._event("content_part.done", {"part": item.part()}),
            ]
        shown = item.shown(status)
        events.append({"type": "response.output_item.done", "output_index": len(self._done), "item": shown})
        self._done.append(shown)
        return events

    def _event(self, name: str, more: Event) -> Event:
        """Of the item that is open."""
        item = self._items[-1]
        place = {} if item.kind == "function_call" else {"content_index": 0}
        return {"type": f"response.{name}", "item_id": item.id, "output_index": len(self._done), **place, **more}


def _named(kind: str) -> str:
    return {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}[kind]

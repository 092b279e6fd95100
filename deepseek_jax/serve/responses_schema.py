"""What ``/v1/responses`` takes, and the chat that it comes down to."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepseek_jax.serve.errors import ApiError, whole
from deepseek_jax.serve.schema import STRICT, WHOLE, Chat, FunctionName, JsonSchema

_LOOSE = ConfigDict(strict=True)  # what a client has kept of an answer may hold more
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class TextPart(BaseModel):
    model_config = _LOOSE
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]
    text: str


class Said(BaseModel):
    """A turn."""

    model_config = _LOOSE
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class FunctionCall(BaseModel):
    """A call that an earlier answer made."""

    model_config = _LOOSE
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(BaseModel):
    """What it brought."""

    model_config = _LOOSE
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]


class Reasoned(BaseModel):
    """The thinking of an earlier answer."""

    model_config = _LOOSE
    type: Literal["reasoning"]
    content: list[TextPart] | None = None
    summary: list[TextPart] | None = None


class FunctionTool(BaseModel):
    model_config = STRICT
    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(FunctionName):
    type: Literal["function"]


class Reasoning(BaseModel):
    """effort: as ``reasoning_effort`` of a chat. summary is taken, and thinking is given whole."""

    model_config = STRICT
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextConfig(BaseModel):
    model_config = STRICT
    format: TextFormat | None = None


class ResponsesBody(BaseModel):
    """``/v1/responses``. Nothing is stored: ``store`` may not be true, and the whole talk is given each time in the
    place of a ``previous_response_id``. user, metadata, safety_identifier and prompt_cache_key change nothing."""

    model_config = STRICT
    model: str = Field("", max_length=256)
    input: str | Annotated[list[Said | FunctionCall | FunctionOutput | Reasoned], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def as_chat(body: ResponsesBody) -> Chat:
    """ApiError for what needs a store."""
    for name in ("previous_response_id", "store"):
        if getattr(body, name):
            raise ApiError(400, f"{name}: nothing is stored here; give the whole talk as input", param=name)
    format_ = body.text.format if body.text else None
    given: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "response_format": _format(format_) if format_ else None,
        "tools": [{"function": tool.model_dump(exclude={"type"})} for tool in body.tools or ()] or None,
        "tool_choice": body.tool_choice,
    }
    if isinstance(body.tool_choice, NamedFunction):
        given["tool_choice"] = {"function": {"name": body.tool_choice.name}}
    for name in ("temperature", "top_p", "parallel_tool_calls", "thinking_budget"):
        given[name] = getattr(body, name)
    try:
        return Chat.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ApiError(400, whole(str(error.errors()[0]["msg"])), param="input") from error


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """What one answer consists of, thinking, text and calls, is one message of an assistant."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [Said(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in items:
        last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        if isinstance(item, Reasoned):
            thought = _text(item.content or item.summary or [])
            messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
        elif isinstance(item, FunctionCall):
            if last is None:
                messages.append(last := {"role": "assistant", "content": None})
            called = {"name": item.name, "arguments": item.arguments}
            last.setdefault("tool_calls", []).append({"id": item.call_id, "function": called})
        elif isinstance(item, FunctionOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        elif item.role == "assistant" and last is not None and last["content"] is None and "tool_calls" not in last:
            last["content"] = _text(item.content)
        else:
            messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _format(given: TextFormat) -> Mapping[str, Any]:
    schema = given.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": given.type} | ({"json_schema": schema} if given.type == "json_schema" else {})

"""Chats as people's files have them, in one form: messages of {"role", "content", ...}, and the tools they may call."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
# Other spellings: ShareGPT's, OpenAI's older one, Llama's.
_ALSO = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_ALSO |= dict.fromkeys(("function", "ipython", "observation", "function_response", "tool_response"), "tool")
_CALLING = ("function_call", "tool_call")  # roles, of an assistant whose content is a call's JSON
_LISTS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_PAIRS += (("query", "response"),)
REASONING = ("reasoning_content", "thinking", "reasoning")
_KEPT = ("name", "tool_call_id", "weight")

Message = dict[str, Any]
Sample = tuple[list[int], list[int]]  # ids, and their loss mask


@dataclasses.dataclass(frozen=True)
class Conversation:
    """messages: see `read_messages`. tools: their descriptions, None without any."""

    messages: list[Message]
    tools: list[Any] | None = None


def read_conversation(row: Any) -> Conversation:
    """A row as a conversation; what is null counts as absent, and other columns are passed over.

    * `messages`, `conversations` or `conversation`: a list of messages, see `read_messages`;
    * or a question and its answer: `prompt` with `completion` or `response`, `instruction` (and `input`, under it)
      with `output`, `question` with `answer`, `query` with `response`; texts, or lists of messages; in front of them
      the turns of `history`, a list of [question, answer];
    * `system`: a text that opens it, where no message does; `tools`: a list, or its JSON.

    ValueError says what is wrong, or what the row has in their place.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a {type(row).__name__}; each line must be an object")
    nulls = [str(name) for name, value in row.items() if value is None]
    row = {name: value for name, value in row.items() if value is not None}
    if (name := next((name for name in _LISTS if name in row), None)) is not None:
        messages = read_messages(row[name])
    elif (pair := next((pair for pair in _PAIRS if set(pair) <= set(row)), None)) is not None:
        ask, answer = _side(row, pair[0], "user"), _side(row, pair[1], "assistant")
        opening = 1 if ask[0]["role"] == "system" else 0
        messages = [*ask[:opening], *_history(row.get("history")), *ask[opening:], *answer]
    else:
        lists, pairs = ", ".join(_LISTS), ", ".join(f"{ask} with {answer}" for ask, answer in _PAIRS)
        null = f", and null in {', '.join(nulls)}" if nulls else ""
        raise ValueError(
            f"no field of {lists}, nor {pairs}; it has {', '.join(map(str, row)) or 'none'}{null}; "
            "--data.prompt and --data.answer name others"
        )
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        messages = [*read_messages([{"role": "system", "content": system}]), *messages]
    return Conversation(messages, _tools(row.get("tools")))


def _side(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    value = row[name]
    if isinstance(value, str):
        more = row.get("input") if name == "instruction" else None
        return read_messages([{"role": role, "content": f"{value}\n\n{more}" if more else value}])
    if not isinstance(value, Sequence):
        raise ValueError(f'"{name}" is of type {type(value).__name__}; it must be text or a list of messages')
    return read_messages(value)


def _history(value: Any) -> list[Message]:
    turns = value or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError(f'"history" is no list of [question, answer]: {value!r:.60}')
    roles = ("user", "assistant")
    return [
        _message({"role": role, "content": text}, f'"history" {index}: what the {role} says')
        for index, turn in enumerate(turns)
        for role, text in zip(roles, turn, strict=True)
    ]


def _parsed(value: Any, which: str) -> Any:
    """What stands in a text as JSON, None in an empty one; what is no text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"{which} is a text that is no JSON ({error.msg} at character {error.pos})") from error


def _tools(value: Any) -> list[Any] | None:
    value = _parsed(value, '"tools"')
    if not isinstance(value, list | None):
        raise ValueError(f'"tools" is of type {type(value).__name__}; it must be a list, or its JSON')
    return value or None


def read_messages(value: Any) -> list[Message]:
    """Messages in one form: "role" and "content", which is text, and of what else there is what templates read.

    * the role is one of ROLES, or ShareGPT's and other names of them, under `role` or `from`;
    * the content is a text, or a list of {"type": "text", "text": ...}, under `content` or `value`; only beside tool
      calls or reasoning may it be missing, and beside calls it is None then;
    * reasoning, under any of REASONING or as a part of type "thinking", is `reasoning_content`;
    * `tool_calls` is a list of {"type": "function", "function": {"name", "arguments"}}, with or without the frame, or
      the JSON of one; so is the content of a role `function_call` or `tool_call`, which is an assistant then;
    * `name`, `tool_call_id` and `weight` are kept, others left out: what is null, and what data sets note for
      themselves.

    ValueError names the message and what is wrong with it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
    return [_message(message, f"message {index}") for index, message in enumerate(value)]


def _message(given: Any, which: str) -> Message:
    if not isinstance(given, Mapping):
        raise ValueError(f'{which} is of type {type(given).__name__}; it must be {{"role": ..., "content": ...}}')
    given = {key: value for key, value in given.items() if value is not None}
    role, said = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if role in _CALLING:
        role, said, given = "assistant", None, given | {"tool_calls": said}
    role = _ALSO.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{which} has role {role!r}; allowed are {', '.join(ROLES)}")
    message: Message = {"role": role} | {key: given[key] for key in _KEPT if key in given}
    calls = _parsed(given.get("tool_calls") or given.get("function_call"), f"what {which} calls") or []
    if calls:
        message["tool_calls"] = [_call(call, which) for call in (calls if isinstance(calls, list) else [calls])]
    content, thoughts = _text(said, which)
    thoughts = next((given[key] for key in REASONING if key in given), thoughts)
    if thoughts:
        if not isinstance(thoughts, str):
            raise ValueError(f"{which} has reasoning of type {type(thoughts).__name__}, not text")
        message["reasoning_content"] = thoughts
    if content is None and not calls:
        if not thoughts:
            raise ValueError(f"{which} has no content")
        content = ""
    return message | {"content": content}


def _text(content: Any, which: str) -> tuple[str | None, str | None]:
    """What stands in the content, and the thinking in it."""
    if content is None or isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        raise ValueError(f"{which} has content of type {type(content).__name__}, not text")
    said, thought = [], []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        text = part.get(kind) if isinstance(part, Mapping) else part
        if kind not in ("text", "thinking") or not isinstance(text, str):
            raise ValueError(f"{which} has a part of type {kind!r} that is no text: {part!r:.60}")
        (said if kind == "text" else thought).append(text)
    return "".join(said), "\n".join(thought) or None


def _call(call: Any, which: str) -> Message:
    function = (call.get("function") or call) if isinstance(call, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") or {} if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, str | Mapping):
        raise ValueError(f'{which} has a tool call that is no {{"name": ..., "arguments": ...}}: {call!r:.60}')
    found: Message = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return found | ({"id": call["id"]} if call.get("id") is not None else {})


def answers_of(messages: Sequence[Message]) -> list[int]:
    """The messages to learn from: those of assistants, but for a `weight` of 0 and for one that stands first, which
    answers nothing. ValueError where there is none."""
    found = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight") != 0]
    found = [index for index in found if index > 0]
    if not found:
        raise ValueError("no message of role 'assistant' answers another: there is nothing to learn")
    return found


def with_thinking(message: Message) -> str:
    """What an assistant says as DeepSeek's models write it, its reasoning between `<think>` and `</think>`."""
    content, thoughts = message["content"] or "", message.get("reasoning_content")
    if not thoughts or "</think>" in content:
        return content
    thoughts, content = thoughts.strip("\n"), content.lstrip("\n")
    return f"<think>\n{thoughts}\n</think>\n\n{content}"

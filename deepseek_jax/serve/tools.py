"""Functions that a client offers: told to models whose templates have no place for them, called where they must be."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.template import ChatTemplate
from deepseek_jax.serve.parsing import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR

# As DeepSeek's model cards describe tools to V3.1, whose templates, like R1's and V3's, write calls but no tools.
_INTRODUCTION = "## Tools\nYou have access to the following tools:\n"
_RULES = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{format}

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""


def writes_calls(template: ChatTemplate) -> bool:
    """Whether calls and what tools answer are written as DeepSeek's models read them."""
    return CALL_BEGIN in template.source and SEPARATOR in template.source


def described(template: ChatTemplate, tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools as a part of the system message, with the format that this model's template has for calls."""
    told = []
    for function in (tool["function"] for tool in tools):
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        about = function.get("description") or ""
        told.append(f"\n### {function['name']}\nDescription: {about}\n\nParameters: {parameters}\n")
    call = call_head(template, "tool_call_name") + "tool_call_arguments" + call_tail(template)
    rules = _RULES.format(format=f"{CALLS_BEGIN}{call}{{additional_tool_calls}}{CALLS_END}")
    return _INTRODUCTION + "".join(told) + rules


def call_head(template: ChatTemplate, name: str) -> str:
    """What stands in front of a call's arguments."""
    if _fenced(template):
        return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n"
    return f"{CALL_BEGIN}{name}{SEPARATOR}"


def call_tail(template: ChatTemplate) -> str:
    return ("\n```" if _fenced(template) else "") + CALL_END


def _fenced(template: ChatTemplate) -> bool:
    return "```json" in template.source


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> str:
    """The schema of a function's arguments, as JSON."""
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
    return json.dumps(function.get("parameters") or {"type": "object"})


def chosen(choice: Any, tools: Sequence[Mapping[str, Any]]) -> str | None:
    """The one function that must be called: of that name, or the only one where one is "required". None: it is for the
    model to say. ValueError: no such function, or more than one to choose from."""
    names = [tool["function"]["name"] for tool in tools]
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        if len(names) != 1:
            raise ValueError(f"tool_choice='required' with {len(names)} tools: name the one that is to be called")
        return names[0]
    name = choice["function"]["name"]
    if name not in names:
        raise ValueError(f"tool_choice={name!r}: the tools are {', '.join(map(repr, names)) or 'none'}")
    return name

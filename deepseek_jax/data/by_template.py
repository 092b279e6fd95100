"""Conversations by a model's own chat template, as ids: transformers' ``apply_chat_template``'s, and what is learnt."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.data.conversations import Message, Sample, answers_of, with_thinking
from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.data.template import ChatTemplate, opens_thinking
from deepseek_jax.data.tokenizer import Tokenizer

_Render = Callable[[Sequence[Message], bool], str]  # messages, and whether an answer is to follow


class _RewrittenError(ValueError):
    """A conversation does not begin with the prompt that an answer in it was given to."""


def render_prompt(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, more: Mapping[str, Any] = {}
) -> str:
    """The text up to where an assistant answers. more: variables for the template. ValueError for what the template
    refuses or leaves out."""
    render = _renderer(template, tools, more)
    messages = _with_calls(render, messages)
    _check_written(template, messages, tools, more, prompt=True)
    return render(messages, True)


def encode_by(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] | None
) -> list[Sample]:
    """Samples: each answer is learnt in the longest of the conversation's beginnings that writes it as it was given."""
    left = answers_of(messages)
    render = _renderer(template, tools)
    messages = _with_calls(render, messages[: left[-1] + 1])
    _check_written(template, messages, tools, prompt=False)
    samples = []
    while left:
        sample, learnt = _sample(render, tokenizer, messages[: left[-1] + 1], left)
        samples.append(sample)
        left = [index for index in left if index not in learnt]
    return samples[::-1]


def _renderer(template: ChatTemplate, tools: Sequence[Any] | None, more: Mapping[str, Any] = {}) -> _Render:
    return lambda messages, prompt: template.render(messages, tools=tools, add_generation_prompt=prompt, **more)


def _sample(
    render: _Render, tokenizer: Tokenizer, messages: Sequence[Message], answers: Sequence[int]
) -> tuple[Sample, list[int]]:
    """A conversation, and which of the answers are learnt in it: the last message, which keeps its thinking, and what
    stands in it as it was given."""
    text, last = render(messages, False), len(messages) - 1
    text = _keep_thinking(text, *_prompt_before(render, messages, last, text), messages[-1])
    turns = {}  # by answer, where it begins in the text, and where its turn ends
    for index in answers:
        try:
            end = text if index == last else render(messages[: index + 1], False)
            begin, _ = _prompt_before(render, messages, index, text)
        except _RewrittenError:
            assert index != last
            continue
        forgotten = END_THINK in with_thinking(messages[index]) and END_THINK not in end[len(begin) :]
        if index == last or (text.startswith(end) and len(begin) <= len(end) and not forgotten):
            turns[index] = len(begin), len(end)
    ids = tokenizer.encode(text, allow_special=True)
    mask = [0] * len(ids)
    for turn in turns.values():
        begin, end = (_count(tokenizer, ids, text[:edge]) for edge in turn)
        stops = [at for at in range(begin, end) if ids[at] in tokenizer.stop_ids]
        if not stops:
            warnings.warn("the chat template ends an answer with no stop token: none is learnt", stacklevel=4)
        end = stops[-1] + 1 if stops else end
        mask[begin:end] = [1] * (end - begin)
    return (ids, mask), [*turns]


def _prompt_before(render: _Render, messages: Sequence[Message], index: int, text: str) -> tuple[str, str]:
    """What stands before message ``index`` in ``text``: the prompt that it answers, and what that prompt ends with
    beyond: the `<think>` of a template that opens it, where the text has none."""
    prompt = asked = render(messages[:index], True)
    if not text.startswith(prompt) and opens_thinking(prompt):
        prompt = prompt.rstrip().removesuffix(THINK)
    if not text.startswith(prompt):
        raise _RewrittenError(f"the chat template's prompt for message {index} is not how it writes the conversation")
    return prompt, asked[len(prompt) :]


def _count(tokenizer: Tokenizer, ids: list[int], part: str) -> int:
    """How many of the ids a part at the beginning of their text is."""
    found = tokenizer.encode(part, allow_special=True)
    if ids[: len(found)] != found:
        raise ValueError(f"a token of this tokenizer runs across the edge of a turn, after {part[-20:]!r}")
    return len(found)


def _keep_thinking(text: str, before: str, opener: str, message: Message) -> str:
    """The conversation with the thinking of its last message, if the template has dropped that."""
    said, content = text[len(before) :], with_thinking(message)
    if END_THINK not in content or END_THINK in said:
        return text
    thinking, _, answer = content.rpartition(END_THINK)
    if opener:
        thinking = opener + thinking.lstrip().removeprefix(THINK).lstrip("\n")
    white, found, end = said.partition(answer.strip()) if answer.strip() else ("", True, said)
    if white.strip() or not found:
        raise ValueError("the chat template drops the last message's thinking, and its answer is not found to keep it")
    return before + thinking + END_THINK + answer + end


# ---- what a template leaves out ----


def _with_calls(render: _Render, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with the arguments of tool calls in the form that the template writes as JSON: some templates take
    a text as it is and others make one of an object, and each writes the other form escaped or as Python has it."""
    if not any("tool_calls" in message for message in messages):
        return messages
    refused: ValueError | None = None
    said = "\n".join(message["content"] or "" for message in messages)
    for form in (lambda arguments: arguments, _as_object, _as_text):
        changed = [_change_calls(message, form) for message in messages]
        functions = [call["function"] for message in changed for call in message.get("tool_calls", ())]
        try:
            text = render(changed, False)
        except ValueError as error:
            refused = refused or error
        else:
            wrong = (form for function in functions for form in _distorted(function["arguments"]))
            distorted = any(text.count(form) > said.count(form) for form in wrong)
            if not distorted and all(function["name"] in text for function in functions):
                return changed
    raise refused or ValueError("the chat template writes no tool calls, or not their arguments as JSON")


def _change_calls(message: Message, form: Callable[[Any], Any]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        calls.append({**call, "function": {**function, "arguments": form(function["arguments"])}})
    return {**message, "tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _distorted(arguments: Any) -> set[str]:
    """Ways to write arguments that no model's format has."""
    plain = _as_text(arguments)
    return {json.dumps(plain, ensure_ascii=False)[1:-1], repr(_as_object(arguments))} - {plain, ""}


def _check_written(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    more: Mapping[str, Any] = {},
    *,
    prompt: bool,
) -> None:
    """ValueError for a message, of another than an assistant, without which the text would be the same; a warning for
    such tools."""
    render = _renderer(template, tools, more)
    text = render(messages, prompt)
    if tools and _renderer(template, None, more)(messages, prompt) == text:
        warnings.warn("the chat template does not write the tools that conversations bring", stacklevel=4)
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant" or not content or content.strip() in text:
            continue
        rest = [*messages[:index], *messages[index + 1 :]]
        try:
            same = bool(rest) and render(rest, prompt) == text
        except ValueError:  # it cannot be done without, so it counts
            same = False
        if same:
            raise ValueError(f"the chat template leaves out message {index}, of role {message['role']!r}")

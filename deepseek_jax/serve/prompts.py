"""A conversation of a client's as the ids that a model answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.by_template import render_prompt
from deepseek_jax.data.chat import encode_prompt, own_template
from deepseek_jax.data.conversations import Message, read_messages
from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.data.template import ChatTemplate, opens_thinking
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.untrusted import Hiding
from deepseek_jax.serve.parsing import CALLS_BEGIN
from deepseek_jax.serve.tools import call_head, chosen, described, parameters_of, writes_calls

NO_THOUGHT = f"{THINK}\n\n{END_THINK}\n\n"
CLOSING = f"\n{END_THINK}\n\n"
_SWITCHES = ("thinking", "enable_thinking")  # what templates call it: V3.1's, Qwen3's
_OWN = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "self",
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """ids: what is answered. opened: they have opened `<think>`. begun: text that they have begun the answer with, for
    the parser. tools: calls may come. schema: of the arguments of the call that they have begun, as JSON."""

    ids: list[int]
    opened: bool = False
    begun: str = ""
    tools: bool = False
    schema: str = ""


def write_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    choice: Any = None,
    think: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """By the model's own template or DeepSeek's format, as ``data.chat.encode_prompt`` does; but no special token that
    stands in a message, a tool or a variable is one, save `<think>` and `</think>` in what assistants said.

    Args:
      tools: OpenAI's. A template that writes DeepSeek's calls and no tools has them told in the system message.
      choice: OpenAI's ``tool_choice``. A function that must be called is begun behind the prompt.
      think: False: the answer begins behind thinking that is empty; True, False: what a template's switch is set to.
      variables: more for the template.

    Raises ValueError for what the template refuses or has no place for.
    """
    conversation = read_messages(messages)
    template = own_template(tokenizer)
    name = chosen(choice, tools)
    tools = [] if choice == "none" else [*tools]
    if template is None:
        if tools or variables:
            given = "tools" if tools else "chat_template_kwargs"
            raise ValueError(f"{given}: this model is asked in DeepSeek's plain format, which has no place for them")
        prompt = Prompt(encode_prompt(tokenizer, conversation))
        return _begun(tokenizer, prompt, NO_THOUGHT if think is False and thinks(tokenizer) else "")
    if (role := conversation[-1]["role"]) not in ("user", "tool"):
        raise ValueError(f"the last message has role {role!r}; to be answered, it must be 'user' or 'tool'")
    hiding = Hiding(tokenizer)
    conversation = [hiding.hide_message(_known(message, template)) for message in conversation]
    hidden: list[Mapping[str, Any]] | None = hiding.hide(tools) or None
    if hidden and not template.mentions("tools", tools=True):
        conversation, hidden = _told(template, conversation, hidden), None
    switches = {} if think is None else {name: think for name in _SWITCHES if template.mentions(name)}
    text = render_prompt(template, conversation, hidden, {**switches, **hiding.hide(_allowed(variables or {}))})
    prompt = Prompt(hiding.encode(text), opens_thinking(text), tools=bool(tools))
    begun = ""
    if think is False or name is not None:
        begun = CLOSING if prompt.opened else NO_THOUGHT if name is None and not switches and thinks(tokenizer) else ""
    if name is not None:
        if not writes_calls(template):
            raise ValueError("tool_choice: a call can be begun in DeepSeek's format alone, which this template lacks")
        begun += CALLS_BEGIN + call_head(template, name)
        prompt = dataclasses.replace(prompt, schema=parameters_of(tools, name))
    return _begun(tokenizer, prompt, begun)


def _begun(tokenizer: Tokenizer, prompt: Prompt, text: str) -> Prompt:
    """With the answer begun by a text of ours."""
    ids = tokenizer.encode(text, allow_special=True) if text else []
    return dataclasses.replace(prompt, ids=prompt.ids + ids, begun=text)


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether thinking begins and ends with tokens."""
    return {THINK, END_THINK} <= {*tokenizer.added_tokens}


def _known(message: Message, template: ChatTemplate) -> Message:
    """A developer's message as a system's, where the template does not know the newer name."""
    developer = message["role"] == "developer" and not template.mentions("developer")
    return {**message, "role": "system"} if developer else message


def _told(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    if not writes_calls(template):
        raise ValueError("tools: this model's chat template has no place for them")
    about = described(template, tools)
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": about}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{about}"}, *rest]


def _allowed(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in variables:
        if not name.isidentifier() or name.startswith("_") or name in _OWN:
            raise ValueError(f"chat_template_kwargs: {name[:100]!r} cannot be given")
    return variables

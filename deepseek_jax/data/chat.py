"""Messages to ids and a loss mask: by the model's own chat template, or else in DeepSeek's format,

    {bos}{system}<｜User｜>{user}<｜Assistant｜>{assistant}{eos}<｜User｜>...

which is written as ids, not as text, so no content can imitate its special tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.by_template import encode_by, render_prompt
from deepseek_jax.data.conversations import Message, Sample, answers_of, read_messages, with_thinking
from deepseek_jax.data.special_tokens import DEEPSEEK_TEMPLATE, END_THINK, THINK
from deepseek_jax.data.template import ChatTemplate, opens_thinking
from deepseek_jax.data.tokenizer import Tokenizer

_THINK_TAGS = re.compile(f"({re.escape(THINK)}|{re.escape(END_THINK)})")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> list[Sample]:
    """A conversation as samples to learn from: ids and loss mask of each. messages: as `read_messages` takes them.

    The mask is 1 on what assistants say and the token that ends each turn, 0 elsewhere and on messages whose `weight`
    is 0; what follows the last answer is left out. Later turns see no thinking of earlier answers, as in R1, yet each
    answer is learnt with its own: one that thinks is the last of a sample, whose others do not. `<think>` and
    `</think>` are special tokens in assistant content only.

    By a template of the model's own the ids are transformers' `apply_chat_template`'s, special tokens counting wherever
    they stand, but that the last turn keeps its thinking where the template drops it. A sample is again a beginning of
    the conversation up to an answer, and each answer is learnt in the longest that writes it as it was given. A
    `<think>` that the template writes into prompts is not learnt. ValueError where prompts are not how the template
    begins the answered conversation, where it leaves out a message or a tool call, or tokens run across a turn's edge;
    and for messages that are none.
    """
    messages = read_messages(messages)
    if (template := own_template(tokenizer)) is not None:
        return encode_by(template, tokenizer, messages, tools)
    _check_plain(messages, tools)
    left, samples = answers_of(messages), []
    while left:
        thinking = [index for index in left[:-1] if END_THINK in with_thinking(messages[index])]
        learnt = [index for index in left if index not in thinking]
        samples.append(_encode(tokenizer, messages[: left[-1] + 1], learnt, thinks=True))
        left = thinking
    return samples[::-1]


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> list[int]:
    """Ids of a conversation up to where an assistant answers its last message: what is sampled from."""
    messages = read_messages(messages)
    if (role := messages[-1]["role"]) not in ("user", "tool"):
        raise ValueError(f"the last message has role {role!r}; to be answered, it must be 'user'")
    if (template := own_template(tokenizer)) is not None:
        return tokenizer.encode(render_prompt(template, messages, tools), allow_special=True)
    _check_plain(messages, tools)
    ids, _ = _encode(tokenizer, messages, [], thinks=False)
    return [*ids, tokenizer.assistant_id]


def prompt_opens_thinking(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `encode_prompt` has written `<think>` for the model: its answer begins inside the thinking."""
    template = own_template(tokenizer)
    return template is not None and opens_thinking(template.render(read_messages(messages)))


def own_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template where that is not DeepSeek's format, which `_encode` writes safer."""
    template = tokenizer.template
    if template is None and not tokenizer.has_chat_tokens:
        raise ValueError("this model has no chat template and no <｜User｜>: give its folder a chat_template.jinja")
    return None if template is None or template.source == DEEPSEEK_TEMPLATE else template


# ---- in DeepSeek's format ----


def _check_plain(messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
    wrong = "the conversation has tools" if tools else ""
    for index, message in enumerate(messages):
        if message["role"] in ("tool", "developer"):
            wrong = wrong or f"message {index} has role {message['role']!r}"
        elif "tool_calls" in message:
            wrong = wrong or f"message {index} calls a tool"
    if wrong:
        raise ValueError(
            f"{wrong}, which this model's format (DeepSeek's, of system, user and assistant) has no place for: give "
            "its folder a chat_template.jinja that writes them"
        )


def _encode(tokenizer: Tokenizer, messages: Sequence[Message], learnt: Sequence[int], *, thinks: bool) -> Sample:
    """thinks: the last message keeps its thinking, if it is an assistant's."""
    # Wherever they stand, system messages open the conversation, as in R1's template.
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    ids = [tokenizer.bos_id, *tokenizer.encode(system)]
    mask = [0] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "user":
            turn = [tokenizer.user_id, *tokenizer.encode(message["content"])]
            ids += turn
            mask += [0] * len(turn)
        elif message["role"] == "assistant":
            content = with_thinking(message)
            if not thinks or index != len(messages) - 1:
                content = content.split(END_THINK)[-1]
            answer = [*_encode_assistant(tokenizer, content), tokenizer.eos_id]
            ids += [tokenizer.assistant_id, *answer]
            mask += [0] + [int(index in learnt)] * len(answer)
    return ids, mask


def _encode_assistant(tokenizer: Tokenizer, content: str) -> list[int]:
    ids: list[int] = []
    for piece in _THINK_TAGS.split(content):
        if piece in (THINK, END_THINK):
            ids.append(tokenizer.token_id(piece))
        else:
            ids += tokenizer.encode(piece)
    return ids


def split_thinking(text: str) -> tuple[str | None, str]:
    """Splits a completion into (thinking, answer), both stripped of white space at their ends.

    All before the last `</think>` is thinking, whether or not the opening tag was part of the prompt.
    Thinking that never ends has the answer ""; a text without tags has the thinking None.
    """
    thinking, end, answer = text.rpartition(END_THINK)
    if not end:
        if not text.lstrip().startswith(THINK):
            return None, text.strip()
        thinking, answer = text, ""
    return thinking.strip().removeprefix(THINK).strip(), answer.strip()

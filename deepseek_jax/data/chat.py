"""Messages to ids and a loss mask: by the model's own chat template, or else in DeepSeek's format,

    {bos}{system}<｜User｜>{user}<｜Assistant｜>{assistant}{eos}<｜User｜>...

which is written as ids, not as text, so no content can imitate its special tokens.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.template import ChatTemplate, opens_thinking
from deepseek_jax.data.tokenizer import DEEPSEEK_TEMPLATE, END_THINK, THINK, Tokenizer

ROLES = ("system", "user", "assistant")
_THINK_TAGS = re.compile(f"({re.escape(THINK)}|{re.escape(END_THINK)})")

Message = Mapping[str, str]


def check_messages(messages: object) -> None:
    """ValueError that names the first thing wrong with a list of {"role", "content"}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f'message {index} must have exactly the keys "role" and "content"')
        if message["role"] not in ROLES:
            raise ValueError(f"message {index} has role {message['role']!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"message {index} has content of type {type(message['content']).__name__}, not text")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation that ends with an assistant message, and its loss mask.

    The mask is 1 on what assistants say and the token that ends each turn, 0 elsewhere. As in R1, earlier assistant
    turns lose their thinking; the last keeps it. `<think>` and `</think>` are special tokens in assistant content only.

    By a template of the model's own the ids are transformers' `apply_chat_template`'s, special tokens counting wherever
    they stand, but that the last turn keeps its thinking where the template drops it. A `<think>` that the template
    writes into prompts is not learnt. ValueError where such a template writes a turn otherwise once others follow, or
    tokens run across a turn's edge; and for messages that are none.
    """
    if (template := own_template(tokenizer)) is not None:
        return _encode_by(template, tokenizer, messages)
    check_messages(messages)
    _check_last(messages, learnt=True)
    return _encode(tokenizer, messages, keep_thinking_of=len(messages) - 1)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation up to where an assistant answers its last message: what is sampled from."""
    if (template := own_template(tokenizer)) is not None:
        text = template.render(messages)
        _check_last(messages, learnt=False)
        return tokenizer.encode(text, allow_special=True)
    check_messages(messages)
    _check_last(messages, learnt=False)
    ids, _ = _encode(tokenizer, messages, keep_thinking_of=None)
    return [*ids, tokenizer.assistant_id]


def prompt_opens_thinking(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `encode_prompt` has written `<think>` for the model: its answer begins inside the thinking."""
    template = own_template(tokenizer)
    return template is not None and opens_thinking(template.render(messages))


def own_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template where that is not DeepSeek's format, which `_encode` writes safer."""
    template = tokenizer.template
    if template is None and not tokenizer.has_chat_tokens:
        raise ValueError("this model has no chat template and no <｜User｜>: give its folder a chat_template.jinja")
    return None if template is None or template.source == DEEPSEEK_TEMPLATE else template


def _check_last(messages: Sequence[Mapping[str, Any]], *, learnt: bool) -> None:
    role = messages[-1]["role"]
    if learnt and role != "assistant":
        raise ValueError(f"the last message has role {role!r}; to learn from, it must be 'assistant'")
    if not learnt and role in ("assistant", "system"):
        raise ValueError(f"the last message has role {role!r}; to be answered, it must be 'user'")


# ---- by the model's own template ----


def _encode_by(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    text = template.render(messages, add_generation_prompt=False)
    _check_last(messages, learnt=True)
    text = _keep_thinking(text, *_prompt_before(template, messages, len(messages) - 1, text), messages[-1])
    turns = []  # (where an answer begins in the text, where its turn ends)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            last = index == len(messages) - 1
            end = text if last else template.render(messages[: index + 1], add_generation_prompt=False)
            begin, _ = _prompt_before(template, messages, index, text)
            if not text.startswith(end) or len(begin) > len(end):
                raise ValueError(f"the chat template writes message {index} otherwise once others follow")
            turns.append((len(begin), len(end)))
    ids = tokenizer.encode(text, allow_special=True)
    mask = [0] * len(ids)
    for turn in turns:
        begin, end = (_count(tokenizer, ids, text[:edge]) for edge in turn)
        stops = [at for at in range(begin, end) if ids[at] in tokenizer.stop_ids]
        if not stops:
            warnings.warn("the chat template ends an answer with no stop token: none is learnt", stacklevel=3)
        end = stops[-1] + 1 if stops else end
        mask[begin:end] = [1] * (end - begin)
    return ids, mask


def _prompt_before(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], index: int, text: str
) -> tuple[str, str]:
    """What stands before message ``index`` in ``text``: the prompt that it answers, and what that prompt ends with
    beyond: the `<think>` of a template that opens it, where the text has none."""
    prompt = asked = template.render(messages[:index], add_generation_prompt=True)
    if not text.startswith(prompt) and opens_thinking(prompt):
        prompt = prompt.rstrip().removesuffix(THINK)
    if not text.startswith(prompt):
        raise ValueError(f"the chat template's prompt for message {index} is not how it writes the conversation")
    return prompt, asked[len(prompt) :]


def _count(tokenizer: Tokenizer, ids: list[int], part: str) -> int:
    """How many of the ids a part at the beginning of their text is."""
    found = tokenizer.encode(part, allow_special=True)
    if ids[: len(found)] != found:
        raise ValueError(f"a token of this tokenizer runs across the edge of a turn, after {part[-20:]!r}")
    return len(found)


def _keep_thinking(text: str, before: str, opener: str, message: Mapping[str, Any]) -> str:
    """The conversation with the thinking of its last message, if the template has dropped that."""
    said, content = text[len(before) :], message.get("content")
    if not isinstance(content, str) or END_THINK not in content or END_THINK in said:
        return text
    thinking, _, answer = content.rpartition(END_THINK)
    if opener:
        thinking = opener + thinking.lstrip().removeprefix(THINK).lstrip("\n")
    white, found, end = said.partition(answer.strip()) if answer.strip() else ("", True, said)
    if white.strip() or not found:
        raise ValueError("the chat template drops the last message's thinking, and its answer is not found to keep it")
    return before + thinking + END_THINK + answer + end


# ---- in DeepSeek's format ----


def _encode(
    tokenizer: Tokenizer, messages: Sequence[Message], *, keep_thinking_of: int | None
) -> tuple[list[int], list[int]]:
    # Wherever they stand, system messages open the conversation, as in R1's template.
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    ids = [tokenizer.bos_id, *tokenizer.encode(system)]
    mask = [0] * len(ids)
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            turn = [tokenizer.user_id, *tokenizer.encode(content)]
            ids += turn
            mask += [0] * len(turn)
        elif message["role"] == "assistant":
            if index != keep_thinking_of:
                content = content.split(END_THINK)[-1]
            answer = [*_encode_assistant(tokenizer, content), tokenizer.eos_id]
            ids += [tokenizer.assistant_id, *answer]
            mask += [0] + [1] * len(answer)
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

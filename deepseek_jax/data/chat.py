"""DeepSeek's chat template: messages to ids and a loss mask.

    {bos}{system}<｜User｜>{user}<｜Assistant｜>{assistant}{eos}<｜User｜>...

The template is written as ids, not as text, so no content can imitate its special tokens.
"""

import re
from collections.abc import Mapping, Sequence

from deepseek_jax.data.tokenizer import END_THINK, THINK, Tokenizer

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


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation that ends with an assistant message, and its loss mask.

    The mask is 1 on the assistants' content and the EOS after it, 0 elsewhere. `<think>` and `</think>` are
    special tokens in assistant content only. As in R1, earlier assistant turns lose their thinking; the last
    keeps it.
    """
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message has role {messages[-1]['role']!r}; to learn from, it must be 'assistant'")
    return _encode(tokenizer, messages, keep_thinking_of=len(messages) - 1)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation that ends with a user message, then `<｜Assistant｜>`: what is sampled from."""
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message has role {messages[-1]['role']!r}; to be answered, it must be 'user'")
    ids, _ = _encode(tokenizer, messages, keep_thinking_of=None)
    return [*ids, tokenizer.assistant_id]


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

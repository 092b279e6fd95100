"""Answers that people or models have judged: pairs of a better and a worse one, or single ones that are good or bad.

A row of a file has the question, `prompt` (a text, or messages) or `messages`, and

* `chosen` and `rejected`: texts, or lists of messages, whole conversations where there is no question beside them;
* or `response` and `label`: 1 or "safe", 0 or "unsafe".
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deepseek_jax.data.chat import encode_chat, split_thinking
from deepseek_jax.data.conversations import Message, read_messages, with_thinking
from deepseek_jax.data.files import PathLike
from deepseek_jax.data.packing import Row, best_fit, segment_positions
from deepseek_jax.data.text import RefusedError, check_text, read_checked
from deepseek_jax.data.tokenizer import Tokenizer

Judges = Literal["summary", "all"]
_LABELS = {1: True, 0: False, "safe": True, "unsafe": False}


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is compared: a conversation that ends in a better answer, one that ends in a worse one; or one of the two,
    which is good or bad by itself."""

    better: list[Message] | None
    worse: list[Message] | None


@dataclasses.dataclass(frozen=True)
class Item:
    """The same as ids."""

    better: list[int]
    worse: list[int]

    @property
    def length(self) -> int:
        return len(self.better) + len(self.worse)


def read_judged(row: Any) -> Judged:
    """A row in any of the forms above. ValueError says what is wrong, or what the row has in their place."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a {type(row).__name__}; each line must be an object")
    row = {name: value for name, value in row.items() if value is not None}
    question = next((_messages(row[name], name, "user") for name in ("prompt", "messages") if name in row), [])
    if {"chosen", "rejected"} <= row.keys():
        chosen, rejected = (_conversation(question, row[name], name) for name in ("chosen", "rejected"))
        return Judged(chosen, rejected)
    if {"response", "label"} <= row.keys():
        label = row["label"]
        if not isinstance(label, int | str) or label not in _LABELS:
            raise ValueError(f'"label" is {label!r}; it must be 1 or "safe", 0 or "unsafe"')
        answered = _conversation(question, row["response"], "response")
        return Judged(answered, None) if _LABELS[label] else Judged(None, answered)
    raise ValueError(f"no chosen with rejected, nor response with label; it has {', '.join(map(str, row)) or 'none'}")


def _messages(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return read_messages([{"role": role, "content": check_text(value, name)}])
    if not isinstance(value, Sequence):
        raise ValueError(f'"{name}" is of type {type(value).__name__}; it must be text or a list of messages')
    return read_messages(value)


def _conversation(question: list[Message], answer: Any, name: str) -> list[Message]:
    whole = [*question, *_messages(answer, name, "assistant")]
    if whole[-1]["role"] != "assistant" or len(whole) < 2:
        raise ValueError(f'"{name}" must end in an answer to something: give "prompt" or "messages" beside it')
    if question and question[-1]["role"] == "assistant":
        raise ValueError('"messages" ends in an answer; it must end in what is answered')
    return whole


def shown(answer: str, judges: Judges) -> str:
    """What is judged of an answer: all of it, or its summary, which follows `</think>`; "" where there is none."""
    return answer.strip() if judges == "all" else split_thinking(answer)[1]


def encode_judged(tokenizer: Tokenizer, question: Sequence[Message], answer: str) -> list[int]:
    """Ids of a conversation that ends in this answer, with the token that ends it."""
    return encode_chat(tokenizer, [*question, {"role": "assistant", "content": answer}])[-1][0]


def read_items(
    paths: PathLike | Iterable[PathLike],
    tokenizer: Tokenizer,
    *,
    judges: Judges,
    seq_len: int,
    positions: int,
    drop_long: bool = False,
    skip_broken: bool = False,
    skipped: Counter[str] | None = None,
) -> list[Item]:
    """All judged answers of the files, as ids. ValueError "FILE:LINE: what" for one that cannot be used: of no known
    form, without anything to judge, two equal ones, of more than ``seq_len`` tokens together or ``positions`` each.

    drop_long, skip_broken: leave such out, counted in ``skipped``.
    """
    skipped = Counter() if skipped is None else skipped

    def encode(messages: list[Message] | None, name: str) -> tuple[str, list[int]]:
        if messages is None:
            return "", []
        answer = shown(with_thinking(messages[-1]), judges)
        if not answer:
            thought = "" if judges == "all" else " after its thought, and the summary alone is judged"
            raise ValueError(f"the {name} answer says nothing{thought}")
        return answer, encode_judged(tokenizer, messages[:-1], answer)

    def item(row: Any) -> Item | None:
        judged = read_judged(row)
        names = ("chosen", "rejected") if judged.better and judged.worse else ("judged", "judged")
        (one, better), (other, worse) = (
            encode(messages, name) for messages, name in zip((judged.better, judged.worse), names, strict=True)
        )
        if better == worse:
            where = "" if judges == "all" else " once their thoughts are left out, as the summary alone is judged"
            raise ValueError(f"both answers are {one!r:.60}{where}: neither is better")
        found = Item(better, worse)
        longest = max(len(better), len(worse))
        if found.length <= seq_len and longest <= positions:
            return found
        if not drop_long:
            limit = f"data.seq_len={seq_len}" if found.length > seq_len else f"max_position_embeddings={positions}"
            length = found.length if found.length > seq_len else longest
            raise RefusedError(f"{length} tokens, where {limit}; --data.drop-long leaves such out")
        skipped["too long"] += 1
        return None

    found = read_checked(paths, item, skip_broken=skip_broken, skipped=skipped)
    return [item for item in found if item is not None]


def pack_items(items: Sequence[Item], seq_len: int, *, pad_id: int) -> list[Row]:
    """Rows of whole items, by best fit: segment 2k+1 is the better or good answer of the k-th item of a row, 2k+2 the
    worse or bad one, and ``loss_mask`` is 1 on each one's last token."""
    rows = best_fit([item.length for item in items], seq_len)
    return [_row([items[index] for index in row], seq_len, pad_id) for row in rows]


def _row(items: Sequence[Item], seq_len: int, pad_id: int) -> Row:
    tokens_S, segments_S = np.full(seq_len, pad_id, np.int32), np.zeros(seq_len, np.int32)
    mask_S, start = np.zeros(seq_len, np.float32), 0
    for segment, ids in enumerate((ids for item in items for ids in (item.better, item.worse)), start=1):
        if ids:
            place = slice(start, start + len(ids))
            tokens_S[place], segments_S[place], mask_S[place.stop - 1] = ids, segment, 1
            start = place.stop
    assert start <= seq_len
    return {
        "tokens": tokens_S,
        "segment_ids": segments_S,
        "positions": segment_positions(segments_S),
        "loss_mask": mask_S,
    }

"""Whether a model was taught chats of one question or of many: said beside its tokenizer, so that it travels along."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.data.model_folder import TextFiles, json_bytes
from deepseek_jax.data.tokenizer import Tokenizer

SINGLE, MANY = "single", "many"
_FILE, _KEY = "tokenizer_config.json", "turns"


def count_turns(messages: Iterable[Mapping[str, Any]]) -> int:
    """Questions in a conversation."""
    return sum(message.get("role") == "user" for message in messages)


def known_turns(tokenizer: Tokenizer) -> str | None:
    """``SINGLE`` or ``MANY`` where a stage has said so; of a released model nothing is known."""
    return json.loads(tokenizer.files.files.get(_FILE, b"{}")).get(_KEY)


def taught(tokenizer: Tokenizer, turns: Sequence[int], *, released: bool) -> Tokenizer:
    """The tokenizer of a model that was taught conversations of ``turns`` questions.

    Single ones alone teach no more; but a ``released`` model, and one that was taught many, keep what they knew.
    """
    known, files = known_turns(tokenizer), tokenizer.files
    single = max(turns, default=0) == 1
    if not turns or _FILE not in files.files or (single and (known == MANY or (known is None and released))):
        return tokenizer
    config = json.loads(files.files[_FILE]) | {_KEY: SINGLE if single else MANY}
    other = copy.copy(tokenizer)
    other.files = TextFiles({**files.files, _FILE: json_bytes(config)}, files.ids)
    return other

"""Files and models that settings name, looked for before the stages in front of them take their hours."""

import dataclasses
from typing import Any

from deepseek_jax.checkpoint.finding import find_model
from deepseek_jax.data.files import ROWS, TEXTS, find_files
from deepseek_jax.data.model_folder import TOKENIZER

_FILES, _MODELS = ("path", "replay", "heldout"), ("init_from", "base", "models")


def look_for(config: Any, *, under: str = "") -> None:
    """FileNotFoundError or ValueError for the first files that are not there, and the first model that is not or has no
    tokenizer. under: a folder of which it does not ask, for earlier stages write there."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            look_for(value, under=under)
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str) or not text or (under and text.startswith(f"{under}/")):
                continue
            if field.name in _FILES:
                find_files(text, (*ROWS, *TEXTS))
            elif field.name in _MODELS and not (find_model(text) / TOKENIZER).is_file():
                raise ValueError(f"{text} has no {TOKENIZER}, which reading and writing text takes")

"""Typed configuration from plain values: dataclasses whose fields hold what their annotations say."""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Sequence
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

# What others write where there is a choice: the word that is expected here, and what belongs to it.
OTHERWISE = {
    "mha": ("gqa", "with num_key_value_heads = num_attention_heads"),
    "mqa": ("gqa", "with num_key_value_heads = 1"),
    "bf16": ("bfloat16", ""),
    "fp32": ("float32", ""),
    "fp8": ("float8_e4m3", ""),
}


def written_here(word: Any, choices: Sequence[Any]) -> str:
    """How a word that is none of the choices is written by them, as "mha is gqa with ..."; "" where it is not."""
    choice, more = OTHERWISE.get(word if isinstance(word, str) else "", (None, ""))
    return f"{word} is {choice} {more}".rstrip() if choice in choices else ""


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Build a (nested) configuration dataclass from plain values, refusing unknown fields by name."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(hints)}")
    return cls(**{name: _built(hints[name], value) for name, value in values.items()})


def _built(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value


def check_types(config: Any, *, signed: Sequence[str] = ()) -> None:
    """Refuse a field whose value is not of its annotated type: an int is a fine float, a bool is no number.

    A number of a configuration is a size, a count, a share, a rate or a seed: one that is negative (but for the fields
    in ``signed``), not finite or, if whole, over 2³¹ - 1 is refused as well.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            fits = bool not in map(type, items) or bool in (hint, *typing.get_args(hint))
        except TypeCheckError:
            fits = False
        if not fits:
            advice = written_here(value, typing.get_args(hint))
            raise ValueError(
                f"{type(config).__name__}.{name}={value!r}: expected {inspect.formatannotation(hint)}, "
                f"got {type(value).__name__}{advice and '; ' + advice}"
            )
        for number in items:
            if not isinstance(number, int | float):
                continue
            if wrong := _wrong(abs(number) if name in signed else number, hint):
                raise ValueError(f"{type(config).__name__}.{name}={value!r}: {wrong}")


def check_least(config: Any, least: int, *names: str) -> None:
    """ValueError for the first of these fields that is less."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{type(config).__name__}.{name}={value!r}: must be at least {least}")


def _wrong(number: int | float, hint: Any) -> str:
    if not abs(number) <= sys.float_info.max:
        return "must be finite"
    if hint is not float and number >= 2**31:  # what indices, steps and seeds are on a device
        return "must be less than 2**31"
    return "must not be negative" if number < 0 else ""

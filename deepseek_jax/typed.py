"""Typed configuration from plain values: dataclasses whose fields hold what their annotations say."""

import dataclasses
import inspect
import typing
from typing import Any

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


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


def check_types(config: Any) -> None:
    """Refuse a field whose value is not of its annotated type: an int is a fine float, a bool is no number."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            fits = bool not in map(type, items) or bool in (hint, *typing.get_args(hint))
        except TypeCheckError:
            fits = False
        if not fits:
            raise ValueError(
                f"{type(config).__name__}.{name}={value!r}: expected {inspect.formatannotation(hint)}, "
                f"got {type(value).__name__}"
            )

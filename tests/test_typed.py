"""Configuration from plain values: wrong types and unknown fields are named, JSON's lists become tuples."""

import dataclasses
import re
from typing import Any, Literal

import pytest

from deepseek_jax.typed import check_types, from_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 1
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1,)
    name: str | None = None
    mode: Literal["fast", "slow"] = "fast"
    on: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("inner", None, "Inner"),
        ("inner", {"width": 3}, "Inner"),
        ("sizes", [1], "tuple[int, ...]"),
        ("sizes", (1, 2.0), "tuple[int, ...]"),
        ("sizes", (1, True), "tuple[int, ...]"),
        ("name", 3, "str | None"),
        ("mode", "medium", "'fast', 'slow'"),
        ("mode", True, "'fast', 'slow'"),
        ("on", 1, "bool"),
    ],
)
def test_a_value_of_another_type_is_refused_with_field_value_and_type(field: str, value: Any, expected: str) -> None:
    named = f"Outer.{field}={value!r}: expected "
    with pytest.raises(ValueError, match=re.escape(named) + f".*{re.escape(expected)}.*, got {type(value).__name__}$"):
        Outer(**{field: value})


@pytest.mark.parametrize(("value", "fits"), [(1, True), (1.5, False), (True, False), ("1", False), (None, False)])
def test_only_an_int_is_an_int(value: Any, fits: bool) -> None:
    if fits:
        return check_types(Inner(width=value))
    with pytest.raises(ValueError, match=r"Inner\.width=.*expected int, got"):
        check_types(Inner(width=value))


@pytest.mark.parametrize(("value", "fits"), [(1, True), (1.5, True), (True, False), ("1", False)])
def test_an_int_is_a_fine_float_and_a_bool_is_not(value: Any, fits: bool) -> None:
    if fits:
        return check_types(Inner(rate=value))
    with pytest.raises(ValueError, match=r"Inner\.rate=.*expected float, got"):
        check_types(Inner(rate=value))


def test_plain_values_become_nested_dataclasses_and_tuples_and_the_rest_defaults() -> None:
    built = from_dict(Outer, {"inner": {"rate": 1}, "sizes": [2, 3], "name": "x", "on": True})
    assert built == Outer(Inner(rate=1), (2, 3), "x", on=True)


def test_unknown_fields_are_refused_by_name_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="Outer has no field mood, nam; it has inner, sizes, name, mode, on"):
        from_dict(Outer, {"nam": "x", "mood": 1})
    with pytest.raises(ValueError, match="Inner has no field widht; it has width, rate"):
        from_dict(Outer, {"inner": {"widht": 1}})

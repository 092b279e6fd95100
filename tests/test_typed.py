"""Configuration from plain values: wrong types and unknown fields are named, JSON's lists become tuples."""

import dataclasses
import importlib
import math
import re
import sys
import typing
from collections.abc import Callable
from typing import Any, Literal

import pytest

from deepseek_jax.rl.sandbox import Limits
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.typed import check_types, from_dict
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.sft import SFTConfig, SFTData


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


@pytest.mark.parametrize(("value", "fits"), [(1, True), (2**40, True), (1.5, True), (True, False), ("1", False)])
def test_an_int_is_a_fine_float_and_a_bool_is_not(value: Any, fits: bool) -> None:
    if fits:
        return check_types(Inner(rate=value))
    with pytest.raises(ValueError, match=r"Inner\.rate=.*expected float, got"):
        check_types(Inner(rate=value))


def configurations() -> list[type]:
    """Every frozen dataclass of the package that checks its types."""
    for module in ("workflows.pretrain", "workflows.sft", "workflows.grpo", "workflows.demo"):
        importlib.import_module(f"deepseek_jax.{module}")
    modules = [module for name, module in sys.modules.items() if name.startswith("deepseek_jax.")]
    found = {
        kind: None
        for module in modules
        for kind in vars(module).values()
        if dataclasses.is_dataclass(kind) and hasattr(kind, "__post_init__") and kind.__module__ == module.__name__
    }
    assert len(found) > 15
    return [kind for kind in found if isinstance(kind, type) and kind is not Limits]  # of memory, maybe over 2 GiB


SIGNED = {("RejectionConfig", "judge_least")}
SIGNED |= {("SamplingParams", "presence_penalty"), ("SamplingParams", "frequency_penalty")}
NEEDED = {"LoopConfig": {"steps": 1}, "ModelBench": {"recipe": PretrainConfig()}, "_Eval": {"run": "x"}}
NEEDED |= {"Compile": NEEDED["ModelBench"], "Integers": {"bits": 8}, "BenchServeConfig": {"url": "http://x"}}


def test_no_number_of_any_configuration_is_negative_infinite_or_huge() -> None:
    for kind in configurations():
        for name, hint in typing.get_type_hints(kind).items():
            wrong = {int: (-1, 2**31, 10**20), float: (-1.0, math.nan, math.inf)}.get(hint, ())
            if (kind.__name__, name) in SIGNED:
                wrong = wrong[1:]
            for value in wrong:
                needed = NEEDED.get(kind.__name__, {})
                with pytest.raises(ValueError, match=rf"{kind.__name__}\.{name}={value}: must "):
                    kind(**needed | {name: value})


@pytest.mark.parametrize(
    "build",
    [
        lambda: OptimizerConfig(b2=1.0),
        lambda: OptimizerConfig(eps=0.0),
        lambda: PretrainConfig(batch_size=0),
        lambda: SFTConfig(batch_size=0),
        lambda: GRPOConfig(minibatches=0),
        lambda: PretrainData(seq_len=1),
        lambda: SFTData(seq_len=0),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"\w+=[\d.]+: must (be|lie) "):
        build()


def test_plain_values_become_nested_dataclasses_and_tuples_and_the_rest_defaults() -> None:
    built = from_dict(Outer, {"inner": {"rate": 1}, "sizes": [2, 3], "name": "x", "on": True})
    assert built == Outer(Inner(rate=1), (2, 3), "x", on=True)


def test_unknown_fields_are_refused_by_name_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="Outer has no field mood, nam; it has inner, sizes, name, mode, on"):
        from_dict(Outer, {"nam": "x", "mood": 1})
    with pytest.raises(ValueError, match="Inner has no field widht; it has width, rate"):
        from_dict(Outer, {"inner": {"widht": 1}})

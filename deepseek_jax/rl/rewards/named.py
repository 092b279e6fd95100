"""The package's rewards by name: NAME[:ARGUMENT...] of a specification."""

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.rl.code_reward import code_reward
from deepseek_jax.rl.rewards import choice
from deepseek_jax.rl.rewards.form import format_reward, tags_reward
from deepseek_jax.rl.rewards.language import language
from deepseek_jax.rl.rewards.length import length
from deepseek_jax.rl.rewards.model import ModelReward
from deepseek_jax.rl.rewards.repetition import repetition

Score = Callable[[str, Mapping[str, Any]], float | None] | ModelReward


@dataclasses.dataclass(frozen=True)
class Named:
    """How a reward is made and what it gets to read.

    make: from its arguments; None where the task has it (accuracy) or a worker (file). file: of a `score` that runs in
    a process that can be killed. compares: the row it gets is {"answer": what is right, as the task has it}. cut:
    it reads an answer that was cut off as it stands; to others that is an empty text. several: specifications may name
    it more than once, with paths whose last parts tell them apart.
    """

    make: Callable[..., Score] | None = None
    file: Path | None = None
    compares: bool = False
    cut: bool = False
    several: bool = False


NAMED = {
    "accuracy": Named(),
    "maths": Named(file=Path(__file__).with_name("maths.py"), compares=True),
    "code": Named(code_reward),
    "choice": Named(lambda: choice.score, compares=True),
    "format": Named(lambda: format_reward),
    "tags": Named(lambda: tags_reward),
    "language": Named(language, cut=True),
    "repetition": Named(repetition, cut=True),
    "length": Named(length, cut=True),
    "model": Named(ModelReward, several=True),
}


def check_arguments(name: str, given: Sequence[str]) -> tuple[str | int, ...]:
    """The arguments of NAME:ARGUMENT... as what they stand for. ValueError where NAME does not take them."""
    make = NAMED[name].make
    parameters = [*inspect.signature(make).parameters.values()] if make else []
    least = sum(parameter.default is parameter.empty for parameter in parameters)
    if not least <= len(given) <= len(parameters):
        takes = "".join(f":{parameter.name.upper()}" for parameter in parameters) or "no arguments"
        raise ValueError(f"{name} takes {takes}, got {':'.join(given) or 'none'}")
    values = []
    for parameter, text in zip(parameters, given, strict=False):
        if parameter.annotation is int and not text.isdecimal():
            raise ValueError(f"{parameter.name.upper()} of {name} is {text!r}; it must be a whole number")
        values.append(int(text) if parameter.annotation is int else text)
    if make is not None:
        make(*values)  # which knows more of them
    elif name == "maths" and importlib.util.find_spec("math_verify") is None:
        raise ValueError("it needs math-verify: pip install 'deepseek-jax[rewards]'")
    return tuple(values)

"""Rewards as they are written on the command line."""

import dataclasses
import math
import re
from pathlib import Path

from deepseek_jax.rl.rewards.named import NAMED, Named, check_arguments
from deepseek_jax.rl.tasks import split_function


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """`NAME[:ARGUMENT...][=WEIGHT]` or `file.py:function[=WEIGHT]`, see ``parse_reward``; metrics call it `name`."""

    name: str
    weight: float
    source: tuple[str, str] | None = None  # file and function
    arguments: tuple[str | int, ...] = ()

    @property
    def named(self) -> Named | None:
        """Which of the package's it is."""
        return NAMED.get(self.name if self.source else self.name.partition(".")[0])


def parse_reward(text: str) -> RewardSpec:
    """One of the package's rewards or a function of a file, and its weight (1 if left out).

    ValueError names an unknown reward, arguments that it does not take, a missing file, and a weight that is no finite
    number.
    """
    found = re.fullmatch(r"(.+\.py:[^:/=]*|[^=]*?)(?:=([^=]*))?", text)
    if found is None:
        raise ValueError(f"reward {text!r}: expected NAME[:ARGUMENT...][=WEIGHT] or file.py:function[=WEIGHT]")
    name, spelled = found.groups()
    try:
        weight = float("1" if spelled is None else spelled)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"reward {text!r}: the weight {spelled!r} is no finite number")
    source = split_function(name)
    if source is not None:
        return RewardSpec(f"{Path(source[0]).stem}.{source[1]}", weight, source)
    name, *given = name.split(":")
    if name not in NAMED:
        raise ValueError(f"reward {text!r}: expected one of {', '.join(NAMED)}, or file.py:function")
    try:
        arguments = check_arguments(name, given)
    except ValueError as error:
        raise ValueError(f"reward {text!r}: {error}") from error
    file = NAMED[name].file
    if NAMED[name].several:
        name = f"{name}.{Path(str(arguments[0])).name}"
    return RewardSpec(name, weight, (str(file), "score") if file else None, arguments)

"""``deepseek-jax r1``: all stages of R1 in a row."""

from collections.abc import Sequence

from deepseek_jax.cli.stages import parse_recipe
from deepseek_jax.workflows.r1 import R1Config, r1


def run_r1(arguments: Sequence[str]) -> None:
    r1(parse_recipe("r1", R1Config, arguments))

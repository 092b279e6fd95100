"""``curate``: rows to train on, of the right difficulty and without evaluation sets."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from deepseek_jax.saying import doing, terminal
from deepseek_jax.workflows.curate import CurateConfig, curate


@dataclasses.dataclass(frozen=True)
class _Curate:
    """Keep the rows of data sets whose share of right answers lies within bounds, and that share no 10 words in a row
    with evaluation sets."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    """The file to write; it must not exist."""
    rows: Annotated[CurateConfig, tyro.conf.arg(name="")] = CurateConfig()


def run_curate(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Curate, args=list(arguments), prog="deepseek-jax curate")
    with doing("reading rows"):
        counts = curate(options.rows, options.out)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    terminal().print(f"{told} → {options.out}", soft_wrap=True)

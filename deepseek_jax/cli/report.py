"""The commands that look at runs."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from deepseek_jax.saying import terminal
from deepseek_jax.workflows.compare import print_comparison, read_runs, write_comparison
from deepseek_jax.workflows.report import print_summary, write_report


@dataclasses.dataclass(frozen=True)
class _Report:
    """Write a run's report.html again and print its numbers."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A folder that a stage or the demo wrote, finished or not."""


@dataclasses.dataclass(frozen=True)
class _Compare:
    """Print the numbers of several runs side by side, with the settings in which they differ, and draw their curves."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders that stages wrote, finished or not."""
    output: str = "compare.html"
    """Where the table and the curves are written."""


def run_report(arguments: Sequence[str]) -> None:
    run = tyro.cli(_Report, args=list(arguments), prog="deepseek-jax report").run
    path = write_report(run)
    print_summary(run, terminal())
    print(path)


def run_compare(arguments: Sequence[str]) -> None:
    asked = tyro.cli(_Compare, args=list(arguments), prog="deepseek-jax compare")
    runs = read_runs(asked.runs)
    path = write_comparison(runs, asked.output)
    print_comparison(runs, terminal())
    print(path)

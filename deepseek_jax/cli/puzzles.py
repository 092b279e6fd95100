"""``puzzles``: generated questions, as rows for the tasks logic and rows."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deepseek_jax.saying import terminal


@dataclasses.dataclass(frozen=True)
class _Puzzles:
    """Write different puzzles, each with one solution: rows of the task logic, which `grpo logic` asks; or stories,
    word problems that `grpo stories` asks; or needles, texts to pretrain on whose facts come back later, in the words
    that `eval --needle.lengths` asks for them."""

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    """The file to write; it must not exist."""
    kind: Literal["knights", "grid", "stories", "needles"] = "knights"
    """Knights and knaves, things in houses, word problems, or texts with facts in them."""
    size: int = 3
    """People (2 to 8), houses (2 to 4), steps (1 to 5) or sentences at most (from 8)."""
    count: int = 1000
    """Puzzles."""
    seed: int = 0
    """The same seed gives the same puzzles; other seeds may repeat some."""


def run_puzzles(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Puzzles, args=list(arguments), prog="deepseek-jax puzzles")
    if Path(options.out).exists():
        raise FileExistsError(f"{options.out} exists already; choose another file or remove it")
    # --help does not wait for them.
    from deepseek_jax.evals.haystack import documents
    from deepseek_jax.rl.logic import stream_puzzles, write_puzzles

    of_kind = documents(options.size, options.seed) if options.kind == "needles" else None
    write_puzzles(options.out, of_kind or stream_puzzles(options.kind, options.size, options.seed), options.count)
    terminal().print(f"{options.count:,} puzzles → {options.out}", soft_wrap=True)

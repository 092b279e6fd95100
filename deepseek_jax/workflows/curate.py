"""Rows to train on: those of the right difficulty, without what a model will be evaluated on."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.data.decontamination import Overlap, texts_of
from deepseek_jax.data.text import read_rows
from deepseek_jax.rl.tasks import Row, column, where
from deepseek_jax.typed import check_least, check_types

# What asks, in the data sets that people evaluate on.
QUESTIONS = "question|Question|problem|Problem|prompt|question_content|description|text"


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """Which rows are kept."""

    data: tuple[str, ...] = ()
    """Files of rows, folders of them, quoted globs: .jsonl(.gz|.zst), .parquet; or hf:NAME[:CONFIG]:SPLIT."""
    answers: tuple[str, ...] = ()
    """Answers to these rows that `eval` wrote: rows are kept by the share of right ones."""
    least: float = 0.05
    """The least share of right answers: of fewer, nothing is learnt."""
    most: float = 0.95
    """The greatest share."""
    against: tuple[str, ...] = ()
    """Files of evaluation sets: rows that share words with one are left out."""
    against_columns: tuple[str, ...] = (QUESTIONS,)
    """Columns of evaluation sets that are looked for; A|B is the first that a row has. Of the rows all texts are
    read."""
    size: int = 10
    """Words in a row that two texts must not share."""
    shortest: int = 3
    """An evaluation text of fewer words than size is looked for as a whole, down to this many words."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "size", "shortest")
        if not self.least <= self.most <= 1:
            raise ValueError(f"least={self.least}, most={self.most}: expected 0 <= least <= most <= 1")


def curate(config: CurateConfig, out: str | Path) -> dict[str, int]:
    """Write the rows that are kept to the new file `out`, a JSON line each, one at a time -> how many were `read` and
    `kept`, and how many left out as `unanswered`, `hard`, `easy`, or `shared with FILE`.

    Raises: ValueError: nothing to read or to keep rows by, answers to other rows, a set without texts to look for,
    FILE:LINE of a row that is broken. FileExistsError: `out` is there.
    """
    if not config.data or not (config.answers or config.against):
        raise ValueError("give --data FILES, and what rows are kept by: --answers or --against FILES")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another file or remove it")
    rates = pass_rates(config.answers) if config.answers else None
    overlap = read_overlap(config) if config.against else None
    counts = Counter(read=0, kept=0)
    partial = out.with_name(out.name + ".partial")
    met: set[str] = set()
    with partial.open("w", encoding="utf-8") as file:
        for row in read_rows(config.data):
            counts["read"] += 1
            met.add(where(row))
            reason = _reason(row, config, rates, overlap)
            counts[reason or "kept"] += 1
            if not reason:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    if rates is not None and (strange := next((name for name in rates if name not in met), None)):
        partial.unlink()
        raise ValueError(f"there are answers to {strange}, which is no row of --data: give the files as eval had them")
    partial.rename(out)
    return dict(counts)


def _reason(row: Row, config: CurateConfig, rates: Mapping[str, float] | None, overlap: Overlap | None) -> str:
    """Why a row is left out, "" where it is not."""
    if rates is not None:
        rate = rates.get(where(row))
        if rate is None:
            return "unanswered"
        if not config.least <= rate <= config.most:
            return "hard" if rate < config.least else "easy"
    if overlap is not None:
        for text in texts_of(row):
            if source := overlap.find(text):
                return f"shared with {source}"
    return ""


def pass_rates(paths: tuple[str, ...]) -> dict[str, float]:
    """By row, "FILE:LINE", the share of its answers that are right, from what `eval` wrote."""
    right, asked = Counter[str](), Counter[str]()
    for line in read_rows(paths):
        name: Any = line.get("row")
        if line.get("correct") is None and "correct" in line:
            continue  # of a row without a right answer
        if not isinstance(name, str) or not isinstance(line.get("correct"), bool):
            raise ValueError(f'{where(line)}: no answer of eval, which has "row" and "correct"')
        asked[name] += 1
        right[name] += line["correct"]
    return {name: right[name] / count for name, count in asked.items()}


def read_overlap(config: CurateConfig) -> Overlap:
    """What the evaluation sets hold. ValueError for a column that a row does not have, and where nothing is found."""
    overlap, found = Overlap(size=config.size, least=min(config.shortest, config.size)), 0
    for row in read_rows(config.against):
        for name in config.against_columns:
            try:
                value = column(row, name)
            except ValueError as error:
                raise ValueError(f"{where(row)}: {error}") from error
            found += sum(overlap.add(text, where(row).rpartition(":")[0]) for text in texts_of(value))
    if not found:
        raise ValueError(f"{', '.join(config.against)}: no text of shortest={config.shortest} words to look for")
    return overlap

"""What came of asking models: figures of an evaluation, and what rejection sampling kept."""

from collections.abc import Sequence
from typing import Any

from deepseek_jax.workflows.report_cards import figure, section, table
from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_summary import NOTHING, show_accuracy, show_percent

PASS = "pass@1"  # has its standard error beside it
Figures = dict[str, Any]


def scores(stages: Sequence[Stage]) -> dict[str, dict[str, tuple[float, float]]]:
    """By task, pass@1 and its standard error of each model that one of the stages asked, called by its folder."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in stages:
        for model, task, figures in _figures(stage):
            if model:
                found.setdefault(task, {})[model] = figures[PASS], figures.get("stderr") or 0.0
    return found


def asked(stage: Stage) -> str:
    """The section on it, "" for a stage that does something else."""
    tables = [part for part in (_evaluation(stage), _rejection(stage)) if part]
    wide = f'<div class="grid-wide">{"".join(tables)}</div>'  # as a card, it would hide pass@1 behind a scroll bar
    return section("asked", "Answers", "") + wide if tables else ""


def _figures(stage: Stage) -> list[tuple[str, str, Figures]]:
    """(model, task, figures) of a result, which has them by task, or by model and task."""
    found = []
    for name, value in stage.result.items():
        if isinstance(value, dict):
            rows = [("", name, value)] if PASS in value else [(name, task, own) for task, own in value.items()]
            found += [row for row in rows if isinstance(row[2], dict) and PASS in row[2]]
    return found


def _evaluation(stage: Stage) -> str:
    rows = _figures(stage)
    keys = list(dict.fromkeys(key for *_, figures in rows for key in figures if key != "stderr"))
    shown = [(", ".join(filter(None, names)), [_cell(figures, key) for key in keys]) for *names, figures in rows]
    text = "pass@1 is the mean of the samples of each question, ± its standard error over questions."
    heads = [key.replace("_", " ") for key in keys]
    return figure("Accuracy", table(heads, shown), text) if rows else ""


def _cell(figures: Figures, key: str) -> str:
    value = figures.get(key)
    if value is None:
        return NOTHING
    if key == PASS:
        return show_accuracy((value, figures.get("stderr") or 0.0))
    if isinstance(value, str):
        return value
    return show_percent(value) if "@" in key or key in ("cut_off", "low", "high") else f"{value:,.4g}"


def _rejection(stage: Stage) -> str:
    """How many answers were kept, and why the others were not; of each the first reason that holds."""
    dropped, answers = stage.result.get("dropped"), stage.result.get("answers")
    if not isinstance(dropped, dict) or not answers:
        return ""
    rows = [("kept", stage.result["kept"]), *((f"dropped: {name.replace('_', ' ')}", n) for name, n in dropped.items())]
    shown = [(label, [f"{count:,}", show_percent(count / answers)]) for label, count in rows]
    text = f"Of {answers:,} answers to {stage.result.get('questions', 0):,} questions; an answer's first reason counts."
    return figure("Kept and dropped", table(["answers", "share"], shown), text)

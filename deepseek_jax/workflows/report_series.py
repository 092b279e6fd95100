"""Runs in one folder, of which each may begin with another, as R1's stages do: before and after each of them."""

import html
from collections.abc import Sequence

from deepseek_jax.workflows.report_asked import scores
from deepseek_jax.workflows.report_cards import change, figure, table
from deepseek_jax.workflows.report_data import Stage, start_of
from deepseek_jax.workflows.report_figures import Line, pairs_chart
from deepseek_jax.workflows.report_summary import (
    NOTHING,
    NUMBERS,
    accuracy_after,
    accuracy_before,
    came_to,
    show_accuracy,
    summary_rows,
)

MODES = ("greedy", "sampled")
Score = tuple[float, float] | None  # a share and its standard error
Overview = tuple[list[str], list[tuple[str, list[str]]]]


def overview(stages: Sequence[Stage]) -> Overview:
    """The headings, and the title and cells of each stage: what it began with and what it came to. A column that has
    nothing to say is left out."""
    starts = [start_of(stage, stages) for stage in stages]
    columns = {
        "status": [NOTHING if all(stage.result for stage in stages) else stage.status for stage in stages],
        "begins with": [start.title if start else NOTHING for start in starts],
    }
    columns |= {name: [_went(*pair) for pair in pairs] for name, pairs in _accuracies(stages).items()}
    for head, key in (("loss", "ce"), ("reward", "reward"), ("tokens of an answer", "response_length")):
        columns[head] = [change(stage, key).strip(" ()") or NOTHING for stage in stages]
    columns["came to"] = [came_to(stage.result) for stage in stages]
    for head, key in (("steps", "steps"), ("time", "seconds")):
        numbers = [stage.number(key) for stage in stages]
        columns[head] = [NOTHING if value is None else NUMBERS[key][1](value) for value in numbers]
    kept = {head: cells for head, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    rows = [list(row) for row in zip(*kept.values(), strict=True)]
    return list(kept), [(stage.title, row) for stage, row in zip(stages, rows, strict=True)]


def _accuracies(stages: Sequence[Stage]) -> dict[str, list[tuple[Score, Score]]]:
    """Of each accuracy, its name and each stage's before and after: its own evaluation's, and what a stage measured
    that asks the models of the others."""
    starts = [start_of(stage, stages) for stage in stages]
    found = {
        f"{mode} accuracy": [
            (accuracy_before(stage, start, mode), accuracy_after(stage, mode))
            for stage, start in zip(stages, starts, strict=True)
        ]
        for mode in MODES
    }
    for task, by_model in scores(stages).items():
        models = [
            (start.folder.name if start else "", stage.folder.name) for stage, start in zip(stages, starts, strict=True)
        ]
        found[f"{task}, pass@1"] = [(by_model.get(before), by_model.get(after)) for before, after in models]
    return {name: pairs for name, pairs in found.items() if any(after for _, after in pairs)}


def _went(before: Score, after: Score) -> str:
    if after is None:
        return NOTHING
    return f"{100 * before[0]:.1f} → {show_accuracy(after)}" if before else show_accuracy(after)


def series_headline(stages: Sequence[Stage], name: str) -> str:
    done = sum(bool(stage.result) for stage in stages)
    lead = f"{done} of {len(stages)} runs are finished."
    going = "; ".join(f"{stage.title} is {stage.status}" for stage in stages if not stage.result)
    note = f"<p><b>Not complete: {html.escape(going)}.</b></p>" if going else ""
    text = (
        "What each began with, and its numbers at the beginning and the end (means over the first and the last "
        "twentieth of a curve). Accuracy before a stage is measured at its step 0 or, where that was not done, taken "
        "from the end of the one that it began with; ± is one standard error."
    )
    charts = "".join(_pairs(stages, *about) for about in _accuracies(stages).items())
    numbers = table([stage.title for stage in stages], summary_rows(stages))
    return (
        f'<h1>{html.escape(name)}: {len(stages)} runs</h1><p class="lead">{lead}</p>{note}'
        f'<section id="headline"><div class="grid-wide">{figure("Stages", table(*overview(stages)), text)}</div>'
        f'<div class="grid-cards">{charts}</div>'
        f'<details class="card"><summary>All numbers of the stages</summary>{numbers}</details></section>'
    )


def _pairs(stages: Sequence[Stage], name: str, pairs: Sequence[tuple[Score, Score]]) -> str:
    """A chart of an accuracy before and after each stage that has it."""
    rows = [
        (stage.title, _percent(before), _percent(after))
        for stage, (before, after) in zip(stages, pairs, strict=True)
        if after
    ]
    key = [Line("before", "slate", []), Line("after", "green", [])]
    text = "Share of held-out problems answered correctly before and after each stage; bars are one standard error."
    return figure(f"Before and after: {name}", pairs_chart(rows, unit="% of problems", low=0, high=100), text, key)


def _percent(value: Score) -> Score:
    return value and (100 * value[0], 100 * value[1])

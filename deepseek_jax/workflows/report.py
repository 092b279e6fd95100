"""The report of a run: `report.html`, one file that needs nothing else; its numbers in the terminal."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.files import read_json_object, write_whole
from deepseek_jax.workflows.report_cards import change, figure, panels, section, table
from deepseek_jax.workflows.report_data import Stage, read_stages
from deepseek_jax.workflows.report_figures import Line, line_chart
from deepseek_jax.workflows.report_reinforcement import reinforcement
from deepseek_jax.workflows.report_samples import sample_pairs
from deepseek_jax.workflows.report_summary import (
    accuracy_after,
    accuracy_before,
    show_accuracy,
    show_percent,
    summary_rows,
)
from deepseek_jax.workflows.report_training import experts, losses


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/report.html` from what a demo's stages, or the one whose folder it is, have logged so far.

    Returns its path. A demo's stages that have not run yet are named as such. ValueError names a file and line that is
    no JSON.
    """
    run_dir = Path(run_dir)
    stages = read_stages(run_dir)
    name = run_dir.resolve().name
    if len(stages) > 1:
        title, sections = f"{name}: DeepSeek in miniature", _demo_sections(stages)
        configurations = {"Corpus": read_json_object(run_dir / "corpus" / "meta.json")}
    else:
        title, sections = f"{name}: {stages[0].title}", _own_sections(stages[0], name)
        configurations = {}
    sections.append(_configuration(configurations | {stage.title: stage.config for stage in stages}))
    return write_page(run_dir / "report.html", title, sections)


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """One HTML file of these sections; a reader sees the old one or the new one."""
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(title=html.escape(title), body="\n".join(sections))
    write_whole(path, page)
    return path


def print_summary(run_dir: str | os.PathLike[str], console: Console) -> None:
    """Print the report's headline numbers as a table."""
    stages = read_stages(Path(run_dir))
    table = Table("", title="Summary")
    for stage in stages:
        table.add_column(Text(stage.title), justify="right")
    for label, cells in summary_rows(stages):
        table.add_row(*map(Text, (label, *cells)))
    console.print(table)


# The sections of the page.


def _demo_sections(stages: Sequence[Stage]) -> list[str]:
    return [_headline(stages), losses(stages), experts(stages), reinforcement(stages[-1]), sample_pairs(stages)]


def _own_sections(stage: Stage, name: str) -> list[str]:
    """Those that the stage has something for."""
    sections = [_own_headline(stage, name)]
    if stage.name != "grpo" or stage.evaluations():
        sections.append(losses([stage]))
    if stage.name == "grpo":
        sections.append(reinforcement(stage))
    if stage.loads() is not None:
        sections.append(experts([stage]))
    if stage.samples:
        sections.append(sample_pairs([stage]))
    return sections


def _own_headline(stage: Stage, name: str) -> str:
    key, what = ("reward", "The mean reward") if stage.logs("reward") else ("loss", "The loss")
    went = change(stage, key).strip(" ()").replace("→", "to <b>", 1)
    lead = f"{what} went from {went}</b>." if went else f"{what} has no change to show yet."
    waiting = "" if stage.result else f"<p><b>The run is not complete: {html.escape(stage.status)}.</b></p>"
    numbers = figure("Summary", table([stage.title], summary_rows([stage])), "± is one standard error.")
    return (
        f'<h1>{html.escape(name)}: {html.escape(stage.title)}</h1><p class="lead">{lead}</p>{waiting}'
        f'<section id="headline" class="top">{numbers}<div>{_accuracy([stage])}{_by_kind([stage])}</div></section>'
    )


def _headline(stages: Sequence[Stage]) -> str:
    changes = []
    for mode in ("sampled", "greedy"):
        before, after = accuracy_before(stages, len(stages) - 1, mode), accuracy_after(stages[-1], mode)
        if before and after:
            changes.append(f"from {show_accuracy(before)} to <b>{show_accuracy(after)}</b> ({mode})")
    if changes:
        changed = " and ".join(changes).replace("± ", "±&nbsp;")
        lead = f"Reinforcement learning took accuracy on held-out problems {changed}."
    else:
        lead = "Reinforcement learning has no accuracy to show yet."
    waiting = "; ".join(f"{stage.title} is {stage.status}" for stage in stages if not stage.result)
    note = f"<p><b>The run is not complete: {html.escape(waiting)}.</b></p>" if waiting else ""
    numbers = figure(
        "Summary",
        table([stage.title for stage in stages], summary_rows(stages)),
        "± is one standard error. Accuracy before a stage is measured at its step 0 or, where that was not "
        "done, taken from the end of the stage before it.",
    )
    return (
        f'<h1>DeepSeek in miniature: from text to reasoning</h1><p class="lead">{lead}</p>{note}'
        f'<section id="headline" class="top">{numbers}<div>{_accuracy(stages)}{_by_kind(stages)}</div></section>'
    )


def _accuracy(stages: Sequence[Stage]) -> str:
    if not any(stage.logs("eval/accuracy_sampled", "eval/accuracy_greedy") for stage in stages):
        return ""
    lines = [
        Line(mode, colour, [stage.points(f"eval/accuracy_{mode}", 100) for stage in stages])
        for mode, colour in (("sampled", "green"), ("greedy", "purple"))
    ]
    text = "Share of held-out problems answered correctly, during each stage; bars are one standard error."
    chart = line_chart(panels(stages), lines, unit="% of problems", low=0, high=100)
    return figure("Held-out accuracy", chart, text, lines)


def _by_kind(stages: Sequence[Stage]) -> str:
    scores = [
        (f"{stage.title}, {mode}", {kind: modes.get(mode) for kind, modes in stage.result["by_kind"].items()})
        for stage in stages
        if "by_kind" in stage.result
        for mode in ("sampled", "greedy")
    ]
    kinds = list(dict.fromkeys(kind for _, score in scores for kind in score))
    rows = [(label, [show_percent(score.get(kind)) for kind in kinds]) for label, score in scores]
    text = "Held-out accuracy after a stage, split by the kind of problem."
    return figure("Accuracy by kind of problem", table(kinds, rows), text) if rows else ""


def _configuration(blocks: Mapping[str, dict[str, Any]]) -> str:
    shown = "".join(
        f'<details class="card"><summary>{name}</summary><pre>'
        f"{html.escape(json.dumps(values, indent=2, ensure_ascii=False))}</pre></details>"
        if values
        else f'<p class="none">{name}: not written yet.</p>'
        for name, values in blocks.items()
    )
    intro = "What each part was run with, as it was written to the run's folder."
    return section("configuration", "Configuration", intro) + shown

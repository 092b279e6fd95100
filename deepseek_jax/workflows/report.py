"""The report of a run: `report.html`, one file that needs nothing else; its numbers in the terminal."""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.files import read_json_object, write_whole
from deepseek_jax.workflows.report_data import (
    Stage,
    accuracy_after,
    accuracy_before,
    read_stages,
    show_accuracy,
    show_percent,
    summary_rows,
)
from deepseek_jax.workflows.report_figures import Line, figure, line_chart, table
from deepseek_jax.workflows.report_training import change, experts, losses, panels, reinforcement, section

SHOWN_SAMPLES = 6  # of a stage's pairs, the first in its file
MARKS = {
    True: '<span class="right">✓ right</span>',
    False: '<span class="wrong">✗ wrong</span>',
    None: "",  # a completion that nothing checks
}


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
    return [_headline(stages), losses(stages), experts(stages), reinforcement(stages[-1]), _samples(stages)]


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
        sections.append(_samples([stage]))
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


def _samples(stages: Sequence[Stage]) -> str:
    blocks = []
    for earlier, stage in reversed([*zip([None, *stages], stages, strict=False)]):
        pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for sample in stage.samples:
            pairs.setdefault((sample["prompt"], sample["mode"]), {}).setdefault(sample["when"], sample)
        for sample in earlier.samples if earlier else ():  # what it ended with is what this one began with
            if sample["when"] == "after" and (pair := pairs.get((sample["prompt"], sample["mode"]))):
                pair.setdefault("before", sample)
        if pairs:
            shown = "".join(_pair(*key, pair) for key, pair in list(pairs.items())[:SHOWN_SAMPLES])
            count = f"the first {min(SHOWN_SAMPLES, len(pairs))} of {len(pairs)} recorded, not selected"
            opened = "" if blocks else " open"  # the last stage's are what a reader wants to see
            head = f"<summary>{stage.title}: {count}</summary>"
            blocks.append(f'<details class="card"{opened}>{head}{shown}</details>')
    intro = "A prompt's completion before and after a stage. Thinking is dimmed; ✓ and ✗ mark right and wrong."
    missing = '<p class="none">No samples recorded yet.</p>'
    return section("samples", "Sample completions", intro) + ("".join(blocks) or missing)


def _pair(prompt: str, mode: str, pair: dict[str, dict[str, Any]]) -> str:
    cells = []
    for when in ("before", "after"):
        sample = pair.get(when)
        if sample is None:
            cells.append(f'<div><span class="muted">{when}: not recorded</span></div>')
            continue
        text = html.escape(sample["completion"])
        text = re.sub(r"&lt;think&gt;.*?(&lt;/think&gt;|$)", r'<span class="think">\g<0></span>', text, flags=re.S)
        head = f'<span class="muted">{when}</span> {MARKS[sample["correct"]]}'
        cells.append(f"<div>{head}<pre>{text}</pre></div>")
    answer = next(iter(pair.values()))["answer"]
    note = mode if answer is None else f"{mode}, right answer {answer}"
    note = f' <span class="muted">({html.escape(note)})</span>'
    return f'<div class="pair"><div class="prompt">{html.escape(prompt)}{note}</div>{"".join(cells)}</div>'


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

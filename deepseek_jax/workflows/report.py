"""The report of a run: `report.html`, one file that needs nothing else; its numbers in the terminal."""

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.files import read_json_object, write_whole
from deepseek_jax.workflows.report_asked import asked
from deepseek_jax.workflows.report_cards import section
from deepseek_jax.workflows.report_completions import SCRIPT, completions
from deepseek_jax.workflows.report_data import Stage, layout, read_stages
from deepseek_jax.workflows.report_headline import demo_headline, own_headline
from deepseek_jax.workflows.report_reinforcement import reinforcement
from deepseek_jax.workflows.report_samples import sample_pairs
from deepseek_jax.workflows.report_scaling import scaling
from deepseek_jax.workflows.report_series import overview, series_headline
from deepseek_jax.workflows.report_summary import summary_rows
from deepseek_jax.workflows.report_training import experts, losses, others


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/report.html` from what has been logged so far: by the stage whose folder it is, a demo's stages or
    the runs in its sub-folders.

    Returns its path. Stages that have not run yet are named as such. ValueError names a file and line that is no JSON.
    """
    run_dir = Path(run_dir)
    found, stages = layout(run_dir), read_stages(run_dir)
    name = run_dir.resolve().name
    configurations = {stage.title: stage.config for stage in stages}
    if found == "demo":
        title, sections = f"{name}: DeepSeek in miniature", _demo_sections(stages)
        configurations = {"Corpus": read_json_object(run_dir / "corpus" / "meta.json")} | configurations
    elif found == "series":
        title, sections = f"{name}: {len(stages)} runs", _series_sections(stages, name)
    else:
        title, sections = f"{name}: {stages[0].title}", _own_sections(stages[0], name)
    sections += [scaling(stages), completions(stages), _configuration(configurations)]
    return write_page(run_dir / "report.html", title, [part for part in sections if part])


def write_page(path: Path, title: str, sections: Sequence[str]) -> Path:
    """One HTML file of these sections; a reader sees the old one or the new one.

    The page's policy lets nothing run but `SCRIPT`, which is there where a table of completions needs it."""
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    policy = script = ""
    if any(part.startswith('<section id="completions"') for part in sections):
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy, script = f"; script-src 'sha256-{digest}'", f"<script>{SCRIPT}</script>"
    page = template.substitute(title=html.escape(title), body="\n".join(sections), policy=policy, script=script)
    write_whole(path, page)
    return path


def print_summary(run_dir: str | os.PathLike[str], console: Console) -> None:
    """Print the report's headline numbers as a table."""
    stages = read_stages(Path(run_dir))
    if layout(Path(run_dir)) == "series":
        heads, rows = overview(stages)
    else:
        heads, rows = [stage.title for stage in stages], summary_rows(stages)
    table = Table("", title="Summary")
    for head in heads:
        table.add_column(Text(head), justify="right")
    for label, cells in rows:
        table.add_row(*map(Text, (label, *cells)))
    console.print(table)


# The sections of the page.


def _demo_sections(stages: Sequence[Stage]) -> list[str]:
    return [
        demo_headline(stages),
        losses(stages),
        experts(stages),
        reinforcement(stages[-1]),
        others(stages),
        sample_pairs(stages),
    ]


def _own_sections(stage: Stage, name: str) -> list[str]:
    return [own_headline(stage, name), *_parts(stage), sample_pairs([stage]) if stage.samples else ""]


def _series_sections(stages: Sequence[Stage], name: str) -> list[str]:
    return [series_headline(stages, name), *_folded(stages), sample_pairs(stages)]


def _parts(stage: Stage) -> list[str]:
    """What a stage has logged, as far as there are charts for it."""
    parts = [asked(stage)]
    if stage.logs("ce", "loss") and not stage.reinforced or stage.evaluations():
        parts.append(losses([stage]))
    if stage.reinforced:
        parts.append(reinforcement(stage))
    if stage.loads() is not None:
        parts.append(experts([stage]))
    return [*parts, others([stage])]


def _folded(stages: Sequence[Stage]) -> Iterable[str]:
    """The charts of each stage, to be opened."""
    for stage in stages:
        if parts := [part for part in _parts(stage) if part]:
            own = html.escape(stage.folder.name).replace(" ", "-")
            charts = "".join(part.replace('<section id="', f'<section id="{own}-', 1) for part in parts)
            yield f'<details class="stage"><summary>{html.escape(stage.title)}</summary>{charts}</details>'


def _configuration(blocks: Mapping[str, dict[str, Any]]) -> str:
    shown = "".join(
        f'<details class="card"><summary>{html.escape(name)}</summary><pre>'
        f"{html.escape(json.dumps(values, indent=2, ensure_ascii=False))}</pre></details>"
        if values
        else f'<p class="none">{html.escape(name)}: not written yet.</p>'
        for name, values in blocks.items()
    )
    intro = "What each part was run with, as it was written to the run's folder."
    return section("configuration", "Configuration", intro) + shown

"""The report of a demo run: `report.html`, one file that needs nothing else; its numbers in the terminal."""

import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek_jax.workflows.report_data import (
    Stage,
    accuracy_after,
    accuracy_before,
    read_json,
    read_stages,
    show_accuracy,
    show_percent,
    summary_rows,
)
from deepseek_jax.workflows.report_figures import Line, Panel, figure, heat_map, line_chart, number, table

SHOWN_SAMPLES = 6  # of a stage's pairs, the first in its file
MARKS = {
    True: '<span class="right">✓ right</span>',
    False: '<span class="wrong">✗ wrong</span>',
    None: "",  # a completion that nothing checks
}
HEAT_COLUMNS = 40  # of a stage in the map of expert loads


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/report.html` from what the stages have logged so far, and return its path.

    Stages that have not run yet are named as such. ValueError names a file and line that is no JSON.
    """
    run_dir = Path(run_dir)
    stages = read_stages(run_dir)
    sections = (_headline(stages), _losses(stages), _experts(stages), _reinforcement(stages[-1]))
    body = "\n".join((*sections, _samples(stages), _configuration(run_dir, stages)))
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(title=html.escape(f"{run_dir.resolve().name}: DeepSeek in miniature"), body=body)
    path, partial = run_dir / "report.html", run_dir / "report.html.partial"
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(path)
    return path


def print_summary(run_dir: str | os.PathLike[str], console: Console) -> None:
    """Print the report's headline numbers as a table."""
    stages = read_stages(Path(run_dir))
    table = Table("", *(stage.title for stage in stages), title="Summary")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cells in summary_rows(stages):
        table.add_row(label, *cells)
    console.print(table)


# The sections of the page.


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
    lines = [
        Line(mode, colour, [stage.points(f"eval/accuracy_{mode}", 100) for stage in stages])
        for mode, colour in (("sampled", "green"), ("greedy", "purple"))
    ]
    text = "Share of held-out problems answered correctly, during each stage; bars are one standard error."
    chart = line_chart(_panels(stages), lines, unit="% of problems", low=0, high=100)
    measured = any("eval/accuracy_sampled" in line or "eval/accuracy_greedy" in line for line in _all_metrics(stages))
    accuracy = figure("Held-out accuracy", chart, text, lines) if measured else ""
    numbers = figure(
        "Summary",
        table([stage.title for stage in stages], summary_rows(stages)),
        "± is one standard error. Accuracy before a stage is measured at its step 0 or, where that was not "
        "done, taken from the end of the stage before it.",
    )
    return (
        f'<h1>DeepSeek in miniature: from text to reasoning</h1><p class="lead">{lead}</p>{note}'
        f'<section id="headline" class="top">{numbers}<div>{accuracy}{_by_kind(stages)}</div></section>'
    )


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


def _all_metrics(stages: Sequence[Stage]) -> list[dict]:
    return [line for stage in stages for line in stage.metrics]


def _losses(stages: Sequence[Stage]) -> str:
    charts = []
    for stage in stages[:2]:
        lines = [
            Line("next token", "blue", [stage.points("ce")]),
            Line("MTP", "orange", [stage.points("mtp")]),
        ]
        text = (
            f"Cross-entropy of the next token{_change(stage, 'ce')} and, by the MTP module, of the one after "
            f"it{_change(stage, 'mtp')}."
        )
        chart = line_chart(_panels([stage]), lines, unit="nats per token")
        charts.append(figure(f"Loss, {stage.title}", chart, text, lines))
    change = _change(stages[0], "eval/bits_per_byte")
    bits = [Line("bits per byte", "blue", [stages[0].points("eval/bits_per_byte")])]
    chart = line_chart(_panels(stages[:1]), bits, unit="bits per byte")
    text = f"Bits that the model needs per byte of text from files kept out of training{change}."
    charts.append(figure(f"Held-out text, {stages[0].title}", chart, text))
    return _section("losses", "Losses", "Bold lines are moving averages of the faint ones.", charts)


def _experts(stages: Sequence[Stage]) -> str:
    def chart(title: str, unit: str, key: str, text: str) -> str:
        lines = [Line(title, "slate", [stage.points(key) for stage in stages])]
        return figure(title, line_chart(_panels(stages), lines, unit=unit, low=0), text)

    vio = "How far the busiest expert is above the mean load (0: even, 1: double), mean over the MoE layers."
    loss = "The sequence-wise balance loss, which grows when a sequence leans on few experts."
    bias = "Range of the bias that is added to the router's scores to even out the load without a loss."
    balance = [
        chart("MaxVio", "largest load / mean load - 1", "max_vio", vio),
        chart("Balance loss", "loss", "balance", loss),
        chart("Router bias", "largest bias - smallest bias", "bias_range", bias),
    ]
    loads: list[str] = []
    kinds: list[str] = []
    loaded = [(stage, shares) for stage in stages if (shares := stage.loads()) is not None]
    by_kind = next((stage for stage in reversed(stages) if stage.experts), None)
    missing = ""
    if loaded:
        shared = min(shares.shape[1] for _, shares in loaded)  # a stage that trains MTP logs its router as well
        loads = [_load_map(loaded, layer) for layer in range(shared)]
    else:
        missing += '<p class="none">Load of each expert: not measured yet.</p>'
    if by_kind:
        kinds = [_kind_map(by_kind, layer) for layer in range(by_kind.experts["layers"])]
    else:
        missing += '<p class="none">Experts by kind of token: not measured yet.</p>'
    intro = (
        "Each token goes to a few of a layer's routed experts. The fair share of an expert is 1 / (number of "
        "experts): in the maps, a colourless cell has just that, a blue one less and an orange one more."
    )
    return _section("experts", "Experts", intro, balance, loads, kinds) + missing


def _load_map(loaded: Sequence[tuple[Stage, np.ndarray]], layer: int) -> str:
    columns = []
    for _, loads in loaded:
        load_NE = loads[:, layer]
        edges = np.linspace(0, len(load_NE), HEAT_COLUMNS + 1)
        spans = [(int(a), max(int(a) + 1, int(b))) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        columns += [load_NE[a:b].mean(axis=0) for a, b in spans]
    ratio_EC = np.stack(columns, axis=1) * len(columns[0])
    chart = heat_map(ratio_EC, _panels([stage for stage, _ in loaded]), limit=2)
    text = f"Share of the tokens that each expert of MoE layer {layer + 1} gets, as training goes on."
    return figure(f"Load, MoE layer {layer + 1}", chart, text, scale=("≤ ½", "≥ 2× fair share"))


def _kind_map(stage: Stage, layer: int) -> str:
    share_KE = np.array(stage.experts["share"], np.float64)[:, layer]
    met = share_KE.sum(axis=1) > 0  # a kind that a stage never saw has no shares (zeros or NaN)
    kinds = [kind for kind, seen in zip(stage.experts["kinds"], met, strict=True) if seen]
    ratio_EK = share_KE[met].T * stage.experts["experts"]
    expert, kind = (int(index) for index in np.unravel_index(ratio_EK.argmax(), ratio_EK.shape))
    chart = heat_map(ratio_EK, [Panel(name, 0) for name in kinds], limit=4, numbers=True)
    text = (
        f"How much of each kind of token the experts of MoE layer {layer + 1} take after {stage.title}, in "
        f"multiples of the fair share; the most marked is expert {expert} with {ratio_EK.max():.1f}× for "
        f"{html.escape(kinds[kind])}."
    )
    title = f"Kind of token, MoE layer {layer + 1}"
    return figure(title, chart, text, scale=("≤ ¼", "≥ 4× fair share"))


def _reinforcement(grpo: Stage) -> str:
    def chart(title: str, unit: str, text: str, key: str, *, scale=1.0, low: float | None = 0.0, high=None) -> str:
        lines = [Line(title, "slate", [grpo.points(key, scale)])]
        picture = line_chart(_panels([grpo]), lines, unit=unit, low=low, high=high)
        return figure(title, picture, f"{text}{_change(grpo, key, scale)}.")

    rewards = [
        Line("accuracy", "green", [grpo.points("reward_accuracy")]),
        Line("format", "gold", [grpo.points("reward_format")]),
    ]
    reward = (
        f"Mean reward of the answers sampled in a step: for being right{_change(grpo, 'reward_accuracy')}, "
        f"for keeping the format{_change(grpo, 'reward_format')}."
    )
    signal = "Share of the groups whose answers differ in reward; the others teach nothing"
    entropy = "Mean entropy of the next token's distribution: how much the model still explores"
    sampler = "Distance of the sampler's probabilities from the learner's; above 1e-6 in float32 it is a bug"
    reference = "How far the model has moved from the reference; 0 when there is none"
    nats = "nats per token"
    charts = [
        figure("Reward", line_chart(_panels([grpo]), rewards, unit="mean reward", low=0), reward, rewards),
        chart("Response length", "tokens", "Mean length of an answer, thinking included", "response_length"),
        chart("Groups with signal", "% of groups", signal, "signal_groups", scale=100.0, high=100.0),
        chart("Entropy", nats, entropy, "entropy"),
        chart("Sampler-to-learner KL", nats, sampler, "kl_sampler", low=None),
        chart("Reference KL", nats, reference, "kl_reference", low=None),
    ]
    intro = (
        "The model answers each problem several times, rules score the answers, and those better than their "
        f"group's mean become likelier. {grpo.title} is {grpo.status}."
    )
    return _section("reward", "Reinforcement learning", intro, charts)


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
    return _section("samples", "Sample completions", intro) + ("".join(blocks) or missing)


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


def _configuration(run_dir: Path, stages: Sequence[Stage]) -> str:
    blocks = {"Corpus": read_json(run_dir / "corpus" / "meta.json")} | {s.title: s.config for s in stages}
    shown = "".join(
        f'<details class="card"><summary>{name}</summary><pre>'
        f"{html.escape(json.dumps(values, indent=2, ensure_ascii=False))}</pre></details>"
        if values
        else f'<p class="none">{name}: not written yet.</p>'
        for name, values in blocks.items()
    )
    intro = "What each part was run with, as it was written to the run's folder."
    return _section("configuration", "Configuration", intro) + shown


# Pieces.


def _section(name: str, title: str, intro: str, *grids: Sequence[str]) -> str:
    cards = "".join(f'<div class="grid-cards">{"".join(figures)}</div>' for figures in grids if figures)
    return f'<section id="{name}"><h2>{title}</h2><p>{intro}</p>{cards}</section>'


def _panels(stages: Sequence[Stage]) -> list[Panel]:
    return [Panel(stage.title, stage.last_step) for stage in stages]


def _change(stage: Stage, key: str, scale: float = 1.0) -> str:
    """ " (6.2 → 2.1)": means over the first and last twentieth of the logged values."""
    values = stage.points(key, scale)[:, 1]
    if len(values) < 2:
        return ""
    part = max(1, len(values) // 20)
    first, last = (number(float(f"{values[span].mean():.3g}")) for span in (slice(part), slice(-part, None)))
    return f" ({first} → {last})"

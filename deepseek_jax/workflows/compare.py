"""Several runs side by side: a table in the terminal, and one HTML file with their curves."""

import dataclasses
import html
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.train.resume import flat
from deepseek_jax.workflows.report import write_page
from deepseek_jax.workflows.report_cards import figure, section, table
from deepseek_jax.workflows.report_data import Stage, layout, read_stages
from deepseek_jax.workflows.report_figures import Line, Panel, line_chart
from deepseek_jax.workflows.report_summary import NOTHING, summary_rows
from deepseek_jax.workflows.report_training import HELD_OUT

COLOURS = ("blue", "orange", "green", "purple", "gold", "slate")
MOST = 2 * len(COLOURS)  # each of them solid and dashed
_PLACES = ("run_dir", "log_to", "quiet")  # differ without a difference
_OWN = "settings that not all stages have"


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Stage]:
    """The stage that each folder holds, by the shortest end of its path that tells it from the others.

    ValueError for fewer than two or more than ``MOST``, for a folder given twice and for one that holds several.
    """
    folders = [Path(path).resolve() for path in paths]
    if not 2 <= len(set(folders)) == len(folders) <= MOST:
        raise ValueError(
            f"{len(folders)} runs, {len(set(folders))} of them different: expected 2 to {MOST}, none twice"
        )
    runs = []
    for path, folder in zip(paths, folders, strict=True):
        stages = read_stages(Path(path))
        if layout(Path(path)) != "stage":
            begun = [str(stage.folder) for stage in stages if stage.metrics]
            raise ValueError(f"{path} holds several runs: name one, of {', '.join(begun) or 'those that have begun'}")
        depth = next(
            count
            for count in itertools.count(1)
            if [f.parts[-count:] for f in folders].count(folder.parts[-count:]) == 1
        )
        runs.append(dataclasses.replace(stages[0], title="/".join(folder.parts[-depth:])))
    return runs


def different_settings(runs: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of those that are not the same in all; the recipe's, and the stage.

    Of different stages, what one of them does not have is counted in a last row.
    """
    trees = [{"stage": run.name} | dict(flat(run.config.get("recipe", {}))) for run in runs]
    names = dict.fromkeys(name for tree in trees for name in tree if name not in _PLACES)
    several = len({run.name for run in runs}) > 1
    own = [name for name in names if several and any(name not in tree for tree in trees)]
    rows = [(name, [str(tree.get(name, NOTHING)) for tree in trees]) for name in names if name not in own]
    counted = [(_OWN, [str(sum(name in tree for name in own)) for tree in trees])] if own else []
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1] + counted


def print_comparison(runs: Sequence[Stage], console: Console) -> None:
    """Print the numbers of the runs, and the settings in which they differ, as a table."""
    shown = Table("")
    for run in runs:
        shown.add_column(Text(run.title), justify="right", overflow="fold")
    for label, cells in summary_rows(runs):
        shown.add_row(*map(Text, (label, *cells)))
    shown.add_section()
    for label, cells in different_settings(runs):
        shown.add_row(*map(Text, (label, *cells)))
    console.print(shown)


def write_comparison(runs: Sequence[Stage], path: str | os.PathLike[str]) -> Path:
    """Write the same and the curves over tokens and over time to an HTML file that needs nothing else."""
    names = [run.title for run in runs]
    settings = different_settings(runs)
    differ = table(names, settings) if settings else '<p class="none">They were run with the same settings.</p>'
    numbers = table(names, summary_rows(runs))
    tables = [
        figure("Numbers", numbers, "± is one standard error; times are of training, without pauses."),
        figure("Settings that differ", differ, "Of the recipes, as they stood when the runs last began or went on."),
    ]
    title = f"{len(runs)} runs side by side"
    head = (
        f'<h1>{html.escape(title)}</h1><section id="numbers"><div class="grid-wide">{"".join(tables)}</div></section>'
    )
    intro = "Bold lines are moving averages of the faint ones."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_page(Path(path), title, [head, section("curves", "Curves", intro, _charts(runs))])


def _charts(runs: Sequence[Stage]) -> list[str]:
    about = ("reward", "Reward", "mean reward"), ("ce", "Loss of the next token", "nats per token")
    key, title, unit = about[0] if any(run.logs("reward") for run in runs) else about[1]
    charts = [_chart(runs, key, title, unit, over) for over in ("tokens_seen", "seconds")]
    for name in dict.fromkeys(name for run in runs for name in run.rewards()):
        charts.append(_chart(runs, f"reward_{name}", f"Reward for {name}", "mean reward", "tokens_seen"))
    evaluations = dict.fromkeys(key for run in runs for key in run.evaluations())
    for mode in ("greedy", "sampled"):
        if any(run.logs(f"eval/accuracy_{mode}") for run in runs):
            evaluations[f"eval/accuracy_{mode}"] = None
    for key in evaluations:
        said = key.removeprefix("eval/").replace("_", " ")
        title, unit, _ = HELD_OUT.get(key, (said.capitalize(), said, ""))
        charts.append(_chart(runs, key, title, unit, "tokens_seen"))
    for key, title, unit in (
        ("response_length", "Response length", "tokens of an answer"),
        ("response_waits", "Words of reflection", "words in an answer"),
        ("signal_groups", "Groups with signal", "share of the groups"),
        ("entropy", "Entropy", "nats per token"),
        ("kl_reference", "Reference KL", "nats per token"),
        ("samples_per_second", "Answers per second", "answers per second"),
        ("max_vio", "MaxVio", "largest load / mean load - 1"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("grad_norm", "Gradient norm", "norm before clipping"),
    ):
        if any(run.logs(key) for run in runs):
            charts.append(_chart(runs, key, title, unit, "tokens_seen"))
    return charts


def _chart(runs: Sequence[Stage], key: str, title: str, unit: str, over: str) -> str:
    """A line a run, over tokens or seconds in a unit that keeps their numbers short."""
    points = [run.points(key, over=over) for run in runs]
    if over == "seconds":
        points = [own - (own[0, 0], 0.0, 0.0) if len(own) else own for own in points]
    most = max((float(own[:, 0].max()) for own in points if len(own)), default=0.0)
    scale, axis = _time(most) if over == "seconds" else _tokens(most)
    looks = zip(itertools.cycle(COLOURS), [False] * len(COLOURS) + [True] * len(COLOURS), strict=False)
    lines = [
        Line(run.title, colour, [own / (scale, 1.0, 1.0)], dashed=dashed)
        for run, own, (colour, dashed) in zip(runs, points, looks, strict=False)
    ]
    picture = line_chart([Panel("", most / scale, axis)], lines, unit=unit)
    title += " over time" if over == "seconds" else " over tokens"
    text = "Time counts from a run's first line of metrics: compiling is no part of it." if over == "seconds" else ""
    return figure(title, picture, text, lines)


def _tokens(most: float) -> tuple[float, str]:
    power = max(0, min(3, int(math.log10(max(most, 1.0)) // 3)))
    return 1000.0**power, ("tokens", "thousand tokens", "million tokens", "billion tokens")[power]


def _time(most: float) -> tuple[float, str]:
    return (1.0, "seconds") if most < 300 else (60.0, "minutes") if most < 3 * 3600 else (3600.0, "hours")

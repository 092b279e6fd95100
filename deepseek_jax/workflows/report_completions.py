"""The report's table of completions: what was asked, said and earned, to be searched and sorted in the page."""

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.files import each_json_line
from deepseek_jax.workflows.report_cards import section
from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import number
from deepseek_jax.workflows.report_summary import NOTHING

SCRIPT = (Path(__file__).parent / "report_table.js").read_text(encoding="utf-8")
CHARACTERS = 2400  # of a text: of a longer one the beginning and the end
ANSWERS = 240  # shown of all that a stage asked for, but 12 of each file at least
ORDERS = {
    "index": "as they came",
    "-tokens": "longest first",
    "-reward": "highest reward first",
    "reward": "lowest reward first",
    "-advantage": "largest advantage first",
    "advantage": "smallest advantage first",
}
HEADS = ("when", "prompt", "completion", "right answer", "reward", "advantage", "tokens")


def completions(stages: Sequence[Stage]) -> str:
    """The section, "" where nothing was written down. It needs `SCRIPT` in the page to be searched."""
    rows, total = list[dict[str, Any]](), 0
    for stage in stages:
        for count, shown in (_rollouts(stage), _samples(stage), *_answers(stage)):
            rows, total = rows + shown, total + count
    if not rows:
        return ""
    body = "".join(_row(index, row) for index, row in enumerate(rows))
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    options = "".join(f'<option value="{value}">{said}</option>' for value, said in ORDERS.items())
    some = (
        f"{len(rows):,} of {total:,} that were written down, chosen evenly over the run and not by what they earned, "
        f"with the longest; {total - len(rows):,} are left out. "
    )
    intro = (some if total > len(rows) else "") + (
        "What is searched for may stand anywhere in a row: words of a prompt, a step, a reward's name, cut off."
    )
    form = (
        '<form hidden><input type="search" placeholder="search" aria-label="search completions"> '
        f'<select aria-label="order">{options}</select> <output></output></form>'
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    box = f'<div class="card completions">{form}<div class="scroll">{table}</div></div>'
    return section("completions", "Completions", intro) + box


def _rollouts(stage: Stage) -> tuple[int, list[dict[str, Any]]]:
    shown = [line | {"when": f"{stage.title}, step {line['step']}"} for line in stage.rollouts.shown]
    return stage.rollouts.count, shown


def _samples(stage: Stage) -> tuple[int, list[dict[str, Any]]]:
    """Answers to held-out problems; whether one is right stands as its reward."""
    rows = [
        line | {"when": f"{stage.title}, {line['when']}, {line['mode']}", "rewards": _right(line)}
        for line in stage.samples
    ]
    return len(rows), rows


def _answers(stage: Stage) -> Iterable[tuple[int, list[dict[str, Any]]]]:
    """What stages wrote that do nothing but ask: each file of answers."""
    if stage.name not in ("eval", "evaluation", "rejection"):
        return
    files = [*sorted(stage.folder.glob("*.jsonl")), *sorted(stage.folder.glob("*/*.jsonl"))]
    for path in files:
        when = f"{stage.title}, {path.relative_to(stage.folder).with_suffix('')}"
        count = sum("completion" in line for line in each_json_line(path))
        stride = math.ceil(count / max(12, ANSWERS // len(files))) or 1
        lines = (line for line in each_json_line(path) if "completion" in line)
        shown = itertools.islice(lines, None, None, stride)
        yield count, [line | {"when": when, "rewards": _right(line)} for line in shown]


def _right(line: Mapping[str, Any]) -> dict[str, Any]:
    correct = line.get("correct")
    return {} if correct is None else {"right": float(correct)}


def _row(index: int, row: Mapping[str, Any]) -> str:
    rewards = row.get("rewards") or {}
    reward = row.get("reward", next(iter(rewards.values()), None))
    facts = {"index": index, "tokens": row.get("tokens"), "reward": reward, "advantage": row.get("advantage")}
    facts = {name: value for name, value in facts.items() if _is_number(value)}
    data = "".join(f' data-{name}="{value}"' for name, value in facts.items())
    total = f"<b>{_number(row['reward'])}</b>" if _is_number(row.get("reward")) else ""
    earned = total + "".join(f"<div>{html.escape(f'{name} {_number(value)}')}</div>" for name, value in rewards.items())
    cut = "" if row.get("ended", True) else ' <span class="wrong">cut off</span>'
    answer = row.get("answer")
    cells = (
        html.escape(str(row["when"])),
        f"<pre>{_text(row.get('prompt'))}</pre>",
        f"<pre>{_text(row.get('completion'))}</pre>{cut}",
        f"<pre>{NOTHING if answer is None else _text(answer)}</pre>",
        earned or NOTHING,
        _number(row.get("advantage")),
        _number(row.get("tokens")),
    )
    body = "".join(f'<td data-label="{head}">{cell}</td>' for head, cell in zip(HEADS, cells, strict=True))
    return f"<tr{data}>{body}</tr>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> str:
    return number(value) if _is_number(value) else NOTHING


def _text(value: Any) -> str:
    """Escaped, and shortened in its middle."""
    text = str(value)
    if (left := len(text) - CHARACTERS) > 0:
        half = CHARACTERS // 2
        return f"{html.escape(text[:half])}<i>… {left:,} characters left out …</i>{html.escape(text[-half:])}"
    return html.escape(text)

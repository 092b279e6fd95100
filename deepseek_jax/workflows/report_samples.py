"""The report's section on completions before and after a stage."""

import html
import re
from collections.abc import Sequence
from typing import Any

from deepseek_jax.workflows.report_cards import section
from deepseek_jax.workflows.report_data import Stage, start_of

SHOWN_SAMPLES = 6  # of a stage's pairs, the first in its file
MARKS = {
    True: '<span class="right">✓ right</span>',
    False: '<span class="wrong">✗ wrong</span>',
    None: "",  # a completion that nothing checks
}


def sample_pairs(stages: Sequence[Stage]) -> str:
    blocks = []
    for stage in reversed(stages):
        earlier = start_of(stage, stages)
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
            head = f"<summary>{html.escape(stage.title)}: {count}</summary>"
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

"""The report's section on test-time scaling: accuracy against what an answer may cost."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.files import read_json_object
from deepseek_jax.workflows.report_cards import figure, section
from deepseek_jax.workflows.report_data import SCALING, Stage
from deepseek_jax.workflows.report_figures import Line, Panel, line_chart, number

CHARTS = (  # of a task: title, axis, meaning, and the kinds of curve in it by name
    ("Thinking budget", "tokens of thinking", "by how long a thought may get", {"budget": "budget"}),
    (
        "Several answers",
        "answers to a question",
        "by the number of answers from which the most frequent, or a reward's best, is taken",
        {"majority": "majority vote", "best_of": "best of n"},
    ),
)
COLOURS = ("blue", "purple", "green", "orange", "gold", "slate")


def scaling(stages: Sequence[Stage]) -> str:
    """Charts of what `scaling.json` holds of each stage, "" where none has one. ValueError names a file whose curves
    are of unequal length."""
    figures = []
    for stage in stages:
        path = stage.folder / SCALING
        curves = read_json_object(path).get("curves", [])
        for curve in curves:
            if len({len(curve[name]) for name in ("x", "accuracy", "stderr")}) > 1:
                raise ValueError(f"{path}: x, accuracy and stderr of {curve['task']} are not of one length")
        for task in dict.fromkeys(curve["task"] for curve in curves):
            own = [curve for curve in curves if curve["task"] == task]
            name = f"{task}, {stage.title}" if len(stages) > 1 else str(task)
            figures += [chart for about in CHARTS if (chart := _chart(name, own, *about))]
    intro = "What more thinking and more answers buy, on a logarithmic axis; bars are one standard error."
    return section("scaling", "Test-time scaling", intro, figures) if figures else ""


def _chart(task: str, curves: Sequence[dict[str, Any]], title: str, axis: str, text: str, kinds: dict) -> str:
    curves = [curve for curve in curves if curve["kind"] in kinds and any(x > 0 for x in curve["x"])]
    if not curves:
        return ""
    places = sorted({x for curve in curves for x in curve["x"] if x > 0})
    first, last = math.log2(places[0]), math.log2(places[-1])
    lines = []
    for curve, colour in zip(curves, itertools.cycle(COLOURS), strict=False):
        rows = zip(curve["x"], curve["accuracy"], curve["stderr"], strict=True)
        # A single question has no standard error: a point without a bar.
        points = [(math.log2(x) - first, 100 * y, 100 * (e or 0.0)) for x, y, e in rows if x and y is not None]
        name = ", ".join(filter(None, (kinds[curve["kind"]], curve.get("label"))))
        lines.append(Line(name, colour, [np.nan_to_num(np.array(sorted(points), np.float64).reshape(-1, 3))]))
    stride = math.ceil(len(places) / 6)
    ticks = tuple((math.log2(x) - first, number(x)) for x in places[::stride])
    panel = Panel("", max(last - first, 1e-9), axis, ticks)
    chart = line_chart([panel], lines, unit="% of problems", low=0, high=100)
    return figure(f"{title}, {task}", chart, f"Accuracy {text}.", lines)

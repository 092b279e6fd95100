"""The top of a stage's report and of a demo's: what it came to, in a sentence, numbers and accuracy."""

import html
from collections.abc import Sequence

from deepseek_jax.workflows.report_cards import change, figure, panels, table
from deepseek_jax.workflows.report_data import Stage, start_of
from deepseek_jax.workflows.report_figures import Line, line_chart
from deepseek_jax.workflows.report_summary import (
    NOTHING,
    accuracy_after,
    accuracy_before,
    came_to,
    show_accuracy,
    show_percent,
    summary_rows,
)


def own_headline(stage: Stage, name: str) -> str:
    key, what = ("reward", "The mean reward") if stage.logs("reward") else ("loss", "The loss")
    went = change(stage, key).strip(" ()").replace("→", "to <b>", 1)
    if went:
        lead = f"{what} went from {went}</b>."
    elif (number := came_to(stage.result)) != NOTHING:
        lead = f"{number[0].upper()}{number[1:]}."
    else:
        lead = f"{what} has no change to show yet." if stage.metrics or not stage.result else ""
    waiting = "" if stage.result else f"<p><b>The run is not complete: {html.escape(stage.status)}.</b></p>"
    numbers = figure("Summary", table([stage.title], summary_rows([stage])), "± is one standard error.")
    return (
        f'<h1>{html.escape(name)}: {html.escape(stage.title)}</h1><p class="lead">{lead}</p>{waiting}'
        f'<section id="headline" class="top">{numbers}<div>{_accuracy([stage])}{_by_kind([stage])}</div></section>'
    )


def demo_headline(stages: Sequence[Stage]) -> str:
    changes, last = [], stages[-1]
    for mode in ("sampled", "greedy"):
        before, after = accuracy_before(last, start_of(last, stages), mode), accuracy_after(last, mode)
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

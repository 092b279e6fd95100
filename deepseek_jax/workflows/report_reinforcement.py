"""The report's section on reinforcement learning."""

import html
import itertools
from collections.abc import Sequence

import numpy as np

from deepseek_jax.rl.words import REFLECTIVE
from deepseek_jax.workflows.report_cards import change, figure, panels, section
from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import Line, line_chart, number

PARTS = {"rollout": "blue", "reward": "gold", "train": "purple"}  # of a step's time: PART_seconds
MORE = {  # what else is drawn where it is logged: title, unit and meaning
    "value_loss": ("Value loss", "loss", "The critic's: how far its values are from what answers earn"),
    "explained_variance": (
        "Explained variance",
        "share of the variance",
        "Share of the variance of what answers earn that the critic foresees",
    ),
    "samples_per_second": (
        "Answers per second",
        "answers per second",
        "Answers of a step per second from its questions to the end of its update",
    ),
    "rollout_tokens_per_second": ("Rollout", "tokens per second", "Tokens of answers per second of sampling"),
}


def reinforcement(stage: Stage) -> str:
    nats = "nats per token"
    entropy = "Mean entropy of the next token's distribution: how much the model still explores"
    sampler = "Distance of the sampler's probabilities from the learner's"
    sampler += ", of a later policy" if stage.logs("staleness") else "; above 1e-6 in float32 it is a bug"
    reference = "How far the model has moved from the reference; 0 when there is none"
    charts = [
        _rewards(stage),
        _lengths(stage),
        _signal(stage),
        _chart(stage, "Entropy", nats, entropy, "entropy"),
        _chart(stage, "Sampler-to-learner KL", nats, sampler, "kl_sampler", low=None),
    ]
    if not stage.metrics or stage.logs("kl_reference"):
        charts.append(_chart(stage, "Reference KL", nats, reference, "kl_reference", low=None))
    charts += [_reflection(stage), _clipped(stage), _cut_off(stage), _time(stage)]
    charts += [
        _chart(stage, title, unit, text, key, low=_least(stage, key))
        for key, (title, unit, text) in MORE.items()
        if stage.logs(key)
    ]
    intro = (
        "The model answers each problem several times, rules score the answers, and those better than their "
        f"group's mean become likelier. {html.escape(stage.title)} is {stage.status}."
    )
    if stage.logs("clip_fraction") and not stage.points("clip_fraction")[:, 1].any():
        intro += " No token was clipped, as where each batch has one update."
    return section("reward", "Reinforcement learning", intro, [chart for chart in charts if chart])


def _least(stage: Stage, key: str) -> float | None:
    """Where an axis begins: at 0, unless there are values below."""
    return 0.0 if (stage.points(key)[:, 1] >= 0).all() else None


def _chart(
    stage: Stage, title: str, unit: str, text: str, key: str, *, scale=1.0, low: float | None = 0.0, high=None
) -> str:
    lines = [Line(title, "slate", [stage.points(key, scale)])]
    picture = line_chart(panels([stage]), lines, unit=unit, low=low, high=high)
    return figure(title, picture, f"{text}{change(stage, key, scale)}.")


def _several(stage: Stage, title: str, unit: str, text: str, lines: Sequence[Line], **axis) -> str:
    lines = [line for line in lines if len(line.points[0])]
    return figure(title, line_chart(panels([stage]), lines, unit=unit, **axis), text, lines)


def _rewards(stage: Stage) -> str:
    names = {"accuracy": "being right", "format": "keeping the format"}
    names |= {name: html.escape(name) for name in stage.rewards() if name not in names}
    colours = itertools.cycle(("green", "gold", "blue", "orange", "purple", "slate"))
    lines = [Line(name, colour, [stage.points(f"reward_{name}")]) for name, colour in zip(names, colours, strict=False)]
    kinds = ", ".join(
        f"for {text}{change(stage, f'reward_{name}')}" for name, text in names.items() if stage.logs(f"reward_{name}")
    )
    low = 0 if all((line.points[0][:, 1] >= 0).all() for line in lines) else None
    return _several(
        stage, "Reward", "mean reward", f"Mean reward of the answers sampled in a step: {kinds}.", lines, low=low
    )


def _lengths(stage: Stage) -> str:
    longest = stage.rollouts.points["longest"]
    if not len(longest):
        text = "Mean length of an answer, thinking included"
        return _chart(stage, "Response length", "tokens", text, "response_length")
    lines = [Line("mean", "slate", [stage.points("response_length")]), Line("longest", "orange", [longest])]
    text = (
        f"Length of an answer, thinking included: the mean{change(stage, 'response_length')}, and the longest of those "
        f"that were written down, {number(longest[:, 1].max())} tokens at most."
    )
    return _several(stage, "Response length", "tokens", text, lines, low=0)


def _signal(stage: Stage) -> str:
    text = "Share of the groups whose answers differ in reward; the others teach nothing"
    if not stage.logs("signal_groups_trained"):
        return _chart(stage, "Groups with signal", "% of groups", text, "signal_groups", scale=100.0, high=100.0)
    lines = [
        Line(name, colour, [stage.points(key, 100.0)])
        for name, colour, key in (
            ("of those asked", "slate", "signal_groups"),
            ("of those trained on", "green", "signal_groups_trained"),
        )
    ]
    text += f"{change(stage, 'signal_groups', 100.0)}; further questions are asked for those that have none."
    return _several(stage, "Groups with signal", "% of groups", text, lines, low=0, high=100)


def _reflection(stage: Stage) -> str:
    """Length and words of reflection over training: the aha moment."""
    written, logged = stage.rollouts.points, stage.points("response_waits")
    words = [
        Line("words of reflection (right)", "purple", [logged if len(logged) else written["reflective"]]),
        Line("“wait” alone (right)", "orange", [written["wait"]]),
    ]
    words = [line for line in words if len(line.points[0])]
    length = [Line("mean length", "slate", [stage.points("response_length")])]
    if not words or not len(length[0].points[0]):
        return ""
    chart = line_chart(panels([stage]), length, unit="tokens", low=0, right=words, right_unit="words in an answer")
    text = (
        f"R1's paper counts {', '.join(REFLECTIVE)}: words of an answer that turns back on itself. Where they grow "
        "with the length, and did not stand in what the model was taught before, it has found that by itself."
    )
    return figure("Length and reflection", chart, text, length + words)


def _clipped(stage: Stage) -> str:
    lines = [
        Line(name, colour, [stage.points(key, 100.0)])
        for name, colour, key in (
            ("ratio clipped", "slate", "clip_fraction"),
            ("weight capped", "orange", "tis_capped"),
        )
    ]
    if not any(line.points[0][:, 1].any() for line in lines):
        return ""
    text = (
        "Share of the tokens whose ratio to the old policy was clipped, so that they teach nothing more, or whose "
        "importance weight between sampler and learner was capped."
    )
    return _several(stage, "Clipped", "% of tokens", text, lines, low=0)


def _cut_off(stage: Stage) -> str:
    if not stage.points("truncated")[:, 1].any():
        return ""
    text = "Share of the answers that came to the limit of their length before their end"
    return _chart(stage, "Cut off", "% of answers", text, "truncated", scale=100.0)


def _time(stage: Stage) -> str:
    """Each part's share of the time that a step takes."""
    parts = {name: stage.points(f"{name}_seconds") for name in PARTS}
    parts = {name: points for name, points in parts.items() if len(points)}
    if not parts:
        return ""
    by_step = [dict(points[:, :2].tolist()) for points in parts.values()]
    steps = sorted(set.intersection(*map(set, by_step)))
    seconds = np.array([[part[step] for part in by_step] for step in steps]).reshape(-1, len(parts))
    share = 100 * seconds / np.maximum(seconds.sum(axis=1, keepdims=True), 1e-9)
    lines = [
        Line(name, PARTS[name], [np.column_stack([steps, share[:, index], np.zeros(len(steps))])])
        for index, name in enumerate(parts)
    ]
    whole = 100 * seconds.sum(axis=0) / max(seconds.sum(), 1e-9)
    said = ", ".join(f"{name} {part:.0f}%" for name, part in zip(parts, whole, strict=True))
    text = f"Where a step's time goes: {said} of all {number(float(seconds.sum()))} s that were logged."
    if stage.logs("staleness"):
        text += " Rollouts ran beside the training, so a step took less than the sum."
    return _several(stage, "Time", "% of a step's seconds", text, lines, low=0, high=100)

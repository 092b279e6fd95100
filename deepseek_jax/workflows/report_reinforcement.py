"""The report's section on reinforcement learning."""

import html
import itertools

from deepseek_jax.workflows.report_cards import change, figure, panels, section
from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import Line, line_chart


def reinforcement(grpo: Stage) -> str:
    def chart(title: str, unit: str, text: str, key: str, *, scale=1.0, low: float | None = 0.0, high=None) -> str:
        lines = [Line(title, "slate", [grpo.points(key, scale)])]
        picture = line_chart(panels([grpo]), lines, unit=unit, low=low, high=high)
        return figure(title, picture, f"{text}{change(grpo, key, scale)}.")

    names = {"accuracy": "being right", "format": "keeping the format"}
    names |= {name: html.escape(name) for name in grpo.rewards() if name not in names}
    colours = itertools.cycle(("green", "gold", "blue", "orange", "purple", "slate"))
    rewards = [
        Line(name, colour, [grpo.points(f"reward_{name}")]) for name, colour in zip(names, colours, strict=False)
    ]
    rewards = [line for line in rewards if len(line.points[0])]
    kinds = ", ".join(
        f"for {text}{change(grpo, f'reward_{name}')}" for name, text in names.items() if grpo.logs(f"reward_{name}")
    )
    reward = f"Mean reward of the answers sampled in a step: {kinds}."
    low = 0 if all((line.points[0][:, 1] >= 0).all() for line in rewards) else None
    signal = "Share of the groups whose answers differ in reward; the others teach nothing"
    entropy = "Mean entropy of the next token's distribution: how much the model still explores"
    sampler = "Distance of the sampler's probabilities from the learner's; above 1e-6 in float32 it is a bug"
    reference = "How far the model has moved from the reference; 0 when there is none"
    nats = "nats per token"
    charts = [
        figure("Reward", line_chart(panels([grpo]), rewards, unit="mean reward", low=low), reward, rewards),
        chart("Response length", "tokens", "Mean length of an answer, thinking included", "response_length"),
        chart("Groups with signal", "% of groups", signal, "signal_groups", scale=100.0, high=100.0),
        chart("Entropy", nats, entropy, "entropy"),
        chart("Sampler-to-learner KL", nats, sampler, "kl_sampler", low=None),
    ]
    if not grpo.metrics or grpo.logs("kl_reference"):
        charts.append(chart("Reference KL", nats, reference, "kl_reference", low=None))
    intro = (
        "The model answers each problem several times, rules score the answers, and those better than their "
        f"group's mean become likelier. {grpo.title} is {grpo.status}."
    )
    return section("reward", "Reinforcement learning", intro, charts)

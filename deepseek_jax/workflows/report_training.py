"""The report's sections on training: losses, experts, reinforcement learning."""

import html
import itertools
from collections.abc import Sequence

import numpy as np

from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import Line, Panel, figure, heat_map, line_chart, number

HEAT_COLUMNS = 40  # of a stage in the map of expert loads


def losses(stages: Sequence[Stage]) -> str:
    charts = []
    for stage in stages:
        if stage.name != "grpo":
            charts.append(_loss_chart(stage))
        names = stage.evaluations() or ["eval/bits_per_byte"] * (stage.name == "pretrain")
        charts += [_held_out_chart(stage, name) for name in names]
    return section("losses", "Losses", "Bold lines are moving averages of the faint ones.", charts)


def _loss_chart(stage: Stage) -> str:
    lines = [Line("next token", "blue", [stage.points("ce")]), Line("MTP", "orange", [stage.points("mtp")])]
    lines = [line for line in lines if len(line.points[0])]
    text = f"Cross-entropy of the next token{change(stage, 'ce')}"
    if stage.logs("mtp"):
        text += f" and, by the MTP module, of the one after it{change(stage, 'mtp')}"
    chart = line_chart(panels([stage]), lines, unit="nats per token")
    return figure(f"Loss, {stage.title}", chart, f"{text}.", lines)


HELD_OUT = {  # title, unit and meaning of evaluations that are known
    "eval/bits_per_byte": (
        "Held-out text",
        "bits per byte",
        "Bits that the model needs per byte of text from files kept out of training",
    ),
    "eval/perplexity": ("Perplexity", "perplexity", "Perplexity per token of text from files kept out of training"),
    "eval/loss": (
        "Held-out chats",
        "nats per token",
        "Cross-entropy of what assistants say in chats kept out of training",
    ),
}


def _held_out_chart(stage: Stage, name: str) -> str:
    said = name.removeprefix("eval/").replace("_", " ")
    title, unit, text = HELD_OUT.get(name, (said.capitalize(), said, f"{name}, as the stage measured it"))
    lines = [Line(said, "blue", [stage.points(name)])]
    chart = line_chart(panels([stage]), lines, unit=unit)
    title, text = html.escape(f"{title}, {stage.title}"), html.escape(text)
    return figure(title, chart, f"{text}{change(stage, name)}.")


def experts(stages: Sequence[Stage]) -> str:
    def chart(title: str, unit: str, key: str, text: str) -> str:
        lines = [Line(title, "slate", [stage.points(key) for stage in stages])]
        return figure(title, line_chart(panels(stages), lines, unit=unit, low=0), text)

    vio = "How far the busiest expert is above the mean load (0: even, 1: double), mean over the MoE layers."
    loss = "The sequence-wise balance loss, which grows when a sequence leans on few experts."
    bias = "Range of the bias that is added to the router's scores to even out the load without a loss."
    charts = [
        ("MaxVio", "largest load / mean load - 1", "max_vio", vio),
        ("Balance loss", "loss", "balance", loss),
        ("Router bias", "largest bias - smallest bias", "bias_range", bias),
    ]
    began = any(stage.metrics for stage in stages)  # what it does not log by then it never will
    balance = [chart(*about) for about in charts if not began or any(stage.logs(about[2]) for stage in stages)]
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
    elif len(stages) > 1:  # a demo's
        missing += '<p class="none">Experts by kind of token: not measured yet.</p>'
    intro = (
        "Each token goes to a few of a layer's routed experts. The fair share of an expert is 1 / (number of "
        "experts): in the maps, a colourless cell has just that, a blue one less and an orange one more."
    )
    return section("experts", "Experts", intro, balance, loads, kinds) + missing


def _load_map(loaded: Sequence[tuple[Stage, np.ndarray]], layer: int) -> str:
    columns = []
    for _, loads in loaded:
        load_NE = loads[:, layer]
        edges = np.linspace(0, len(load_NE), HEAT_COLUMNS + 1)
        spans = [(int(a), max(int(a) + 1, int(b))) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        columns += [load_NE[a:b].mean(axis=0) for a, b in spans]
    ratio_EC = np.stack(columns, axis=1) * len(columns[0])
    chart = heat_map(ratio_EC, panels([stage for stage, _ in loaded]), limit=2)
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


def section(name: str, title: str, intro: str, *grids: Sequence[str]) -> str:
    cards = "".join(f'<div class="grid-cards">{"".join(figures)}</div>' for figures in grids if figures)
    return f'<section id="{name}"><h2>{title}</h2><p>{intro}</p>{cards}</section>'


def panels(stages: Sequence[Stage]) -> list[Panel]:
    return [Panel(stage.title, stage.last_step) for stage in stages]


def change(stage: Stage, key: str, scale: float = 1.0) -> str:
    """ " (6.2 → 2.1)": means over the first and last twentieth of the logged values."""
    values = stage.points(key, scale)[:, 1]
    if len(values) < 2:
        return ""
    part = max(1, len(values) // 20)
    first, last = (number(float(f"{values[span].mean():.3g}")) for span in (slice(part), slice(-part, None)))
    return f" ({first} → {last})"

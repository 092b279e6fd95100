"""The report's sections on training: losses and experts."""

import html
from collections.abc import Sequence

import numpy as np

from deepseek_jax.workflows.report_cards import change, figure, panels, section
from deepseek_jax.workflows.report_data import Stage
from deepseek_jax.workflows.report_figures import Line, Panel, heat_map, line_chart

HEAT_COLUMNS = 40  # of a stage in the map of expert loads


def losses(stages: Sequence[Stage]) -> str:
    charts = []
    for stage in stages:
        if not stage.reinforced:
            charts.append(_loss_chart(stage))
        names = stage.evaluations() or ["eval/bits_per_byte"] * (stage.name == "pretrain")
        charts += [_held_out_chart(stage, name) for name in names]
    return section("losses", "Losses", "Bold lines are moving averages of the faint ones.", charts)


def _loss_chart(stage: Stage) -> str:
    if stage.logs("loss") and not stage.logs("ce"):  # of no language model
        chart = line_chart(panels([stage]), [Line("loss", "blue", [stage.points("loss")])], unit="loss")
        return figure(f"Loss, {stage.title}", chart, f"What training makes less{change(stage, 'loss')}.")
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
    "eval/agreement": (
        "Agreement",
        "share of held-out answers",
        "Share of held-out pairs whose better answer scores higher, or of single ones on the right side of 0",
    ),
}


def _held_out_chart(stage: Stage, name: str) -> str:
    said = name.removeprefix("eval/").replace("_", " ")
    title, unit, text = HELD_OUT.get(name, (said.capitalize(), said, f"{name}, as the stage measured it"))
    lines = [Line(said, "blue", [stage.points(name)])]
    chart = line_chart(panels([stage]), lines, unit=unit)
    return figure(f"{title}, {stage.title}", chart, f"{html.escape(text)}{change(stage, name)}.")


def others(stages: Sequence[Stage]) -> str:
    """What no chart has shown so far, "" where that is nothing: of all stages, folded, as it was logged."""
    charts = []
    for stage in stages:
        for key in stage.undrawn():
            lines = [Line(key, "slate", [stage.points(key)])]
            chart = line_chart(panels([stage]), lines, unit=key)
            charts.append(figure(f"{key}, {stage.title}", chart, f"As it was logged{change(stage, key)}."))
    cards = f'<div class="grid-cards">{"".join(charts)}</div>'
    return f"<details><summary>Everything else that was logged</summary>{cards}</details>" if charts else ""


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
        f"How much of each kind of token the experts of MoE layer {layer + 1} take after {html.escape(stage.title)}, "
        f"in multiples of the fair share; the most marked is expert {expert} with {ratio_EK.max():.1f}× for "
        f"{html.escape(kinds[kind])}."
    )
    title = f"Kind of token, MoE layer {layer + 1}"
    return figure(title, chart, text, scale=("≤ ¼", "≥ 4× fair share"))

"""``place``: which device should hold which experts, the busiest ones more than once, for the loads of a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from deepseek_jax.checkpoint.finding import expanded
from deepseek_jax.checkpoint.hf_save import save_hf
from deepseek_jax.checkpoint.model import load
from deepseek_jax.checkpoint.publishing import check_place
from deepseek_jax.config import ModelConfig
from deepseek_jax.files import read_json_object, write_json
from deepseek_jax.model.reorder import check_order, reorder_experts
from deepseek_jax.parallel.eplb import device_loads, place
from deepseek_jax.saying import terminal
from deepseek_jax.train.metrics import FILE_NAME, read_metrics


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which device should hold which experts, the busiest ones more than once: DeepSeek's EPLB for the loads that a run
    has logged."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A folder that a stage wrote, finished or not."""
    devices: int
    """Devices that the experts of a layer lie on."""
    nodes: int = 1
    """Nodes that the devices stand in: each gets whole groups of experts and has the copies of its own. 1: all experts
    are dealt over all devices."""
    groups: int = 0
    """Groups of experts; 0: as many as the run's model has."""
    redundant: int = 0
    """Places of a layer beyond one for each expert, which copies of the busiest fill."""
    steps: int = 10
    """The last so many logged steps, whose mean load counts."""
    output: str = ""
    """The file to write; by default RUN/placement.json."""
    reorder: str = ""
    """Without redundant: a folder to write the run's model to, in bfloat16 as released ones are, with its experts in
    the order of their places. It computes the same, and what splits experts in order over devices splits them so."""


def run_place(arguments: Sequence[str]) -> None:
    asked = tyro.cli(_Place, args=list(arguments), prog="deepseek-jax place")
    run = expanded(asked.run)
    config = _model_of(run)
    load_LE = measured_load(run, asked.steps)
    if asked.reorder:
        if asked.redundant:
            raise ValueError(
                f"--reorder of a model has one place for each expert, but --redundant is {asked.redundant}"
            )
        check_place(Path(asked.reorder), 0)
    groups = asked.groups or (1 if config.topk_method == "greedy" else config.n_group)
    places = config.n_routed_experts + asked.redundant
    expert_LP = place(load_LE, places, devices=asked.devices, nodes=asked.nodes, groups=groups)
    if asked.reorder:
        check_order(config, expert_LP)
    terminal().print(_table(load_LE, expert_LP, asked.devices))
    path = Path(asked.output) if asked.output else run / "placement.json"
    write_json(path, {"physical_to_logical_map": _of_all_layers(config, expert_LP)}, indent=None)
    terminal().print(f"→ {path}", soft_wrap=True)
    if asked.reorder:
        model = load(run)
        params, bias = reorder_experts(config, model.params, model.router_bias, expert_LP)
        save_hf(dataclasses.replace(model, params=params, router_bias=bias), asked.reorder)
        terminal().print(f"→ {asked.reorder}", soft_wrap=True)


def measured_load(run: Path, steps: int) -> np.ndarray:
    """(routers, experts): each layer's shares, their mean over the last logged steps; ValueError if there are none."""
    if steps < 1:
        raise ValueError(f"--steps {steps}: must be at least 1")
    logged = [line["load"] for line in read_metrics(run) if "load" in line][-steps:]
    if not logged:
        raise ValueError(f"{run / FILE_NAME} holds no load of experts: the run's model has none, or no step is logged")
    return np.mean(np.array(logged, np.float64), axis=0)


def _model_of(run: Path) -> ModelConfig:
    model = read_json_object(run / "config.json").get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{run} is no run of a stage: it has no config.json with a model")
    return ModelConfig.from_dict(model)


def _of_all_layers(config: ModelConfig, expert_LP: np.ndarray) -> list[list[int]]:
    """A row for each layer of the main model, the form that SGLang reads; dense ones have all experts in order."""
    dense = np.arange(expert_LP.shape[1]) % config.n_routed_experts
    return [dense.tolist()] * config.num_dense_layers + expert_LP[: config.num_moe_layers].tolist()


def _table(load_LE: np.ndarray, expert_LP: np.ndarray, devices: int) -> Table:
    """The busiest device's load over the mean, before and after; of all layers, which wait for it one by one."""
    before_LN, experts = None, load_LE.shape[1]
    if experts % devices == 0:
        before_LN = device_loads(load_LE, np.tile(np.arange(experts), (len(load_LE), 1)), devices)
    after_LN = device_loads(load_LE, expert_LP, devices)
    table = Table(title=f"busiest of {devices} devices over their mean")
    for column in ("MoE layer", "busiest expert", "experts in order", "placed", "most copies"):
        table.add_column(column, justify="right")

    def row(name, some):
        busiest = lambda load_LN: f"{load_LN[some].max(axis=1).sum() / load_LN[some].mean(axis=1).sum():.3f}"  # noqa: E731
        before = "-" if before_LN is None else busiest(before_LN)
        copies = max(np.bincount(expert_P).max() for expert_P in expert_LP[some])
        table.add_row(name, busiest(load_LE), before, busiest(after_LN), str(copies))

    for layer in range(len(load_LE)):
        row(str(layer), [layer])
    row("all", list(range(len(load_LE))))
    return table

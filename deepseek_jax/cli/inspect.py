"""``inspect``: what a model costs before it is built."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.cli.talk import find_run
from deepseek_jax.config import ModelConfig
from deepseek_jax.train.loop import CHECKPOINTS
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_jax.workflows.stage import count_parameters

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class _Inspect:
    """What a model costs: of a pretraining recipe, or of a folder that a stage or the demo wrote."""

    what: Annotated[str, tyro.conf.Positional] = "demo/pretrain"


def run_inspect(arguments: Sequence[str]) -> None:
    what = tyro.cli(_Inspect, args=list(arguments), prog="deepseek-jax inspect").what
    config = _model_of(what)
    table = Table(title=what, show_header=False)
    for name, value in describe(config).items():
        table.add_row(name, value)
    Console().print(table)


def describe(config: ModelConfig) -> dict[str, str]:
    """Parameters, cache, arithmetic and memory as lines to print.

    Arithmetic per token is ``2 · (active parameters - embedding)`` forward and three times that in training,
    attention's own products left out; training memory is parameters, gradients and two float32 moments.
    """
    counts = count_parameters(config)
    total, active = counts["parameters_total"], counts["parameters_active"]
    embedding = config.vocab_size * config.hidden_size
    forward = 2 * (active - (0 if config.tie_word_embeddings else embedding))
    cache = config.cache_numbers_per_token_layer * config.num_hidden_layers
    size = BYTES[config.param_dtype]
    layers = (
        (config.num_dense_layers, "dense"),
        (config.num_moe_layers, "MoE"),
        (config.num_nextn_predict_layers, "MTP"),
    )
    return {
        "layers": ", ".join(f"{count} {kind}" for count, kind in layers if count),
        "parameters": f"{total:,}",
        "active per token": f"{active:,} (without MTP)",
        "cache per token": f"{cache:,} numbers, {cache * BYTES[config.dtype]:,} bytes",
        "arithmetic per token": f"{forward:,} FLOP forward, {3 * forward:,} training (but for attention's products)",
        "memory to serve": f"{total * size:,} bytes of parameters",
        "memory to train": f"{total * (2 * size + 8):,} bytes of parameters, gradients and moments",
    }


def _model_of(what: str) -> ModelConfig:
    if Path(what).is_dir():
        folder = find_run(what) / CHECKPOINTS
        with CheckpointStore(folder, keep=1) as store:
            return ModelConfig.from_dict(store.read_meta()["model"])
    return load_recipe(what, PretrainConfig).model

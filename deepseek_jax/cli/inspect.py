"""``inspect``: what a model costs before it is built."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from deepseek_jax.checkpoint import CheckpointStore
from deepseek_jax.checkpoint.finding import CHECKPOINTS, expanded, find_model
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.cli import cards
from deepseek_jax.config import ModelConfig
from deepseek_jax.files import read_json_object
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.saying import terminal
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import find_recipe, load_recipe
from deepseek_kernels.block_fp8 import BLOCK
from deepseek_kernels.integers import GROUP


@dataclasses.dataclass(frozen=True)
class _Inspect:
    """What a model costs: parameters, cache, arithmetic and memory, before it is built."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH|RECIPE")] = "demo/pretrain"
    """A folder that a stage or the demo wrote, a released model's, the config.json of either, or a recipe of a model or
    of pretraining (models/deepseek_v3, demo/pretrain)."""
    context: int | None = None
    """Tokens in the cache, and in a row of training; by default 4096, or the most that the model takes."""
    rows: int = 1
    """Answered together: of the memory and speed on cards."""
    markdown: bool = False
    """Print only what cards hold and bound, as docs/deploying.md has it."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of config.json to take as absent; give it several times for more."""


def run_inspect(arguments: Sequence[str]) -> None:
    options = tyro.cli(_Inspect, args=list(arguments), prog="deepseek-jax inspect")
    config, title = _model_of(options.what, options.ignore_config)
    if options.rows < 1:
        raise ValueError(f"--rows {options.rows}: must be at least 1")
    context = _context(config, options.context)
    by_kind = cards.table(config, context=context, rows=options.rows)
    if options.markdown:
        print(cards.markdown(by_kind))
        return
    table = Table(title=title, show_header=False)
    for name, value in describe(config, options.context).items():
        table.add_row(name, value)
    terminal().print(table)
    if not config.num_labels:
        terminal().print(_on_cards(by_kind))


def _on_cards(lines: list[list[str]]) -> Table:
    caption = (
        f"How many cards hold weights and a bfloat16 cache in {cards.LEFT:.0%} of their memory, split evenly, and the "
        "tokens a second that their bandwidth bounds, were nothing else to take time. INT8 and INT4: groups of "
        f"{GROUP}; embedding, head, router, norms and MLA's kv_b in bfloat16."
    )
    table = Table(title="to answer", caption=caption, caption_justify="left")
    for heading in lines[0]:
        table.add_column(heading)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def describe(config: ModelConfig, context: int | None = None) -> dict[str, str]:
    """Parameters, cache, arithmetic and memory as lines to print.

    Training is three times the forward arithmetic, over rows of ``context`` tokens in which a token attends to half
    the row on average; decoding reads the whole ``context``, MLA in its absorbed form. Memory to train is parameters,
    gradients and two moments in float32, with the MTP module; activations are not in it. Memory to serve
    is the main model and a bfloat16 cache of ``context`` tokens. ValueError: a context that the model does not take.
    """
    context = _context(config, context)
    main = dataclasses.replace(config, num_nextn_predict_layers=0)
    total, parameters = count_parameters(config)["parameters_total"], count_parameters(main)
    mtp = total - parameters["parameters_total"]
    cache = config.cache_numbers_per_token_layer * config.num_hidden_layers
    forward = forward_flops(main)
    decode = forward + attention_flops(main, context, absorbed=True)
    train = 3 * (forward + attention_flops(main, context) // 2)
    served = {kind: cards.footprint(config, kind, context=context) for kind in cards.KINDS}
    return {
        "layers": _layers(config),
        **({"head": f"{config.num_labels} scores (num_labels): it predicts no tokens"} if config.num_labels else {}),
        "parameters": f"{parameters['parameters_total']:,}",
        **({"MTP module": f"{mtp:,} parameters more"} if mtp else {}),
        "active per token": f"{parameters['parameters_active']:,}",
        "cache per token": f"{cache:,} numbers, {2 * cache:,} bytes in bfloat16{_cache_in_fp8(config)}",
        "arithmetic per token": f"{forward:,} FLOP forward, {3 * forward:,} training, but for attention's products",
        f"with attention, {context:,} tokens": f"{decode:,} FLOP decoding, {train:,} training",
        **{
            f"memory to serve, {kind}": f"{_gigabytes(its.weights)} + {_gigabytes(its.cache)} of cache"
            for kind, its in served.items()
        },
        "memory to train": f"{_gigabytes(16 * total)} of parameters, gradients and moments in float32",
    }


def _cache_in_fp8(config: ModelConfig) -> str:
    """MLA's latents with a scale for each 128, and the rotated key in bfloat16."""
    if config.attention != "mla" or config.kv_lora_rank % BLOCK:
        return ""
    token = config.kv_lora_rank + 2 * config.kv_lora_rank // BLOCK + 2 * config.qk_rope_head_dim
    return f", {token * config.num_hidden_layers:,} in FP8"


def _context(config: ModelConfig, context: int | None) -> int:
    longest = config.max_position_embeddings
    context = min(4096, longest) if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(f"--context {context}: must lie in 1…max_position_embeddings={longest}")
    return context


def fp8_bytes(config: ModelConfig) -> int:
    """A checkpoint's size with matrices in e4m3 and a float32 scale per 128×128 block, the rest in bfloat16 and the
    routing bias in float32: how V3 is released."""
    size = 0
    for tensor in hf_tensors(config):
        numbers = math.prod(tensor.shape)
        if tensor.quantised:
            size += numbers + 4 * math.prod(tensor.scale_shape)
        else:
            size += numbers * (4 if tensor.path == ("router_bias",) else 2)
    return size


def _layers(config: ModelConfig) -> str:
    counts = (config.num_dense_layers, config.num_moe_layers, config.num_nextn_predict_layers)
    return ", ".join(f"{count} {kind}" for count, kind in zip(counts, ("dense", "MoE", "MTP"), strict=True) if count)


def _gigabytes(size: int) -> str:
    return f"{size:,} bytes ({size / 1e9:,.1f} GB)"


def _model_of(what: str, ignore_config: Sequence[str]) -> tuple[ModelConfig, str]:
    """The model, and what to call it."""
    path = expanded(what)
    content = _content(path if path.suffix == ".json" else path / "config.json")
    if content is None or not {"model_type", "architectures"}.isdisjoint(content):
        return ModelConfig.from_hf(path, ignore_config=ignore_config), what
    if path.suffix != ".py" and path.exists():
        if "stage" not in content and path.suffix != ".json":  # a demo's folder, a run of an older release, or neither
            with CheckpointStore(find_model(path) / CHECKPOINTS, keep=1) as store:
                content = store.read_meta()
        if not isinstance(content.get("model"), dict):
            return ModelConfig.from_hf(path, ignore_config=ignore_config), what  # which says what is missing
        if ignore_config:
            raise ValueError(f"--ignore-config is for a released model's config.json, and {what} is none")
        return ModelConfig.from_dict(content["model"]), f"{what}, a run of {content.get('stage', 'a stage')}"
    try:
        find_recipe(what)
    except ValueError as error:
        raise FileNotFoundError(f"{what} does not exist, and {error}") from error
    config = load_recipe(what, object)
    if not isinstance(config, PretrainConfig | ModelConfig):
        raise ValueError(f"{what} gives a {type(config).__name__}; inspect takes a PretrainConfig or a ModelConfig")
    return config if isinstance(config, ModelConfig) else config.model, what


def _content(file: Path) -> dict[str, Any] | None:
    """A config.json, of a released model or of a run; {} where there is none, None where it is no JSON object."""
    try:
        return read_json_object(file)
    except ValueError:
        return None  # from_hf says what is wrong with it

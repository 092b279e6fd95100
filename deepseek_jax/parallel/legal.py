"""Which layouts a network can have: everything that cannot be is refused here, before anything compiles."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.exchange import check_exchange
from deepseek_jax.parallel.sharding import ShardingRules, check_axes
from deepseek_kernels.block_fp8 import BLOCK
from deepseek_kernels.registry import TABLE

_Problem = tuple[str, str]  # the mesh axis that is to blame, and what is wrong


def check_layout(
    model: ModelConfig,
    compute: Any,
    sizes: Mapping[str, int],
    *,
    rows: int | None = None,
    columns: int | None = None,
    rows_said: str = "",
) -> None:
    """ValueError, with the axis, its size, what it splits and the nearest legal choice, for a mesh of these ``sizes``
    on which this network can neither be trained nor loaded.

    compute: a ``ComputeConfig``. rows, columns: of what the mesh has to split at once, a microbatch; rows_said: how
    there come to be so many rows.
    """
    for field in dataclasses.fields(ShardingRules):
        check_axes(sizes, field.name, getattr(compute.rules, field.name))
    for axis, why in _problems(model, compute, sizes):
        raise ValueError(f"{why}; {_nearest(model, compute, sizes, axis)}")
    if model.num_moe_layers:
        check_exchange(compute.rules, sizes, compute.dispatch, compute.dispatch_nodes)
    of_batch = rows_said or f"rows={rows}", "batch", rows, "rows"
    for what, axis, size, unit in (of_batch, (f"columns={columns}", "sequence", columns, "columns")):
        split = getattr(compute.rules, axis)
        if size is not None and (rest := size % (ways := _ways(sizes, split))):
            nearest = f"{size - rest} or {size - rest + ways}" if size > ways else f"{ways}"
            raise ValueError(f"{_said(sizes, split)} does not divide {what}; the nearest is {nearest} {unit}")


def _problems(model: ModelConfig, compute: Any, sizes: Mapping[str, int]) -> Iterator[_Problem]:
    if sizes.get("pipe", 1) > 1:
        yield "pipe", f"pipe={sizes['pipe']}: the schedules of a pipeline are not there yet"
    uneven = False
    for what, axis, size in _widths(model):
        split = getattr(compute.rules, axis)
        if size % _ways(sizes, split):
            uneven = True
            yield _largest(sizes, split), f"{_said(sizes, split)} does not divide {what}={size}, split by rules.{axis}"
    if model.num_moe_layers and not uneven:
        yield from _problems_of_groups(model, compute, sizes)
        yield from _problems_of_kernels(model, compute, sizes)


def _widths(model: ModelConfig) -> list[tuple[str, str, int]]:
    """(field of the model, the logical axis, its size) of all that the rules split."""
    found = [
        ("hidden_size", "embed", model.hidden_size),
        ("vocab_size", "vocab", model.vocab_size),
        ("num_attention_heads", "heads", model.num_attention_heads),
    ]
    if model.attention == "mla":
        found += [(name, "latent", getattr(model, name)) for name in ("kv_lora_rank", "q_lora_rank")]
    if model.num_dense_layers:
        found.append(("intermediate_size", "mlp", model.intermediate_size))
        found.append(("num_dense_layers", "layers", model.num_dense_layers))
    if model.num_moe_layers:
        found.append(("n_routed_experts", "experts", model.n_routed_experts))
        found.append(("hidden_size", "expert_embed", model.hidden_size))
        found.append(("moe_intermediate_size", "expert_mlp", model.moe_intermediate_size))
        shared = model.n_shared_experts * model.moe_intermediate_size
        found.append(("n_shared_experts × moe_intermediate_size", "mlp", shared))
        found.append(("num_moe_layers", "layers", model.num_moe_layers))
    return found


def _problems_of_groups(model: ModelConfig, compute: Any, sizes: Mapping[str, int]) -> Iterator[_Problem]:
    """A device holds whole groups of experts or a part of one, so that groups lie on devices or on nodes."""
    split = compute.rules.experts
    of_group, of_device = (model.n_routed_experts // count for count in (model.n_group, _ways(sizes, split)))
    if model.n_group > 1 and of_device % of_group and of_group % of_device:
        groups = f"across the groups of {of_group} (n_group={model.n_group})"
        yield _largest(sizes, split), f"{_said(sizes, split)} gives each device {of_device} experts, {groups}"


def _problems_of_kernels(model: ModelConfig, compute: Any, sizes: Mapping[str, int]) -> Iterator[_Problem]:
    """A device's part of the experts' width must be whole blocks in FP8 and integers, and one that the kernel of the
    whole takes."""
    split, width = compute.rules.expert_mlp, model.moe_intermediate_size
    if (ways := _ways(sizes, split)) == 1:
        return
    part, why = width // ways, ""
    if compute.param_dtype in ("float8_e4m3", "int8", "int4") and part % BLOCK:
        why = f"which ends within a block of {BLOCK}, of FP8 or integers"
    elif _kernel(model, compute, part) != (whole := _kernel(model, compute, width)):
        why = f"which {whole}, the kernel of the whole, does not take"
    if why:
        each = f"{_said(sizes, split)} leaves a device {part} of moe_intermediate_size={width} (rules.expert_mlp)"
        yield _largest(sizes, split), f"{each}, {why}"


def _kernel(model: ModelConfig, compute: Any, width: int) -> str:
    """Of the experts' products, where a device has so much of their width."""
    target, dtype, D = compute.kernels, jnp.dtype(compute.dtype), model.hidden_size
    pairs, name = ((D, 2 * width), (width, D)), compute.grouped_matmul
    for row in TABLE["grouped_matmul"]:
        chosen = target.platform in row.platforms if name == "auto" else row.name == name
        if chosen and not any(row.refuses(target, dtype, widths=pair) for pair in pairs):
            return row.name
    return ""


def _nearest(model: ModelConfig, compute: Any, sizes: Mapping[str, int], axis: str) -> str:
    """Sizes of the axis for which it is not to blame, beside the others as they are."""

    def legal(ways: int) -> bool:
        return all(blamed != axis for blamed, _ in _problems(model, compute, {**sizes, axis: ways}))

    lower, higher = range(sizes[axis] - 1, 0, -1), range(sizes[axis] + 1, 2 * sizes[axis] + 1)
    found = [next(filter(legal, ways), None) for ways in (lower, higher)]
    return f"the nearest is {' or '.join(f'{axis}={ways}' for ways in found if ways) or 'another rule'}"


def _ways(sizes: Mapping[str, int], split: Sequence[str]) -> int:
    return math.prod(sizes[name] for name in split)


def _largest(sizes: Mapping[str, int], split: Sequence[str]) -> str:
    return max(split, key=lambda name: sizes[name])


def _said(sizes: Mapping[str, int], split: Sequence[str]) -> str:
    return " × ".join(f"{name}={sizes[name]}" for name in split if sizes[name] > 1)

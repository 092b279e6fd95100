"""Where each tensor of a released checkpoint lies in our parameters: the one table that loading and writing share.

Released matrices are (out, in), one per layer and expert. Ours are (in, out) with heads split off, stacked over layers
and experts, gate beside up. A ``HFTensor`` is therefore a name, a leaf, the index of its place in that leaf, and how
many of the place's axes make up the matrix's input.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import parameters
from deepseek_kernels.block_fp8 import BLOCK, Groups

Index = tuple[int | slice, ...]
LeafPath = tuple[str, ...]
_Spec = tuple[str, LeafPath, Index, int, bool]
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint.

    shape: in the file. path, index: the leaf and the place in it. kept: sizes of the place's axes. inputs: how many of
    them, from the left, form the matrix's input side, 0 for a vector or table that is stored as it is. quantised: FP8
    in FP8 checkpoints.
    """

    name: str
    shape: tuple[int, ...]
    path: LeafPath
    index: Index
    kept: tuple[int, ...]
    inputs: int = 0
    quantised: bool = False

    @property
    def scale_name(self) -> str:
        return self.name + "_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Blocks of 128 × 128, the last ones ragged."""
        return tuple(-(-size // BLOCK) for size in self.shape)

    @property
    def groups(self) -> Groups:
        """A matrix's scale blocks in our layout, as in ``BlockScaled``: input, what lies between, output."""
        inside = self.index[self.index.index(ALL) :]
        outputs = sum(i == ALL for i in inside) - self.inputs
        between = ((1, 1),) * sum(i != ALL for i in inside)
        return ((self.inputs, BLOCK), *between, (outputs, BLOCK))


def mtp_prefix(config: ModelConfig) -> str:
    """The MTP module is stored as one more layer behind the last."""
    return f"model.layers.{config.num_hidden_layers}."


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors of the MTP module that repeat one of the main model's: {copy: original}."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    prefix = mtp_prefix(config)
    return {prefix + "embed_tokens.weight": "model.embed_tokens.weight", prefix + "shared_head.head.weight": head}


def hf_tensors(config: ModelConfig) -> list[HFTensor]:
    """Every tensor that a checkpoint of this model holds, in the model's order, MTP's copies left out."""
    shapes = leaf_shapes(config)

    def place(name: str, path: LeafPath, index: Index = (), inputs: int = 0, *, fp8: bool = True) -> HFTensor:
        kept = [size for size, i in zip(shapes[path], _padded(index, len(shapes[path])), strict=True) if i == ALL]
        if inputs:
            shape: tuple[int, ...] = (math.prod(kept[inputs:]), math.prod(kept[:inputs]))
        else:
            shape = tuple(kept) if name.endswith("embed_tokens.weight") else (math.prod(kept),)
        index = _padded(index, len(shapes[path]))
        return HFTensor(name, shape, path, index, tuple(kept), inputs, quantised=bool(inputs) and fp8)

    found = [place("model.embed_tokens.weight", ("embed",))]
    for layer in range(config.num_hidden_layers):
        row = layer - config.num_dense_layers
        stack, at = ("dense_layers", layer) if row < 0 else ("moe_layers", row)
        found += [place(*spec[:4], fp8=spec[4]) for spec in _block(config, f"model.layers.{layer}.", (stack,), (at,))]
        if row >= 0 and config.has_router_bias:
            found.append(place(_bias_name(f"model.layers.{layer}."), ("router_bias",), (row,)))
    found.append(place("model.norm.weight", ("norm", "gain")))
    if config.num_labels:
        found.append(place("score.weight", ("score", "w"), (), 1, fp8=False))
    elif not config.tie_word_embeddings:
        found.append(place("lm_head.weight", ("head", "w"), (), 1, fp8=False))
    if config.num_nextn_predict_layers:
        prefix = mtp_prefix(config)
        found += [
            place(prefix + "enorm.weight", ("mtp", "embed_norm", "gain")),
            place(prefix + "hnorm.weight", ("mtp", "hidden_norm", "gain")),
            place(prefix + "eh_proj.weight", ("mtp", "proj", "w"), (), 1, fp8=False),
        ]
        found += [place(*spec[:4], fp8=spec[4]) for spec in _block(config, prefix, ("mtp", "block"), ())]
        if config.has_router_bias:
            found.append(place(_bias_name(prefix), ("router_bias",), (config.num_routers - 1,)))
        found.append(place(prefix + "shared_head.norm.weight", ("mtp", "norm", "gain")))
    return found


def leaf_shapes(config: ModelConfig) -> dict[LeafPath, tuple[int, ...]]:
    """The shape of each parameter, and of the routing bias, by path."""
    params, bias = parameters.abstract_arrays(config)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params)}
    return shapes if bias is None else shapes | {("router_bias",): tuple(bias.shape)}


def flatten(tree: dict, path: LeafPath = ()) -> Iterator[tuple[LeafPath, Any]]:
    """(path, leaf) of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _padded(index: Index, rank: int) -> Index:
    return (*index, *(ALL,) * (rank - len(index)))


def _bias_name(prefix: str) -> str:
    return prefix + "mlp.gate.e_score_correction_bias"


def _block(
    config: ModelConfig, prefix: str, path: LeafPath, at: Index
) -> Iterator[tuple[str, LeafPath, Index, int, bool]]:
    """One layer: (name, path, index, inputs, FP8 in FP8 checkpoints). ``at``: its row in the stack, () if unstacked."""
    moe = path[0] != "dense_layers" and config.num_moe_layers > 0
    yield prefix + "input_layernorm.weight", (*path, "attention_norm", "gain"), at, 0, False
    attention = _mla if config.attention == "mla" else _gqa
    yield from attention(config, prefix + "self_attn.", (*path, "attention"), at)
    yield prefix + "post_attention_layernorm.weight", (*path, "mlp_norm", "gain"), at, 0, False
    mlp, name = (*path, "mlp"), prefix + "mlp."
    if not moe:
        yield from _swiglu(name, mlp, at)
        return
    yield name + "gate.weight", (*mlp, "router"), at, 1, False
    for expert in range(config.n_routed_experts):
        yield from _swiglu(f"{name}experts.{expert}.", mlp, (*at, expert))
    if config.n_shared_experts:
        yield from _swiglu(name + "shared_experts.", (*mlp, "shared"), at)


def _swiglu(name: str, path: LeafPath, at: Index):
    for half, part in enumerate(("gate_proj", "up_proj")):
        yield f"{name}{part}.weight", (*path, "wi"), (*at, ALL, half), 1, True
    yield name + "down_proj.weight", (*path, "wo"), at, 1, True


def _mla(config: ModelConfig, name: str, path: LeafPath, at: Index):
    if config.q_lora_rank:
        yield name + "q_a_proj.weight", (*path, "q_a", "w"), at, 1, True
        yield name + "q_a_layernorm.weight", (*path, "q_norm", "gain"), at, 0, False
        yield name + "q_b_proj.weight", (*path, "q_b"), at, 1, True
    else:
        yield name + "q_proj.weight", (*path, "q_b"), at, 1, True
    yield name + "kv_a_proj_with_mqa.weight", (*path, "kv_a", "w"), at, 1, True
    yield name + "kv_a_layernorm.weight", (*path, "kv_norm", "gain"), at, 0, False
    yield name + "kv_b_proj.weight", (*path, "kv_b"), at, 1, True
    yield name + "o_proj.weight", (*path, "o"), at, 2, True
    if config.attention_bias:
        if config.q_lora_rank:
            yield name + "q_a_proj.bias", (*path, "q_a", "b"), at, 0, False
        yield name + "kv_a_proj_with_mqa.bias", (*path, "kv_a", "b"), at, 0, False
        yield name + "o_proj.bias", (*path, "o_bias"), at, 0, False


def _gqa(config: ModelConfig, name: str, path: LeafPath, at: Index):
    yield name + "q_proj.weight", (*path, "q"), at, 1, True
    for half, part in enumerate(("k_proj", "v_proj")):
        yield f"{name}{part}.weight", (*path, "kv"), (*at, ALL, half), 1, True
    yield name + "o_proj.weight", (*path, "o"), at, 2, True
    if config.attention_bias:
        yield name + "q_proj.bias", (*path, "q_bias"), at, 0, False
        for half, part in enumerate(("k_proj", "v_proj")):
            yield f"{name}{part}.bias", (*path, "kv_bias"), (*at, half), 0, False

"""Small models as released, written tensor by tensor with numpy: nothing here shares code with what is tested but the
table of names, and of that only names and shapes are used."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from model.tiny import QWEN, V1, V2, V3, config, weights
from small import tokenizer

from deepseek_jax.checkpoint.reading import named_leaves
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.model_folder import COMPANIONS, TOKENIZER
from deepseek_jax.data.special_tokens import BOS, EOS, PAD
from deepseek_jax.model import parameters
from deepseek_jax.model.transformer import Transformer

LLAMA = config(QWEN, attention_bias=False, tie_word_embeddings=False, vocab_size=300, max_position_embeddings=64)
FAMILIES = {
    "v1": config(V1),
    "v2": config(V2),
    "v2_lite": config(V2, q_lora_rank=0),
    "v3": config(V3),
    "qwen2": config(QWEN),
}
# Widths beyond a block of 128 and no multiple of it: ragged edges, and parts of a mesh that begin within a block.
FP8 = config(V3, hidden_size=144, vocab_size=48, kv_lora_rank=136, intermediate_size=272, num_hidden_layers=2)
E4M3 = ml_dtypes.float8_e4m3fn
_NAMES = {np.dtype(E4M3): "F8_E4M3", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float32): "F32"}
_NAMES |= {np.dtype(np.float64): "F64", np.dtype(np.int32): "I32"}


def model(config: ModelConfig, seed: int = 0) -> Transformer:
    return parameters.merge(config, *weights(config, seed))


def with_tokenizer(folder: Path, template: str) -> Path:
    """A released folder of a tiny dense Llama whose tokenizer, stop ids and chat template are its own."""
    write(folder, LLAMA, released(LLAMA), bos_token_id=0, eos_token_id=[1, 5])
    tokenizer().save(folder)
    config = {"bos_token": {"content": BOS}, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": PAD}))
    (folder / "generation_config.json").write_text('{"eos_token_id":[1, 5],   "top_p": 0.95}')
    (folder / "chat_template.jinja").write_text(template)
    return folder


def files_about_text(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (TOKENIZER, *COMPANIONS) if (folder / name).exists()}


def arrays(model: Transformer) -> dict[Any, np.ndarray]:
    params, bias = parameters.split(model)
    return {path: np.asarray(leaf) for path, leaf in named_leaves({"params": params, "bias": bias}).items()}


def assert_same(found: Transformer, wanted: Transformer) -> None:
    a, b = arrays(found), arrays(wanted)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype and a[path].shape == b[path].shape, path
        assert a[path].tobytes() == b[path].tobytes(), path


def released(config: ModelConfig) -> dict[str, np.ndarray]:
    """The float32 tensors of ``model(config)`` as a released file holds them, transcribed layer by layer."""
    params, bias = jax.tree.map(np.asarray, weights(config))
    D = config.hidden_size
    out: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["norm"]["gain"],
    }
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = params["head"]["w"].T

    def swiglu(name, wi, wo):
        out[f"{name}gate_proj.weight"], out[f"{name}up_proj.weight"] = wi[:, 0].T, wi[:, 1].T
        out[f"{name}down_proj.weight"] = wo.T

    def block(name, p, bias_E):
        out[name + "input_layernorm.weight"] = p["attention_norm"]["gain"]
        out[name + "post_attention_layernorm.weight"] = p["mlp_norm"]["gain"]
        a, at = p["attention"], name + "self_attn."
        if config.attention == "gqa":
            out[at + "q_proj.weight"] = a["q"].reshape(D, -1).T
            for half, part in enumerate("kv"):
                out[f"{at}{part}_proj.weight"] = a["kv"][:, half].reshape(D, -1).T
            if config.attention_bias:
                out[at + "q_proj.bias"] = a["q_bias"].ravel()
                for half, part in enumerate("kv"):
                    out[f"{at}{part}_proj.bias"] = a["kv_bias"][half].ravel()
        else:
            if config.q_lora_rank:
                out[at + "q_a_proj.weight"] = a["q_a"]["w"].T
                out[at + "q_a_layernorm.weight"] = a["q_norm"]["gain"]
            out[at + ("q_b_proj.weight" if config.q_lora_rank else "q_proj.weight")] = (
                a["q_b"].reshape(len(a["q_b"]), -1).T
            )
            out[at + "kv_a_proj_with_mqa.weight"] = a["kv_a"]["w"].T
            out[at + "kv_a_layernorm.weight"] = a["kv_norm"]["gain"]
            out[at + "kv_b_proj.weight"] = a["kv_b"].reshape(config.kv_lora_rank, -1).T
        out[at + "o_proj.weight"] = a["o"].reshape(-1, D).T
        m, mlp = p["mlp"], name + "mlp."
        if "router" not in m:
            swiglu(mlp, m["wi"], m["wo"])
            return
        out[mlp + "gate.weight"] = m["router"].T
        if bias_E is not None:
            out[mlp + "gate.e_score_correction_bias"] = bias_E
        for e in range(config.n_routed_experts):
            swiglu(f"{mlp}experts.{e}.", m["wi"][e], m["wo"][e])
        swiglu(mlp + "shared_experts.", m["shared"]["wi"], m["shared"]["wo"])

    for layer in range(config.num_hidden_layers):
        row = layer - config.num_dense_layers
        stack, at = (params["dense_layers"], layer) if row < 0 else (params["moe_layers"], row)
        block(
            f"model.layers.{layer}.",
            jax.tree.map(lambda leaf, at=at: leaf[at], stack),
            bias[row] if bias is not None and row >= 0 else None,
        )
    if config.num_nextn_predict_layers:
        p, name = params["mtp"], f"model.layers.{config.num_hidden_layers}."
        block(name, p["block"], None if bias is None else bias[-1])
        out[name + "enorm.weight"], out[name + "hnorm.weight"] = p["embed_norm"]["gain"], p["hidden_norm"]["gain"]
        out[name + "eh_proj.weight"], out[name + "shared_head.norm.weight"] = p["proj"]["w"].T, p["norm"]["gain"]
        out[name + "embed_tokens.weight"], out[name + "shared_head.head.weight"] = (
            params["embed"],
            out["lm_head.weight"],
        )
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def in_fp8(tensors: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Projections as random FP8 with random scales, everything else in bfloat16, the routing bias in float32."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, value in tensors.items():
        plain = any(part in name for part in ("embed_tokens", "head", "norm", "eh_proj", "mlp.gate.weight"))
        if plain or value.ndim != 2:
            out[name] = value if "correction_bias" in name else value.astype(ml_dtypes.bfloat16)
            continue
        out[name] = (100 * rng.standard_normal(value.shape)).clip(-448, 448).astype(E4M3)
        blocks = tuple(-(-size // 128) for size in value.shape)
        out[name + "_scale_inv"] = rng.uniform(0.0005, 0.002, blocks).astype(np.float32)
    return out


def plain(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """FP8 tensors dequantised, block by block."""
    out = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    for name, value in out.items():
        if value.dtype == E4M3:
            scales = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, 0), 128, 1)
            out[name] = value.astype(np.float32) * scales[: value.shape[0], : value.shape[1]]
    return out


def write(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header, data = {}, b""
    for name, array in tensors.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": [start, len(data)]}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | settings))
    return folder

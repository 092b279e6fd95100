"""What ``save_hf(dtype="float8_e4m3")`` writes, beside torch: the values, the scales, and which belong together.

The oracle multiplies the file out by the released formula and is transformers' V3. Transformers' own FP8 reading, which
without a GPU multiplies out too, takes all blocks of a matrix for equally large and refuses or mistakes ragged ones
(test_differences.py): it reads a model of whole blocks. That kept FP8 goes back to the byte is shown in
tests/checkpoint/test_hf_save.py.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity.drawn import redraw  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from deepseek_jax import load_hf, save_hf  # noqa: E402
from deepseek_jax.model import parameters, transformer  # noqa: E402

torch_files = importlib.import_module("safetensors.torch")

COMMON: dict[str, Any] = dict(vocab_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
COMMON |= dict(n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1)
COMMON |= dict(num_nextn_predict_layers=0)
# Of every matrix that is written in FP8 both sizes are more than a block and no multiple of it.
RAGGED = COMMON | dict(hidden_size=160, intermediate_size=272, moe_intermediate_size=136, q_lora_rank=144)
RAGGED |= dict(kv_lora_rank=140, qk_nope_head_dim=36, qk_rope_head_dim=8, v_head_dim=34)
# Every size a multiple of a block, or less than one.
WHOLE = COMMON | dict(hidden_size=256, intermediate_size=384, moe_intermediate_size=128, q_lora_rank=128)
WHOLE |= dict(kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)

TOKENS = np.random.default_rng(0).integers(3, COMMON["vocab_size"], (32, 40)).astype(np.int32)


def in_fp8(fields: dict[str, Any], folder: Path) -> Path:
    """A checkpoint in FP8, beside the one in float32 that it is made of (``wide``). Neighbouring blocks differ in size
    two- to eightfold: another's scale, or scales transposed, would show."""
    peer = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))
    peer.float().save_pretrained(folder / "wide")
    redraw(folder / "wide")
    tensors = load_file(folder / "wide" / "model.safetensors")
    for name, value in tensors.items():
        if "_proj" in name:
            rows, columns = (np.arange(size) // 128 for size in value.shape)
            value *= np.float32(0.1) * 2 ** ((rows[:, None] + 2 * columns) % 4)
    save_file(tensors, folder / "wide" / "model.safetensors", {"format": "pt"})
    save_hf(load_hf(folder / "wide", dtype="float32"), folder / "fp8", dtype="float8_e4m3")
    return folder / "fp8"


def multiplied_out(folder: Path, target: Path) -> Path:
    """The same checkpoint in float32, by the formula of V3's README_WEIGHTS in plain torch: ``W[o, i] = W8[o, i] ·
    scale_inv[o // 128, i // 128]``."""
    stored, wide = torch_files.load_file(folder / "model.safetensors"), {}
    for name, value in stored.items():
        if value.dtype == torch.float8_e4m3fn:
            rows, columns = (torch.arange(size) // 128 for size in value.shape)
            value = value.float() * stored[name + "_scale_inv"][rows][:, columns]
        if not name.endswith("_scale_inv"):
            wide[name] = value.float()
    target.mkdir()
    torch_files.save_file(wide, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def theirs(folder: Path, dtype: Any = torch.float32) -> np.ndarray:
    """transformers' logits. Of an FP8 folder it makes only the FP8 matrices float32; ``float`` does the rest."""
    cls = transformers.DeepseekV3ForCausalLM
    model, info = cls.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    model = model.float() if dtype == torch.float32 else model
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS).long()).logits.float().numpy()
    assert np.abs(logits).max() > 0.5, "weights too small to show anything"
    return logits


def ours(model: transformer.Transformer, dtype: str) -> np.ndarray:
    """Our logits, computed in ``dtype`` whatever the weights are kept in."""
    compute = dataclasses.replace(model.compute, dtype=dtype)
    tokens = jnp.asarray(TOKENS)
    run = jax.jit(lambda params, bias: parameters.merge(model.config, params, bias, compute)(tokens).logits)
    return np.asarray(run(*parameters.split(model)))


def distance(found: np.ndarray, truth: np.ndarray) -> float:
    """Of a token in the middle: where rounding flips a choice of experts, a few are far off, which ones is chance."""
    return float(np.median(np.linalg.norm(found - truth, axis=-1) / np.linalg.norm(truth, axis=-1)))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> tuple[Path, Path]:
    """(in FP8, multiplied out)."""
    folder = tmp_path_factory.mktemp("ragged")
    fp8 = in_fp8(RAGGED, folder)
    return fp8, multiplied_out(fp8, folder / "out")


@pytest.fixture(scope="module")
def truth(ragged) -> np.ndarray:
    return theirs(ragged[1])


def test_what_is_written_multiplies_out_to_the_weights(ragged):
    """To half a step of e4m3, 2⁻⁴ of the number or 2⁻¹⁰ of the block's scale; what stays bfloat16 to the bit."""
    fp8, out = ragged
    stored = torch_files.load_file(fp8 / "model.safetensors")
    wide, back = (torch_files.load_file(folder / "model.safetensors") for folder in (fp8.parent / "wide", out))
    assert wide.keys() == back.keys()
    for name, value in wide.items():
        assert (stored[name].dtype == torch.float8_e4m3fn) == ("_proj" in name), name
        if stored[name].dtype == torch.float8_e4m3fn:
            scales = stored[name + "_scale_inv"]
            assert all(size > 128 and size % 128 for size in value.shape), "not ragged"
            assert scales.max() > 4 * scales.min(), "scales too similar to show anything"
            step = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: value.shape[0], : value.shape[1]]
            assert ((back[name] - value).abs() <= value.abs() * 2**-4 + step * 2**-10).all(), name
        else:
            kept = value if "correction_bias" in name else value.bfloat16().float()
            assert torch.equal(back[name], kept), name


def test_dequantised(ragged, truth, tmp_path):
    fp8, out = ragged
    model = load_hf(fp8, dtype="float32")
    assert np.abs(ours(model, "float32") - truth).max() <= 1e-4
    save_hf(model, tmp_path / "ours", dtype="float32")
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", out))
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_kept_in_fp8(ragged, truth):
    """The same weights exactly, so in float32 the same logits; in bfloat16, as it is served, as near to them as torch
    in bfloat16."""
    fp8, out = ragged
    kept = load_hf(fp8, dtype="float8_e4m3")
    leaves, stored = jax.tree.leaves(parameters.split(kept)[0]), torch_files.load_file(fp8 / "model.safetensors")
    in_file = sum(value.numel() for value in stored.values() if value.dtype == torch.float8_e4m3fn)
    assert sum(leaf.size for leaf in leaves if leaf.dtype == jnp.float8_e4m3fn) == in_file
    assert np.abs(ours(kept, "float32") - truth).max() <= 1e-4
    mine, other = distance(ours(kept, "bfloat16"), truth), distance(theirs(out, torch.bfloat16), truth)
    print(f"bfloat16 ours {mine:.4f}, theirs {other:.4f}")
    assert mine <= 1.1 * other


def test_transformers_reads_whole_blocks_by_itself(tmp_path, monkeypatch):
    """It asks for accelerate, which it does not use here and which is not installed."""
    quantizer = importlib.import_module("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)
    fp8 = in_fp8(WHOLE, tmp_path)
    wanted = theirs(fp8)
    assert np.abs(ours(load_hf(fp8, dtype="float32"), "float32") - wanted).max() <= 1e-4

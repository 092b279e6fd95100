"""Folders in int8 and int4 beside compressed-tensors: its numbers are ours, and transformers computes the same.

Its own compressor packs and unpacks; a dense student is loaded by transformers through it. Experts, which transformers
keeps as one array, it cannot have packed.
"""

import importlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from safetensors.numpy import load_file  # noqa: E402

from deepseek_jax import load_hf, save_hf  # noqa: E402
from deepseek_kernels.integers import pack, unpack  # noqa: E402

FIELDS: dict[str, Any] = dict(vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
FIELDS |= dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 20)).astype(np.int32)
BITS = pytest.mark.parametrize("bits", [8, 4])


@BITS
def test_numbers_are_packed_as_it_packs_them(bits):
    helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    q = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 40)).astype(np.int8)
    packed = helpers.pack_to_int32(torch.from_numpy(q), bits).numpy()
    np.testing.assert_array_equal(pack(q, bits), packed)
    np.testing.assert_array_equal(unpack(packed, bits, 40).astype(np.int8), q)


@BITS
def test_transformers_reads_a_dense_student(bits, tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS)).float().save_pretrained(tmp_path / "wide")
    save_hf(load_hf(tmp_path / "wide", dtype="float32"), tmp_path / "q", dtype=f"int{bits}", group=32)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        theirs = peer(torch.from_numpy(TOKENS).long()).logits.numpy()
    ours = np.asarray(load_hf(tmp_path / "q", dtype="float32")(jnp.asarray(TOKENS)).logits)
    whole = np.asarray(load_hf(tmp_path / "wide", dtype="float32")(jnp.asarray(TOKENS)).logits)
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()
    assert np.abs(whole - theirs).max() > 10 * np.abs(ours - theirs).max()
    held = load_file(tmp_path / "q" / "model.safetensors")
    assert sum(name.endswith("_packed") for name in held) == 2 * 7
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"

"""The route to llama.cpp: what `save_hf` writes has a place in GGUF, by the name table of llama.cpp's own package.

llama.cpp's converter itself is no package, so it is not run here; it stacks the experts and renames the routing bias
before it looks names up in this table, as is done below.
"""

import json
import re

import pytest
from model.tiny import QWEN, V1, V2, V3, config, weights

from deepseek_jax import save_hf
from deepseek_jax.model import parameters

gguf = pytest.importorskip("gguf")
load_file = pytest.importorskip("safetensors.numpy").load_file

FAMILIES = {"v1": ("DEEPSEEK", V1), "v2": ("DEEPSEEK2", V2), "v3": ("DEEPSEEK2", V3), "qwen2": ("QWEN2", QWEN)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_a_place(family, tmp_path):
    arch, fields = FAMILIES[family]
    cfg = config(fields)
    save_hf(parameters.merge(cfg, *weights(cfg)), tmp_path / "model")
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), cfg.num_hidden_layers)
    mtp = f"model.layers.{cfg.num_hidden_layers}."  # llama.cpp leaves the MTP module out
    names = [name for name in load_file(tmp_path / "model" / "model.safetensors") if not name.startswith(mtp)]
    for name in names:
        name = re.sub(r"experts\.\d+\.", "experts.", name).replace("e_score_correction_bias", "e_score_correction.bias")
        assert table.get_name(name, try_suffixes=(".weight", ".bias")), name
    # What the converter picks its class and the architecture's numbers by.
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architectures"] and written["num_hidden_layers"] == cfg.num_hidden_layers

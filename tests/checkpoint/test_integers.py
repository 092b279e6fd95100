"""Folders in int8 and int4: what they hold, that they are read back by themselves, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import hf_cases as cases
from checkpoint.test_hf_save import tensors_of
from model.tiny import relative_error, weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax import ComputeConfig, Engine, SamplingParams, load, load_hf, save_hf
from deepseek_jax.checkpoint.integers import Integers, quantise_params
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.cli.cards import footprint
from deepseek_kernels import BlockScaled

FAMILIES = pytest.mark.parametrize("family", ["v3", "v2", "qwen2"])
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


def numbers(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """One after another out of words of 32 bits."""
    words, each = packed.astype(np.int64) & 0xFFFFFFFF, 32 // bits
    found = [
        [(int(word) >> bits * i) % 2**bits - 2 ** (bits - 1) for word in row for i in range(each)] for row in words
    ]
    return np.array(found, np.float32)[:, :columns]


def spelled_out(folder: Path, bits: int, group: int) -> dict[str, np.ndarray]:
    """The folder's tensors as the floats that they stand for."""
    found = values(folder)
    for packed in [name for name in found if name.endswith("_packed")]:
        name = packed.removesuffix("_packed")
        rows, columns = found.pop(name + "_shape")
        scales = found.pop(name + "_scale").astype(np.float32).repeat(group, axis=1)[:, :columns]
        assert scales.shape == (rows, columns)
        found[name] = numbers(found.pop(packed), bits, columns) * scales
    return found


def values(folder: Path) -> dict[str, np.ndarray]:
    with TensorFiles(folder) as files:
        return {name: np.array(files.array(name)) for name in files.tensors}


@FAMILIES
@pytest.mark.parametrize(("bits", "group"), [(8, 8), (4, 4)])
def test_what_is_written_is_near_the_model_and_read_back_number_for_number(family, bits, group, tmp_path):
    config = cases.FAMILIES[family]
    save_hf(cases.model(config), tmp_path / "q", dtype=f"int{bits}", group=group)
    stored, whole, far = spelled_out(tmp_path / "q", bits, group), cases.released(config), 0
    assert stored.keys() == whole.keys()
    held = {name.removesuffix("_packed") for name in tensors_of(tmp_path / "q") if name.endswith("_packed")}
    for name, wanted in whole.items():
        plain = not re.search(r"_proj(_with_mqa)?\.weight$", name) or "kv_b_proj" in name or "eh_proj" in name
        assert (name in held) == (not plain), name
        if not plain:
            far += 1
            step = np.abs(wanted).max() / (2 ** (bits - 1) - 1)
            assert 0 < np.abs(stored[name] - wanted).max() <= 1.01 * step, name
    assert far > 5
    model = load(tmp_path / "q")
    scaled = [leaf for leaf in leaves(model.params) if isinstance(leaf, BlockScaled)]
    assert scaled and all(leaf.dtype == (jnp.int8 if bits == 8 else jnp.int4) for leaf in scaled)
    save_hf(model, tmp_path / "again", dtype=f"int{bits}", group=group)
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "q")
    save_hf(model, tmp_path / "wide", dtype="float32")
    for name, value in values(tmp_path / "wide").items():
        np.testing.assert_array_equal(value, stored[name].astype(np.float32), err_msg=name)
    found, right = (load_hf(tmp_path / name, dtype="float32")(TOKENS).logits for name in ("q", "wide"))
    assert relative_error(found, right) < 1e-5


def leaves(params):
    return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, BlockScaled))


def test_quantised_as_it_is_read_or_when_it_lies_there_is_the_same(tmp_path):
    config = cases.FAMILIES["v3"]
    network = cases.model(config)
    save_hf(network, tmp_path / "m", dtype="float32")
    save_hf(network, tmp_path / "q", dtype="int4")
    found = load(tmp_path / "m", compute=ComputeConfig(param_dtype="int4"))
    stored = load(tmp_path / "q", compute=ComputeConfig(param_dtype="bfloat16"))
    placed = quantise_params(load(tmp_path / "m").params, config, Integers(4))
    trees = (jax.tree.leaves(tree) for tree in (found.params, stored.params, placed))
    for one, other, third in zip(*trees, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
        np.testing.assert_array_equal(np.asarray(third.astype(one.dtype), np.float32), np.asarray(one, np.float32))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_engine_answers_as_the_dequantised_model_does(bits, tmp_path):
    save_hf(whole(SPEAKER, *weights(SPEAKER), tokenizer()), tmp_path / "q", dtype=f"int{bits}")
    save_hf(load(tmp_path / "q"), tmp_path / "wide", dtype="float32")
    greedy = SamplingParams(temperature=0.0, max_tokens=6)
    answers = [
        [answer.token_ids for answer in Engine(load(tmp_path / name)).generate([[1, 2, 3], [4, 5]], greedy)]
        for name in ("q", "wide")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("kind", "bits"), [("INT8", 8), ("INT4", 4)])
def test_memory_is_what_the_arrays_take(kind, bits, tmp_path):
    config = dataclasses.replace(cases.FAMILIES["v3"], num_nextn_predict_layers=0)
    save_hf(cases.model(config), tmp_path / "q", dtype=f"int{bits}")
    model = load(tmp_path / "q", compute=ComputeConfig(param_dtype="bfloat16"))
    width = lambda leaf: bits if leaf.dtype in (jnp.int8, jnp.int4) else 16  # noqa: E731
    size = sum(leaf.size * width(leaf) / 8 for leaf in jax.tree.leaves(model.params))
    assert model.router_bias is not None
    size += 4 * model.router_bias.size
    assert footprint(config, kind, context=8).weights == size


def test_what_is_wrong_is_named(tmp_path):
    config = cases.FAMILIES["v3"]
    with pytest.raises(ValueError, match="group=3: must be an even number"):
        save_hf(cases.model(config), tmp_path / "q", dtype="int4", group=3)
    save_hf(cases.model(config), tmp_path / "q", dtype="int4")
    for dtype in ("int8", "float8_e4m3"):
        with pytest.raises(ValueError, match=f"param_dtype='{dtype}': the matrices of .* are in int4"):
            load(tmp_path / "q", compute=ComputeConfig(param_dtype=dtype))
    file = tmp_path / "q" / "config.json"
    content = json.loads(file.read_text())
    said = content["quantization_config"]["config_groups"]["group_0"]["weights"]
    wrong = {"num_bits": 3, "symmetric": False, "strategy": "channel", "actorder": "group", "group_size": 7}
    for field, value in wrong.items():
        kept, said[field] = said.get(field), value
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"weights.{field}={value!r}"):
            load(tmp_path / "q")
        said[field] = kept
    said["group_size"] = 8
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="_scale is bfloat16"):
        load(tmp_path / "q")

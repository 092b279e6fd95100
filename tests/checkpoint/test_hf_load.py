"""Released folders, transcribed by hand, load to the numbers they were made of; whatever is wrong is named."""

import dataclasses
import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint import hf_cases as cases

from deepseek_jax import Transformer, load_hf
from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.requests import make_requests
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import sampling_config, sampling_weights
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh

TINY = cases.FAMILIES["v3"]
MTP = "model.layers.3."


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_every_family_loads_what_was_written(family, tmp_path):
    config = cases.FAMILIES[family]
    tensors = cases.released(config)
    names = {tensor.name: tensor.shape for tensor in hf_tensors(config)}
    assert {name: tensors[name].shape for name in names} == names
    loaded = load_hf(cases.write(tmp_path / "m", config, tensors), dtype="float32")
    assert isinstance(loaded, Transformer) and loaded.source == str(tmp_path / "m")
    cases.assert_same(loaded, cases.model(config))


def test_bfloat16_is_the_default_and_rounds_once(tmp_path):
    loaded = load_hf(cases.write(tmp_path, TINY, cases.released(TINY)))
    assert (loaded.compute.dtype, loaded.compute.param_dtype) == ("bfloat16", "bfloat16")
    for path, value in cases.arrays(cases.model(TINY)).items():
        expected = value if path == ("bias",) else value.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(cases.arrays(loaded)[path], expected, err_msg=str(path))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    tensors = cases.in_fp8(cases.released(cases.FP8))
    return cases.write(tmp_path_factory.mktemp("fp8"), cases.FP8, tensors), tensors


def test_fp8_is_dequantised_block_by_block(fp8, tmp_path):
    folder, tensors = fp8
    wide = cases.write(tmp_path, cases.FP8, {n: v.astype(np.float32) for n, v in cases.plain(tensors).items()})
    for dtype in ("float32", jnp.bfloat16):
        cases.assert_same(load_hf(folder, dtype=dtype), load_hf(wide, dtype=dtype))


def test_kept_fp8_computes_the_same(fp8):
    """Logits, a scan over layers, decoding with the cache, MTP: all as with the dequantised weights."""
    folder, tensors = fp8
    kept, wide = load_hf(folder, dtype="float8_e4m3"), load_hf(folder)
    assert kept.moe_layers is not None
    raw = kept.moe_layers.mlp.wi.get_value()
    assert raw.values.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(
        np.asarray(raw.values[0, 3, :, 1]).T.view(np.uint8),
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(np.uint8),
    )
    np.testing.assert_array_equal(
        raw.scales[0, 3, :, 1].T, tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    )
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    run = jax.jit(
        lambda p, b: (
            (out := parameters.merge(wide.config, p, b, wide.compute)(tokens, mtp=True))
            and (out.logits, out.mtp_hidden)
        )
    )
    for a, b in zip(run(*parameters.split(kept)), run(*parameters.split(wide)), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05, atol=0.05)
    one = {"config": wide.config, "compute": wide.compute, "mesh": make_mesh(devices=jax.devices()[:1])}
    requests = make_requests([[3, 5, 7]], SamplingParams(max_tokens=6), stop_ids=(1,), pad_id=2)
    made = [sampling_weights(*parameters.split(m), **one) for m in (kept, wide)]
    assert made[0][0]["layers"][1]["mlp"]["wi"].values.dtype == jnp.float8_e4m3fn
    answers = [generate(sampling_config(wide.config), wide.compute, *arrays, requests) for arrays in made]
    np.testing.assert_array_equal(answers[0].tokens_BN, answers[1].tokens_BN)


def test_each_device_of_a_mesh_gets_its_part(fp8):
    folder, _ = fp8
    axes = parameters.logical_axes(cases.FP8)
    for dtype, more in (
        ("bfloat16", MeshConfig(fsdp=2, expert=2, tensor=2)),
        ("float8_e4m3", MeshConfig(data=2, fsdp=2, expert=2)),
    ):
        mesh = make_mesh(more)
        spread = load_hf(folder, mesh=mesh, dtype=dtype)
        cases.assert_same(spread, load_hf(folder, dtype=dtype))
        assert spread.moe_layers is not None
        wi = spread.moe_layers.mlp.wi.get_value()
        values = wi if dtype == "bfloat16" else wi.values
        assert axes["moe_layers"]["mlp"]["wi"] == ("layers", "experts", "expert_embed", None, "expert_mlp")
        assert values.addressable_shards[0].data.shape == (1, 4, 72, 2, 6 if dtype == "bfloat16" else 12)
        bias = parameters.split(spread)[1]
        assert bias is not None and bias.sharding.is_fully_replicated and len(bias.devices()) == 8
    blocks = "tensor=2 leaves a device 6 of moe_intermediate_size=12 .* ends within a block of 128"
    refused(folder, blocks, mesh=make_mesh(MeshConfig(tensor=2)), dtype="float8_e4m3")


# What is wrong is named


def refused(folder: Path, match: str, **options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=match):
            load_hf(folder, **options)


def test_missing_extra_and_misshapen_tensors(tmp_path):
    tensors = cases.released(TINY)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    without = {n: v for n, v in tensors.items() if n != name}
    refused(cases.write(tmp_path / "a", TINY, without), f"{name} is missing")
    refused(cases.write(tmp_path / "b", TINY, tensors | {"model.spam": np.zeros(2)}), "model.spam is unknown")
    turned = tensors | {name: np.ascontiguousarray(tensors[name].T)}
    refused(
        cases.write(tmp_path / "c", TINY, turned), rf"{name} has shape \[16, 12\], the configuration wants \[12, 16\]"
    )
    whole = tensors | {name: tensors[name].astype(np.int32)}
    refused(cases.write(tmp_path / "d", TINY, whole), f"{name} has dtype int32")
    v1 = cases.FAMILIES["v1"]
    refused(cases.write(tmp_path / "e", v1, {"x": np.zeros(1)}), "; and [0-9]+ more")


def test_fp8_without_its_scales_or_with_others(fp8, tmp_path):
    _, tensors = fp8
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    without = {n: v for n, v in tensors.items() if n != name}
    refused(cases.write(tmp_path / "a", cases.FP8, without), f"{name} is missing, but .* is FP8")
    wrong = tensors | {name: np.ones((1, 1), np.float32)}
    refused(cases.write(tmp_path / "b", cases.FP8, wrong), rf"{name} is float32\[1, 1\], not float32\[2, 1\]")
    plain = cases.write(tmp_path / "c", TINY, cases.released(TINY))
    refused(plain, "keeps FP8 checkpoints", dtype="float8_e4m3")
    refused(plain, "dtype='float16': must be one of bfloat16, float32, float8_e4m3", dtype="float16")
    lone = cases.released(TINY) | {"model.layers.0.mlp.up_proj.weight_scale_inv": np.ones((1, 1), np.float32)}
    refused(cases.write(tmp_path / "d", TINY, lone), "up_proj.weight_scale_inv is unknown")


def test_a_damaged_file_is_refused(tmp_path):
    folder = cases.write(tmp_path, TINY, cases.released(TINY))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(folder, "model.safetensors: cut short")


def test_mtp_is_all_or_nothing(tmp_path):
    tensors = cases.released(TINY)
    main = {name: value for name, value in tensors.items() if not name.startswith(MTP)}
    with pytest.warns(UserWarning, match=r"no tensor model.layers.3.\*: loading without the MTP module"):
        loaded = load_hf(cases.write(tmp_path / "none", TINY, main), dtype="float32")
    assert loaded.config == dataclasses.replace(TINY, num_nextn_predict_layers=0) and loaded.mtp is None
    partly = {name: value for name, value in tensors.items() if name != MTP + "enorm.weight"}
    refused(cases.write(tmp_path / "partly", TINY, partly), f"{MTP}enorm.weight is missing")
    without = dataclasses.replace(TINY, num_nextn_predict_layers=0)
    with pytest.warns(UserWarning, match=rf"num_nextn_predict_layers=0: leaving out the MTP module .* {MTP}\*"):
        loaded = load_hf(cases.write(tmp_path / "off", without, tensors), dtype="float32")
    assert loaded.config == without and loaded.mtp is None
    fewer = dataclasses.replace(without, num_hidden_layers=2)  # the third layer is no MTP module
    refused(cases.write(tmp_path / "fewer", fewer, main), "model.layers.2.* is unknown")
    copies = {name: value for name, value in tensors.items() if name not in (MTP + "embed_tokens.weight",)}
    cases.assert_same(load_hf(cases.write(tmp_path / "copies", TINY, copies), dtype="float32"), cases.model(TINY))
    other = tensors | {MTP + "embed_tokens.weight": tensors["model.embed_tokens.weight"] + 1}
    with pytest.warns(UserWarning, match=f"{MTP}embed_tokens.weight differs from model.embed_tokens.weight"):
        load_hf(cases.write(tmp_path / "other", TINY, other), dtype="float32")


def test_inert_tensors_and_a_tied_head_are_left_out_by_name(tmp_path, caplog):
    config = cases.FAMILIES["qwen2"]
    inert = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    tensors = cases.released(config) | inert
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    with caplog.at_level(logging.INFO, logger="deepseek_jax"):
        cases.assert_same(load_hf(cases.write(tmp_path / "a", config, tied), dtype="float32"), cases.model(config))
    assert "left out: model.layers.0.self_attn.rotary_emb.inv_freq" in caplog.text
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(
            cases.write(tmp_path / "b", config, tensors | {"lm_head.weight": tied["lm_head.weight"] * 2}),
            dtype="float32",
        )

"""``config.json`` and back: numbers of the facts page, files as they are released and as transformers saves them."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model.tiny import QWEN, V1, V2, V2_LITE, V3, config

from deepseek_jax.checkpoint.hf_names import hf_tensors
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.hf_families import FAMILIES
from deepseek_jax.model.costs import count_parameters
from deepseek_jax.model.rope import rotary_tables, softmax_scale
from deepseek_jax.workflows.recipe import load_recipe

R1 = Path(__file__).parents[2] / "shared" / "data" / "deepseek_r1_tokenizer" / "config.json"
# Totals and active parameters: section 1.1 and 1.2 of the facts page; the students' as the Hub counts their tensors.
RECIPES = {
    "deepseek_moe_16b": ("deepseek", 16_375_728_128, 2.83e9),
    "deepseek_v2_lite": ("deepseek_v2", 15_706_484_224, 2.66e9),
    "deepseek_v2": ("deepseek_v2", 235_741_434_880, 21.38e9),
    "deepseek_v3": ("deepseek_v3", 671_026_419_200, 37.55e9),
    "r1_distill_qwen_1_5b": ("qwen2", 1_777_088_000, 1.777e9),
    "r1_distill_qwen_7b": ("qwen2", 7_615_616_512, 7.616e9),
    "r1_distill_qwen_14b": ("qwen2", 14_770_033_664, 14.770e9),
    "r1_distill_qwen_32b": ("qwen2", 32_763_876_352, 32.764e9),
    "r1_distill_llama_8b": ("llama", 8_030_261_248, 8.030e9),
    "r1_distill_llama_70b": ("llama", 70_553_706_496, 70.554e9),
}
LLAMA = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16, low_freq_factor=1.0)
TINY = {
    "v1": config(V1),
    "v2": config(V2),
    "v2_lite": config(V2_LITE, num_nextn_predict_layers=0),
    "v2_lite_greedy": config(V2_LITE, topk_method="greedy"),
    "v3": config(V3),
    "v3_one_group": config(V3, n_group=1, topk_group=1, norm_topk_prob=False, rope_interleave=False),
    "v3_no_shared": config(V3, n_shared_experts=0, q_lora_rank=0, attention_bias=True, num_nextn_predict_layers=0),
    "v3_dense": config(V3, n_routed_experts=0, first_k_dense_replace=3, num_nextn_predict_layers=0),
    "qwen": config(QWEN),
    "llama": config(QWEN, attention_bias=False, rope_scaling=LLAMA),
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def recipe(name: str) -> ModelConfig:
    return load_recipe(f"models/{name}", ModelConfig)


def v3(**changes: Any) -> dict[str, Any]:
    """A small V3's config.json with some fields changed, or left out where they are None."""
    content = TINY["v3"].to_hf() | changes
    return {name: value for name, value in content.items() if value is not None}


# The ready recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_size(name):
    model_type, total, active = RECIPES[name]
    model = recipe(name)
    counts = count_parameters(dataclasses.replace(model, num_nextn_predict_layers=0))
    assert counts["parameters_total"] == total
    assert abs(counts["parameters_active"] - active) < 0.006e9
    assert model.to_hf()["model_type"] == model_type


def test_v3s_cache_and_mtp_module():
    """35,136 numbers and 70,272 bytes a token; 13,463,426,304 stored for MTP are two copies of 926,679,040 more."""
    model = recipe("deepseek_v3")
    assert model.cache_numbers_per_token_layer * model.num_hidden_layers * 2 == 70_272
    total = count_parameters(model)["parameters_total"]
    assert total - 671_026_419_200 == 13_463_426_304 - 2 * 926_679_040


def test_counting_agrees_with_the_checkpoints_tensors():
    for model in TINY.values():
        numbers = sum(math.prod(tensor.shape) for tensor in hf_tensors(model))
        assert count_parameters(model)["parameters_total"] == numbers


# There and back


@pytest.mark.parametrize("name", [*RECIPES, *TINY])
def test_there_and_back(name, tmp_path):
    model = TINY[name] if name in TINY else recipe(name)
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf()), encoding="utf-8")
    read = ModelConfig.from_hf(tmp_path)
    assert read == model.canonical() == ModelConfig.from_hf(model.to_hf())
    assert read == ModelConfig.from_hf(tmp_path / "config.json")
    if name in RECIPES:  # which set nothing that does nothing
        assert read == model


def test_idle_fields_are_all_that_canonical_changes():
    """The parameters and the arithmetic of the same network."""
    for model in TINY.values():
        same = model.canonical()
        assert same.canonical() == same
        assert [t.name for t in hf_tensors(same)] == [t.name for t in hf_tensors(model)]
        assert softmax_scale(same) == softmax_scale(model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(scoring="softmax", norm_topk_prob=False), ["deepseek_v2", "topk_method='noaux_tc'"]),
        (dict(topk_method="greedy"), ["deepseek_v3", "topk_method='greedy'"]),
        (V2 | dict(norm_topk_prob=True), ["deepseek_v2", "norm_topk_prob=True"]),
        (V2 | dict(num_nextn_predict_layers=1), ["deepseek_v2", "num_nextn_predict_layers=1"]),
        (V2 | dict(rope_interleave=False), ["deepseek_v2", "rope_interleave=False"]),
        (V1 | dict(attention_bias=True), ["deepseek", "attention_bias=True"]),
        (V1 | dict(routed_scaling_factor=2.0), ["deepseek", "routed_scaling_factor=2.0"]),
        (QWEN | dict(rope_interleave=True), ["qwen2", "rope_interleave=True"]),
        (dict(first_k_dense_replace=3), ["deepseek_v3", "n_routed_experts=0"]),
    ],
    ids=lambda value: str(value)[-50:] if isinstance(value, dict) else None,
)
def test_what_no_release_computes_cannot_be_written(changes, named):
    with pytest.raises(ValueError, match="no released architecture") as error:
        config(V3, **changes).to_hf()
    assert all(part in str(error.value) for part in named)


# Files as they are


@pytest.mark.skipif(not R1.is_file(), reason=f"needs R1's config.json in {R1.parent}")
def test_r1s_own_file():
    model = ModelConfig.from_hf(R1)
    assert model == ModelConfig.from_hf(R1.parent)
    same = dataclasses.replace(recipe("deepseek_v3"), initializer_range=0.02)
    assert model == same


# transformers 5.23: DeepseekV3Config.from_dict(R1's file without what only remote code reads).to_diff_dict()
SAVED_V3 = json.loads(
    """{"transformers_version": "5.23.0", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16",
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "output_router_logits": false, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": true,
    "hidden_act": "silu", "max_position_embeddings": 163840, "initializer_range": 0.006, "rms_norm_eps": 1e-06,
    "use_cache": true, "pad_token_id": null, "bos_token_id": 0, "eos_token_id": 1, "pretraining_tp": 1,
    "tie_word_embeddings": false, "rope_parameters": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn", "rope_theta": 10000,
    "rope_type": "yarn"}, "rope_interleave": true, "attention_bias": false, "attention_dropout": 0.0,
    "num_nextn_predict_layers": 1, "qk_head_dim": 192, "head_dim": 64, "model_type": "deepseek_v3"}"""
)
# The same of DeepseekV2Config(num_experts_per_tok=6, q_lora_rank=None): no scoring_func, null groups.
SAVED_V2 = json.loads(
    """{"transformers_version": "5.23.0", "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": true,
    "pad_token_id": null, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "tie_word_embeddings": false,
    "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "attention_bias": false,
    "attention_dropout": 0.0, "mlp_bias": false, "head_dim": 64, "first_k_dense_replace": 0, "kv_lora_rank": 512,
    "q_lora_rank": null, "n_group": null, "n_routed_experts": 64, "output_router_logits": false,
    "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "routed_scaling_factor": 1.0,
    "topk_group": null, "topk_method": "greedy", "norm_topk_prob": false, "v_head_dim": 128,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1407, "qk_head_dim": 192, "model_type": "deepseek_v2"}"""
)


def test_as_transformers_saves_them():
    assert ModelConfig.from_hf(SAVED_V3) == recipe("deepseek_v3").canonical()
    model = ModelConfig.from_hf(SAVED_V2)
    assert (model.scoring, model.topk_method, model.n_group) == ("softmax", "greedy", 1)
    assert (model.q_lora_rank, model.rope_theta, model.rope_scaling) == (0, 500.0, RopeScaling())
    assert (model.first_k_dense_replace, model.num_nextn_predict_layers, model.rope_interleave) == (0, 0, True)


def test_the_1_5b_students_file():
    """As released (facts page, 1.2): the window is off, head_dim is not said."""
    released = {
        **{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643},
        **{"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02},
        **{"intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21},
        **{"model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2},
        **{"rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False},
        **{"torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True, "use_mrope": False},
        **{"use_sliding_window": False, "vocab_size": 151936},
    }
    assert ModelConfig.from_hf(released) == recipe("r1_distill_qwen_1_5b").canonical()
    listed = released | {"layer_types": ["full_attention"] * 28}
    assert ModelConfig.from_hf(listed) == ModelConfig.from_hf(released)


def test_other_models_of_v3s_architecture():
    """Kimi-K2: 384 experts in a single group, half the heads, another name."""
    kimi = SAVED_V3 | {
        **{"model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "vocab_size": 163840},
        **{"num_attention_heads": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
        **{"num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "ep_size": 1},
    }
    model = ModelConfig.from_hf(kimi)
    assert (model.n_routed_experts, model.n_group, model.num_attention_heads) == (384, 1, 64)
    assert count_parameters(model)["parameters_total"] == pytest.approx(1.026e12, rel=1e-3)  # "1T"
    assert model.to_hf()["model_type"] == "deepseek_v3"


# Rotary settings


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        (dict(rope_scaling=YARN, rope_theta=50000), 50000.0, ("yarn", 40.0, 1.0, 0.0)),
        (dict(rope_parameters=YARN | {"rope_theta": 50000}, rope_theta=None), 50000.0, ("yarn", 40.0, 1.0, 0.0)),
        (
            dict(rope_scaling=YARN | {"rope_type": "yarn", "mscale": 0.7}, rope_parameters={}),
            10000.0,
            ("yarn", 40.0, 0.7, 0.0),
        ),
        (dict(rope_scaling=YARN | {"mscale_all_dim": 0.7}), 10000.0, ("yarn", 40.0, 1.0, 0.7)),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_theta=None), 7.0, ("none", 1, 1, 1)),
        (dict(rope_scaling=None, rope_theta=None), 10000.0, ("none", 1, 1, 1)),
        (dict(rope_scaling=YARN | {"truncate": True, "attention_factor": None}), 10000.0, ("yarn", 40.0, 1.0, 0.0)),
    ],
    ids=str,
)
def test_both_spellings_of_rotary_settings(fields, theta, scaling):
    model = ModelConfig.from_hf(v3(**fields))
    assert model.rope_theta == theta
    read = model.rope_scaling
    assert (read.type, read.factor, read.mscale, read.mscale_all_dim) == scaling


# The released code: cosines times m(mscale, default 1) / m(mscale_all_dim, default 0), the softmax scale times
# m(mscale_all_dim)² where it is not 0; m(x) = 0.1 x ln 40 + 1. transformers gives 1.369 in all cases but the first.
@pytest.mark.parametrize(
    ("mscales", "cosines", "softmax"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.8738542),
        ({"mscale": 0.707}, 1.2608038, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0}, 1.2608038, 1.0),
        ({"mscale_all_dim": 0.707}, 1.3688879 / 1.2608038, 1.5896262),
        ({}, 1.3688879, 1.0),
    ],
    ids=str,
)
def test_yarns_temperature_is_the_released_codes(mscales, cosines, softmax):
    model = ModelConfig.from_hf(v3(rope_scaling=YARN | mscales))
    cos, _ = rotary_tables(model, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, cosines, rtol=1e-6)
    assert softmax_scale(model) == pytest.approx((6 + 4) ** -0.5 * softmax, rel=1e-6)
    written = model.to_hf()["rope_scaling"]
    if 0 in (written["mscale"], written["mscale_all_dim"]):  # else transformers follows the released code by itself
        assert written["attention_factor"] == pytest.approx(cosines, rel=1e-6)
    else:
        assert "attention_factor" not in written
    assert ModelConfig.from_hf(model.to_hf()) == model


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_act="gelu"), ["hidden_act='gelu'", "'silu'"]),
        (dict(moe_layer_freq=2), ["moe_layer_freq=2"]),
        (dict(attention_dropout=0.1), ["attention_dropout=0.1"]),
        (dict(pretraining_tp=2), ["pretraining_tp=2"]),
        (dict(scoring_func="softmax"), ["scoring_func='softmax'", "'sigmoid'"]),
        (dict(topk_method="greedy"), ["topk_method='greedy'"]),
        (dict(num_nextn_predict_layers=2), ["num_nextn_predict_layers=2", "0 or 1"]),
        (dict(index_topk=2048), ["index_topk=2048", "not known here", "ignore_config"]),
        (dict(layer_types=["full_attention", "sliding_attention"]), ["layer_types", "sliding_attention"]),
        (dict(n_group=3), ["n_group=3", "n_routed_experts=8"]),
        (dict(kv_lora_rank=None), ["lacks kv_lora_rank"]),
        (dict(n_group=None, vocab_size=None), ["lacks vocab_size, n_group"]),
        (dict(hidden_size="16"), ["hidden_size='16'", "int"]),
        (dict(architectures=["DeepseekV3ForTokenClassification"]), ["DeepseekV3ForTokenClassification"]),
        (dict(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"]), ["deepseek_v32", *FAMILIES]),
        (dict(model_type=None, architectures=None), ["model_type='None'", *FAMILIES]),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), ["rope_scaling", "'linear'", "'yarn'", "'llama3'"]),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), ["'dynamic'"]),
        (dict(rope_scaling=YARN | {"rope_type": "llama3"}), ["'yarn' and 'llama3'"]),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), ["original_max_position_embeddings missing"]),
        (dict(rope_scaling=YARN | {"truncate": False}), ["rope_scaling.truncate=False"]),
        (dict(rope_scaling=YARN | {"low_freq_factor": 1.0}), ["rope_scaling.low_freq_factor=1.0"]),
        (dict(rope_scaling=YARN | {"attention_factor": 1.0}), ["attention_factor=1.0", "1.36"]),
        (dict(rope_scaling=YARN | {"attention_factor": 1.0, "factor": "40"}), ["RopeScaling.factor='40'", "float"]),
        (dict(rope_scaling=YARN, rope_parameters=YARN | {"factor": 4}), ["contradicts", "'factor': 4,"]),
        (dict(rope_parameters={"rope_theta": 5.0}), ["contradicts", "5.0", "10000.0"]),
        (dict(quantization_config={"quant_method": "awq", "bits": 4}), ["quant_method='awq'", "bits=4"]),
        (
            dict(quantization_config={"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [64, 64]}),
            ["fmt='e5m2'", "weight_block_size=[64, 64]", "[128, 128]"],
        ),
        (dict(quantization_config={"quant_method": "fp8"}), ["weight_block_size is missing"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_refused_by_name_and_value(changes, named):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(v3(**changes))
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("v2", dict(norm_topk_prob=True), ["norm_topk_prob=True", "False"]),
        ("v2", dict(topk_method="noaux_tc"), ["topk_method='noaux_tc'"]),
        ("v1", dict(attention_bias=True), ["attention_bias=True"]),
        ("v1", dict(rope_scaling=YARN), ["yarn", "mla"]),
        ("llama", dict(attention_bias=True), ["attention_bias=True"]),
        ("llama", dict(mlp_bias=True), ["mlp_bias=True"]),
        ("qwen", dict(use_sliding_window=True), ["use_sliding_window=True"]),
        ("qwen", dict(layer_types=["sliding_attention"] * 3), ["layer_types"]),
        ("qwen", dict(num_key_value_heads=None), ["lacks num_key_value_heads"]),
        ("qwen", dict(head_dim=None, hidden_size=18), ["num_attention_heads=4", "hidden_size=18"]),
    ],
    ids=str,
)
def test_refused_in_other_families(name, changes, named):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(TINY[name].to_hf() | changes)
    assert all(part in str(error.value) for part in named), error.value


# What transformers 4 and 5, Unsloth, LLaMA-Factory, Axolotl and exporters leave beside the network.
LEFT: dict[str, Any] = {
    **{"_model_name_or_path": "Smollm2 135M", "_attn_implementation_autoset": True, "_name_or_path": "x"},
    **{
        "unsloth_version": "2025.9.1",
        "unsloth_fixed": True,
        "unk_token_id": 0,
        "sep_token_id": None,
        "mask_token_id": 4,
    },
    **{"quantization_config": {}, "neftune_noise_alpha": 5, "lora_r": 8, "tensor_parallel_size": 2},
    **{"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False},
    **{"cross_attention_hidden_size": None, "decoder_start_token_id": None, "forced_bos_token_id": None},
    **{"pruned_heads": {}, "chunk_size_feed_forward": 0, "torchscript": False, "tf_legacy_loss": False},
    **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 2, "problem_type": "regression"},
    **{"temperature": 0.6, "top_k": 50, "top_p": 0.95, "do_sample": True, "num_beams": 1, "max_length": 20},
    **{"bad_words_ids": None, "prefix": None, "task_specific_params": {"a": 1}, "finetuning_task": None},
    **{"attn_implementation": "sdpa", "use_flash_attn": True, "gradient_checkpointing": False, "use_cache": False},
    **{"router_aux_loss_coef": 0.001, "output_router_logits": True, "classifier_dropout": 0.1, "pretraining_tp": 1},
    **{"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>", "transformers.js_config": {}, "model_max_length": 8},
    **{"hidden_dropout": 0.0, "resid_pdrop": 0, "mlp_bias": False, "lm_head_bias": False, "partial_rotary_factor": 1.0},
    **{"num_experts": 0, "logit_scale": 1.0, "mlp_only_layers": [], "residual_multiplier": 1, "quantization": None},
}


@pytest.mark.parametrize("name", TINY)
def test_what_says_nothing_of_the_network_is_passed_over(name):
    content = TINY[name].to_hf()
    assert ModelConfig.from_hf(content | LEFT) == ModelConfig.from_hf(content)


def test_what_nobody_knows_is_told_once_by_name():
    content = v3()
    with pytest.warns(UserWarning, match=r"nothing of the network: run_name, datasets$") as told:
        assert ModelConfig.from_hf(content | LEFT | {"run_name": "a", "datasets": ["b"]}) == ModelConfig.from_hf(
            content
        )
    assert len(told) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("attn_logit_softcapping", 50.0), ("use_qk_norm", True), ("sliding_window", 4096), ("qkv_bias", True)],
        *[("num_experts", 8), ("num_local_experts", 8), ("residual_multiplier", 0.22), ("logits_scaling", 8.0)],
        *[("partial_rotary_factor", 0.5), ("is_causal", False), ("hidden_activation", "gelu"), ("alibi", True)],
        *[("scale_attn_weights", False), ("is_encoder_decoder", True), ("add_cross_attention", True)],
        *[("index_topk", 2048), ("hc_mult", 4), ("load_in_4bit", True), ("compression_config", {"format": "int"})],
        *[("kv_lora_rank", 8), ("mtp_num_layers", 1), ("query_pre_attn_scalar", 256), ("use_rope", False)],
        *[
            ("attention_bias", True),
            ("rope_interleave", True),
            ("num_nextn_predict_layers", 1),
            ("pretraining_tp", True),
        ],
    ],
    ids=str,
)
def test_what_changes_the_arithmetic_is_refused(name, value):
    content = TINY["llama"].to_hf()
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}"):
        ModelConfig.from_hf(content | {name: value})
    assert ModelConfig.from_hf(content | {name: None}) == ModelConfig.from_hf(content)


def test_ignored_fields_are_taken_as_absent():
    content = v3(index_topk=4, hidden_act="gelu", rope_scaling=YARN | {"truncate": False})
    model = ModelConfig.from_hf(content, ignore_config=["index_topk", "hidden_act", "rope_scaling.truncate"])
    assert model == ModelConfig.from_hf(v3(rope_scaling=YARN))
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        ModelConfig.from_hf(content, ignore_config=["index_topk", "rope_scaling.truncate"])
    with pytest.raises(ValueError, match="list of field names"):
        ModelConfig.from_hf(content, ignore_config="index_topk")


def test_an_fp8_checkpoint_is_the_same_network():
    for scale in (None, "ue8m0"):  # R1, V3.1
        quantised = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": scale}
        content = v3(quantization_config=quantised | {"weight_block_size": [128, 128]})
        assert ModelConfig.from_hf(content) == TINY["v3"].canonical()


def test_what_is_wrong_names_the_file(tmp_path):
    for content, wrong in (
        (v3(index_topk=4), r" \(deepseek_v3\) asks for .* index_topk=4"),
        (v3(n_group=3), ": n_group=3 "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        for source in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/config.json{wrong}"):
                ModelConfig.from_hf(source)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)
    for text in ("{", "[1]", "\ud800", "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"config\.json: (not JSON|holds a list)"):
            ModelConfig.from_hf(tmp_path)


LEAVES = st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.sampled_from(["", "yarn", "silu"])
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.sampled_from([*YARN, "mscale", "x"]), LEAVES)


@given(st.sampled_from(sorted(TINY)), st.data())
def test_a_damaged_file_is_read_or_refused(name, data):
    content = TINY[name].to_hf()
    fields = [*content, "quantization_config", "rope_parameters", "layer_types", "x"]
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        content[field] = data.draw(VALUES)
    try:
        model = ModelConfig.from_hf(content)
    except ValueError:
        return
    assert isinstance(model, ModelConfig)

"""The configuration: an impossible one is refused by field, value and what is allowed."""

import dataclasses
import json
import re
from typing import Any

import pytest
from model.tiny import QWEN, V1, V2, V2_LITE, V3

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.typed import from_dict
from deepseek_kernels import Target

REFUSED = [
    # field and value that are wrong; what the message must name
    (dict(n_routed_experts=16, n_group=3), ["n_group=3", "n_routed_experts=16"]),
    (dict(n_group=0), ["n_group=0"]),
    (dict(n_group=4, topk_group=5), ["topk_group=5", "n_group=4"]),
    (dict(topk_group=0), ["topk_group=0", "1"]),
    (
        dict(n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=5),
        ["num_experts_per_tok=5", "only 4"],
    ),
    (dict(n_routed_experts=16, num_experts_per_tok=17), ["num_experts_per_tok=17", "n_routed_experts=16"]),
    (dict(num_experts_per_tok=0), ["num_experts_per_tok=0", "1"]),
    (dict(topk_method="greedy", num_experts_per_tok=99), ["num_experts_per_tok=99"]),
    (dict(n_routed_experts=16, n_group=16, topk_group=8), ["n_group=16", "noaux_tc", "two best"]),
    (dict(n_shared_experts=-1), ["n_shared_experts=-1"]),
    (dict(moe_intermediate_size=0), ["moe_intermediate_size=0", "positive"]),
    (dict(first_k_dense_replace=5, num_hidden_layers=4), ["first_k_dense_replace=5", "num_hidden_layers=4"]),
    (dict(first_k_dense_replace=-1), ["first_k_dense_replace=-1"]),
    (dict(n_routed_experts=0), ["n_routed_experts=0", "first_k_dense_replace=1"]),
    (dict(hidden_size=0), ["hidden_size=0", "positive"]),
    (dict(vocab_size=-3), ["vocab_size=-3", "not be negative"]),
    (dict(num_hidden_layers=0), ["num_hidden_layers=0", "positive"]),
    (dict(kv_lora_rank=0), ["kv_lora_rank=0", "positive"]),
    (dict(q_lora_rank=-1), ["q_lora_rank=-1"]),
    (dict(qk_rope_head_dim=7), ["7", "even"]),
    (dict(attention="gqa", head_dim=5), ["5", "even"]),
    (dict(attention="gqa", num_attention_heads=4, num_key_value_heads=3), ["num_key_value_heads=3", "=4"]),
    (dict(attention="gqa", num_key_value_heads=0), ["num_key_value_heads=0", "positive"]),
    (dict(num_nextn_predict_layers=2), ["num_nextn_predict_layers=2", "0 or 1"]),
    # wrong types
    (dict(hidden_size=128.0), ["hidden_size=128.0", "int", "float"]),
    (dict(hidden_size="128"), ["hidden_size='128'", "int", "str"]),
    (dict(hidden_size=True), ["hidden_size=True", "int", "bool"]),
    (dict(rope_theta="1e4"), ["rope_theta='1e4'", "float", "str"]),
    (dict(tie_word_embeddings=1), ["tie_word_embeddings=1", "bool", "int"]),
    (dict(norm_topk_prob=None), ["norm_topk_prob=None", "bool"]),
    (dict(rope_scaling=None), ["rope_scaling=None", "RopeScaling"]),
    (dict(attention="mha"), ["attention='mha'", "mha is gqa with num_key_value_heads = num_attention_heads"]),
    (dict(scoring="tanh"), ["scoring='tanh'", "'softmax'", "'sigmoid'"]),
    (dict(topk_method="top2"), ["topk_method='top2'", "'greedy'", "'group_limited_greedy'", "'noaux_tc'"]),
]


@pytest.mark.parametrize(
    ("changes", "named"), REFUSED, ids=[", ".join(f"{k}={v}" for k, v in c.items()) for c, _ in REFUSED]
)
def test_refused_by_field_value_and_what_is_allowed(changes, named):
    with pytest.raises(ValueError) as refusal:
        ModelConfig(**changes)
    for part in named:
        assert part in str(refusal.value), str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(scan_unroll=0), ["scan_unroll=0", "at least 1"]),
        (dict(dtype="float16"), ["dtype='float16'", "'float32'", "'bfloat16'"]),
        (dict(dtype="bf16"), ["dtype='bf16'", "bf16 is bfloat16"]),
        (dict(remat="some"), ["remat='some'", "'none'", "'dots'", "'full'"]),
        (dict(target="gpu"), ["target='gpu'", "cpu, cuda, rocm, tpu", "auto"]),
        (dict(target="cuda:9.0:many"), ["target='cuda:9.0:many'"]),
    ],
)
def test_a_wrong_way_to_compute_is_refused(changes, named):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named))):
        ComputeConfig(**changes)


def test_the_target_is_the_meshs_first_device_unless_it_is_named():
    assert ComputeConfig().on(make_mesh()).kernels == Target("cpu") == ComputeConfig().kernels
    assert ComputeConfig(target="cuda:9.0:132").kernels == Target("cuda", "9.0", 132)
    for text in ("cpu", "cuda:9.0", "cuda:9.0:132", "tpu:TPU v5p"):
        assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(type="yarnn"), ["type='yarnn'", "'yarn'", "'llama3'"]),
        (dict(factor="40"), ["factor='40'", "float"]),
    ],
)
def test_a_wrong_stretching_of_positions_is_refused(values, named):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, named))):
        ModelConfig.from_dict({"rope_scaling": values})


def test_an_unknown_field_is_refused_by_name_with_those_that_exist():
    with pytest.raises(ValueError, match=r"ModelConfig has no field hiden_size; it has .*hidden_size"):
        ModelConfig.from_dict({"hiden_size": 3})
    with pytest.raises(ValueError, match=r"RopeScaling has no field faktor; it has .*factor"):
        ModelConfig.from_dict({"rope_scaling": {"faktor": 3.0}})


def test_an_int_is_a_fine_float():
    assert ModelConfig(rope_theta=500000, routed_scaling_factor=16).rope_theta == 500000


@pytest.mark.parametrize("fields", [{}, V1, V2, V2_LITE, V3, QWEN])
def test_round_trip_through_json(fields):
    config = ModelConfig(**fields)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_missing_fields_take_the_defaults_and_lists_become_tuples():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        model: ModelConfig = ModelConfig()
        sizes: tuple[int, ...] = (1,)

    built = from_dict(Outer, {"model": {"hidden_size": 64}, "sizes": [2, 3]})
    assert built == Outer(ModelConfig(hidden_size=64), (2, 3))


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().hidden_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_group_limits_do_not_bind_a_greedy_router():
    assert ModelConfig(n_routed_experts=16, topk_method="greedy", n_group=3, topk_group=9).num_routers == 4


def test_counts_of_the_released_models():
    v3: dict[str, Any] = dict(
        num_hidden_layers=61, first_k_dense_replace=3, n_routed_experts=256, n_group=8, topk_group=4
    )
    v3 |= dict(num_experts_per_tok=8, kv_lora_rank=512, qk_rope_head_dim=64)
    config = ModelConfig(**v3)
    assert (config.num_dense_layers, config.num_moe_layers, config.num_routers) == (3, 58, 59)
    assert config.cache_numbers_per_token_layer == 576 and config.has_router_bias
    v2 = ModelConfig(scoring="softmax", topk_method="greedy", num_nextn_predict_layers=0)
    assert v2.num_routers == v2.num_moe_layers == 3 and not v2.has_router_bias
    llama = ModelConfig(
        attention="gqa", n_routed_experts=0, first_k_dense_replace=4, num_key_value_heads=2, head_dim=32
    )
    assert (llama.num_dense_layers, llama.num_moe_layers, llama.num_routers) == (4, 0, 0)
    assert llama.cache_numbers_per_token_layer == 2 * 2 * 32 and llama.rope_dim == 32
    assert ModelConfig(rope_scaling=RopeScaling("yarn", 40.0)).rope_dim == ModelConfig().qk_rope_head_dim

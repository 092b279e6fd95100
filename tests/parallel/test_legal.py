"""What cannot be laid out on a mesh is refused, with the nearest that can; what can is not."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest
from model.tiny import QWEN, V2_LITE, V3, config

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.legal import check_layout
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe

LITE = load_recipe("models/deepseek_v2_lite", ModelConfig)
LARGE = load_recipe("models/deepseek_v3", ModelConfig)
HOPPER = ComputeConfig(dtype="bfloat16", target="cuda:9.0:132")
FP8 = dataclasses.replace(HOPPER, param_dtype="float8_e4m3")
TPU = ComputeConfig(dtype="bfloat16", target="tpu:TPU v5p")


def check(model, compute=HOPPER, *, rows=None, columns=None, said="", **sizes):
    check_layout(model, compute, dict.fromkeys(AXES, 1) | sizes, rows=rows, columns=columns, rows_said=said)


@pytest.mark.parametrize(
    "model, compute, sizes",
    [
        (LARGE, HOPPER, dict(fsdp=64, expert=8)),
        (LARGE, TPU, dict(data=2, fsdp=16, expert=64, context=2)),
        (LARGE, HOPPER, dict(expert=256, tensor=8)),
        (LARGE, FP8, dict(expert=8, tensor=8)),
        (LITE, HOPPER, dict(data=3, tensor=2)),
        (LITE, ComputeConfig(dtype="bfloat16", target="cpu"), dict(tensor=4)),
        (config(QWEN), ComputeConfig(), dict(tensor=4, fsdp=2)),
    ],
)
def test_what_can_be_laid_out_passes(model, compute, sizes):
    check(model, compute, **sizes)


@pytest.mark.parametrize(
    "model, compute, sizes, message",
    [
        (LARGE, HOPPER, dict(pipe=4), "pipe=4: the schedules of a pipeline are not there yet; the nearest is pipe=1$"),
        (LITE, HOPPER, dict(tensor=3), "tensor=3 does not divide vocab_size=102400, split by rules.vocab; .*tensor=2$"),
        (LITE, TPU, dict(tensor=32), "tensor=32 does not divide num_attention_heads=16, .*nearest is tensor=8$"),
        (LITE, HOPPER, dict(fsdp=3), "fsdp=3 does not divide hidden_size=2048, .*fsdp=2 or fsdp=4$"),
        (LARGE, HOPPER, dict(fsdp=1024), "fsdp=1024 does not divide kv_lora_rank=512, .*latent.*fsdp=512$"),
        (LITE, HOPPER, dict(expert=12), "expert=12 does not divide n_routed_experts=64, .*expert=8 or expert=16$"),
        (LITE, HOPPER, dict(tensor=4), "device 352 of .*=1408 .*, which hopper, .* take; the nearest is tensor=2$"),
        (LITE, FP8, dict(tensor=2), "device 704 of .*=1408 .*, which ends within a block of 128.*; .* tensor=1$"),
        (
            config(V2_LITE, n_routed_experts=12, n_group=4, topk_group=2),
            ComputeConfig(),
            dict(expert=3),
            r"expert=3 gives each device 4 experts, across the groups of 3 \(n_group=4\); the nearest is expert=2 or",
        ),
        (config(V3), ComputeConfig(), dict(tensor=4), "tensor=4 does not divide num_attention_heads=2, .*tensor=2$"),
        (
            LITE,
            dataclasses.replace(TPU, rules=ShardingRules(heads=("data", "tensor"))),
            dict(data=2, tensor=16),
            "data=2 × tensor=16 does not divide num_attention_heads=16, .*tensor=8",
        ),
    ],
)  # fmt: skip
def test_what_cannot_names_the_nearest(model, compute, sizes, message):
    with pytest.raises(ValueError, match=message):
        check(model, compute, **sizes)


def test_rows_and_columns_that_the_mesh_does_not_divide():
    check(LITE, rows=16, columns=4096, data=2, fsdp=8, context=4)
    with pytest.raises(ValueError, match="data=2 × fsdp=8 does not divide rows=24; the nearest is 16 or 32"):
        check(LITE, rows=24, data=2, fsdp=8)
    said = "the 4 rows of batch_size=8, step.microbatches=2"
    with pytest.raises(ValueError, match=f"data=8 does not divide {said}; the nearest is 8"):
        check(LITE, rows=4, data=8, said=said)
    with pytest.raises(ValueError, match="context=3 does not divide columns=4096; .* 4095 or 4098"):
        check(LITE, rows=8, columns=4096, context=3)


def test_a_rule_of_an_axis_that_is_not_there():
    compute = dataclasses.replace(HOPPER, rules=ShardingRules(heads=("model",)))
    with pytest.raises(ValueError, match="heads is split over the mesh axis 'model', which the mesh lacks"):
        check(LITE, compute)


def test_a_mesh_of_devices_is_as_good_as_its_sizes():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = ShardingRules(**{field.name: () for field in dataclasses.fields(ShardingRules)})
    check_layout(LITE, ComputeConfig(rules=rules), mesh.shape)


def test_the_examples_of_launchers_and_their_docs_can_be_laid_out():
    root, recipe, found = Path(__file__).parents[2], load_recipe("demo/pretrain", PretrainConfig), 0
    for path in (root / "README.md", *(root / "docs").glob("*.md"), *(root / "scripts").iterdir()):
        for line in re.findall(r"pretrain,? demo/pretrain(.*--mesh.*)", path.read_text(encoding="utf-8")):
            given = {name: int(size) for name, size in re.findall(r'--([\w.-]+),? "?(\d+)', line)}
            sizes = {name.removeprefix("mesh."): size for name, size in given.items() if name.startswith("mesh.")}
            rows = given.get("batch-size", recipe.batch_size) // recipe.step.microbatches
            check(recipe.model, recipe.compute, rows=rows, columns=recipe.data.seq_len, said=f"{path}: {rows}", **sizes)
            found += 1
    assert found > 6

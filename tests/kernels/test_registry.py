"""Operation → implementation for each target, and what is said where a slow one is taken."""

import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_kernels import (
    BlockScaled,
    Target,
    Visible,
    choose,
    cpu,
    mla_attention,
    product,
    registry,
    routed_experts,
    table,
)
from deepseek_kernels.block_fp8 import FP8
from deepseek_kernels.weights import Columns

CPU, H100, A100 = Target("cpu"), Target("cuda", "9.0", 132), Target("cuda", "8.0")
TPU, V4 = Target("tpu", "TPU v5p"), Target("tpu", "TPU v4")
OPERATIONS = ["product", "grouped_matmul", "fp8_matmul", "routed_experts", "look_up"]
OPERATIONS += ["mla_attention", "gqa_attention", "mla_decode", "gqa_decode", "router", "rms_norm"]

EXPECTED = {  # in the order of OPERATIONS
    (CPU, "float32"): ["c", "c", "dequantised", "fused", "scatter", "c", "c", "c"],
    (CPU, "bfloat16"): ["dot", "blocks", "dequantised", "sorted", "scatter", "blockwise", "blockwise", "blockwise"],
    (H100, "bfloat16"): ["dot", "hopper", "hopper", "sorted", "sorted", "hopper", "cudnn", "hopper"],
    (H100, "float32"): ["dot", "blocks", "dequantised", "sorted", "sorted", "blockwise", "blockwise", "blockwise"],
    (A100, "bfloat16"): ["dot", "blocks", "dequantised", "sorted", "sorted", "blockwise", "cudnn", "blockwise"],
    (TPU, "bfloat16"): ["dot", "megablox", "dequantised", "sorted", "scatter", "splash", "splash", "tpu"],
    (V4, "bfloat16"): ["dot", "ragged_dot", "dequantised", "sorted", "scatter", "blockwise", "blockwise", "blockwise"],
    (TPU, "float32"): ["dot", "ragged_dot", "dequantised", "sorted", "scatter", "blockwise", "blockwise", "blockwise"],
}
for (target, dtype), implementations in EXPECTED.items():
    implementations += ["c" if (target, dtype) == (CPU, "float32") else "rows"]
    implementations += 2 * ["plain"]  # of as many tokens as training has


def names(target, dtype):
    found = table(target, dtype)
    assert list(found) == OPERATIONS
    return [choice.name for choice in found.values()]


@pytest.mark.parametrize(("target", "dtype"), EXPECTED, ids=str)
def test_each_operation_has_its_implementation(target, dtype):
    assert names(target, dtype) == EXPECTED[target, dtype]


def test_a_cpu_without_a_compiler_runs_plain_programs(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert names(CPU, "float32") == EXPECTED[CPU, "bfloat16"]
    choice = table(CPU, "float32")["grouped_matmul"]
    assert "C compiler" in choice.reason and choice.rows == 64


def test_rows_and_reasons():
    assert table(H100, "bfloat16")["grouped_matmul"].rows == 128
    assert table(H100, "bfloat16")["grouped_matmul"].reason == ""
    few = {
        rows: choose("grouped_matmul", H100, jnp.bfloat16, rows=rows, groups=64, widths=(256, 256)).rows
        for rows in (6, 512, 1024, 1536, 1537)
    }
    assert few == {6: 16, 512: 16, 1024: 32, 1536: 32, 1537: 128}
    assert "capability 9.0, not cuda 8.0" in table(A100, "bfloat16")["grouped_matmul"].reason
    narrow = choose("grouped_matmul", H100, jnp.bfloat16, rows=64, groups=4, widths=(96, 256))
    assert narrow.name == "blocks" and "not (96, 256)" in narrow.reason


def test_a_dequantised_copy_is_said(caplog):
    registry.say.cache_clear()
    weights = {F: BlockScaled(np.zeros((4, 256, F), FP8), np.zeros((4, 2, -(-F // 128)))) for F in (256, 328)}
    facts: dict[str, Any] = {"rows": 64, "groups": 4}
    for target, name, dtype in (
        *[(H100, "hopper", "bfloat16"), (A100, "blocks", "bfloat16"), (TPU, "megablox", "bfloat16")],
        *[(V4, "ragged_dot", "bfloat16"), (CPU, "c", "float32"), (CPU, "blocks", "bfloat16")],
    ):
        for F, weight in weights.items():
            choice = choose("grouped_matmul", target, dtype, widths=(256, 320), weight=weight, **facts)
            copied = f"a copy of the weight in {dtype}" in choice.reason
            assert choice.name == name and copied == (target != H100 or F == 328)
    of_hopper = [record for record in caplog.records if "grouped_matmul in bfloat16 on cuda:9.0" in record.getMessage()]
    assert len(of_hopper) == 1 and "hopper, a copy of the weight in bfloat16: it needs D" in of_hopper[0].getMessage()


def test_a_dequantised_copy_is_said_of_what_is_named_and_of_a_product_by_head(caplog):
    registry.say.cache_clear()
    ragged = BlockScaled(np.zeros((4, 256, 328), FP8), np.zeros((4, 2, 3)))
    facts: dict[str, Any] = {"rows": 64, "groups": 4, "widths": (256, 320), "weight": ragged}
    for name in ("blocks", "hopper", "reference", "blocks"):
        assert choose("grouped_matmul", H100, "bfloat16", implementation=name, **facts).name == name
    kv_b = BlockScaled(jnp.zeros((128, 2, 64), FP8), jnp.ones((1, 1)), ((1, 128), (2, 128)))
    q = jnp.zeros((1, 1, 2, 32), jnp.bfloat16)
    for _ in range(2):
        product("bshn,chn->bshc", q, Columns(kv_b, 0, 32), target=H100)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    copied = "a copy of the weight in bfloat16"
    grouped = [f"grouped_matmul in bfloat16 on {H100}: {name}, {copied}" for name in ("blocks", "hopper", "reference")]
    expected = [*grouped, f"product in bfloat16 on {H100}: dot, {copied}"]
    assert [line[: len(right)] for line, right in zip(said, expected, strict=True)] == expected


def test_cudnn_takes_causal_rows_and_their_segments():
    facts: dict[str, Any] = {"in_row_order": True, "queries": 64, "keys": 64, "key_width": 192, "value_width": 128}
    assert choose("gqa_attention", H100, jnp.bfloat16, **facts).name == "cudnn"
    segments: dict[str, Any] = {**facts, "in_row_order": False, "in_segments": True}
    assert choose("gqa_attention", H100, jnp.bfloat16, **segments).name == "cudnn"
    for case in facts, segments:  # MLA's by the kernels of its own; on several devices by cuDNN, while it takes them
        assert choose("mla_attention", H100, jnp.bfloat16, **case).name == "hopper"
    several = choose("mla_attention", H100, jnp.bfloat16, **facts, devices=2)
    assert several.name == "cudnn" and "not hopper: it needs one device" in several.reason
    for name, value in {"devices": 2, "shared_by": 4, "value_width": 256}.items():
        refused = choose("gqa_attention", H100, jnp.bfloat16, **{**segments, name: value})
        assert "not cudnn: segments need" in refused.reason
    for other in ({"in_row_order": False}, {"queries": 32}, {"value_width": 64}, {"key_width": 260}):
        choice = choose("mla_attention", H100, jnp.bfloat16, **{**facts, **other})
        assert choice.name == "blockwise" and "not cudnn: it needs" in choice.reason
        with pytest.raises(ValueError, match="'cudnn' of mla_attention cannot run on .*9.0.*: it needs"):
            choose("mla_attention", H100, jnp.bfloat16, implementation="cudnn", **{**facts, **other})


def test_what_does_not_exist_or_cannot_run_is_named():
    names = "auto, c_few, c, hopper, hopper_by_head, dot"
    with pytest.raises(ValueError, match=f"implementation='pallas' of product: expected one of {names}"):
        choose("product", CPU, jnp.float32, implementation="pallas")
    with pytest.raises(ValueError, match="operation='addition': expected one of product, "):
        choose("addition", CPU, jnp.float32)
    with pytest.raises(ValueError, match="'c' of product cannot run on tpu:TPU v5p: it needs a CPU, not tpu"):
        choose("product", TPU, jnp.float32, implementation="c")
    with pytest.raises(ValueError, match="'fused' of routed_experts cannot run on .*float32, not bfloat16"):
        choose("routed_experts", CPU, jnp.bfloat16, implementation="fused")


def test_a_slow_choice_is_said_once(caplog):
    registry.say.cache_clear()
    with caplog.at_level(logging.INFO, "deepseek_kernels"):
        for _ in range(2):
            table(A100, "bfloat16")
    said = {record.getMessage(): record.levelname for record in caplog.records}
    assert len(said) == len(caplog.records) == 4
    levels = {message.split()[0]: level for message, level in said.items()}
    assert levels == dict.fromkeys(["grouped_matmul", "fp8_matmul", "mla_attention", "mla_decode"], "WARNING")
    assert any("blocks, not hopper: it needs cuda of capability 9.0" in message for message in said)


def test_the_target_of_this_process_and_of_a_mesh():
    assert Target.here() == CPU
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    with jax.set_mesh(mesh):
        assert Target.here() == CPU
        assert jax.jit(lambda x: x * len(Target.here().platform))(1) == 3


@pytest.mark.parametrize("fp8", [False, True])
def test_a_devices_own_product_has_its_kernel_on_a_mesh(fp8):
    """Inside a shard_map over all axes; the compiler splits no kernel: outside, or over some axes, there is none."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    rows, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    shape = jax.ShapeDtypeStruct
    w: Any = shape((256, 256), jnp.bfloat16)
    if fp8:
        w = BlockScaled(shape((256, 256), FP8), shape((2, 2), jnp.float32), terms_last=True)
    multiply = functools.partial(product, "td,df->tf", target=H100)

    def found(**axes):
        run = jax.shard_map(multiply, in_specs=(rows, whole), out_specs=rows, check_vma=False, **axes)
        with jax.set_mesh(mesh):
            traced = jax.jit(run if axes else multiply).trace(shape((16, 256), jnp.bfloat16), w)
            return "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

    assert found(axis_names={"x", "y"})
    assert not found(axis_names={"x"}) and not found()


@pytest.mark.parametrize(("target", "platform"), [(H100, "cuda"), (TPU, "tpu")], ids=str)
def test_a_layers_gradient_is_lowered_for_its_target_on_a_cpu_host(target, platform):
    """Attention and routed experts with float32 masters: the target's kernels, and none of this processor's."""
    D, H, E, F, tokens = 256, 2, 4, 256, 256
    weights = {
        "q": (D, H, 192),
        "kv": (D, H, 256),
        "pe": (D, 64),
        "o": (H, 128, D),
        "wi": (E, D, 2, F),
        "wo": (E, F, D),
    }

    def loss(w, x, gates, chosen):
        multiply = functools.partial(product, target=target)
        keys = multiply("bsd,dhw->bshw", x, w["kv"]), multiply("bsd,dr->bsr", x, w["pe"])
        queries = multiply("bsd,dhk->bshk", x, w["q"])
        out = mla_attention(queries, *keys, visible=Visible(), scale=0.1, target=target)
        y = multiply("bshv,hvd->bsd", out, w["o"]).reshape(tokens, D)
        return jnp.sum(routed_experts(y, gates, chosen, w["wi"], w["wo"], target=target).astype(jnp.float32))

    operands = [jax.ShapeDtypeStruct((2, tokens // 2, D), jnp.bfloat16)]
    operands += [jax.ShapeDtypeStruct((tokens, 2), dtype) for dtype in (jnp.float32, jnp.int32)]
    masters = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in weights.items()}
    text = jax.jit(jax.grad(loss)).trace(masters, *operands).lower(lowering_platforms=(platform,)).as_text()
    assert not re.search(r"deepseek_(grouped|experts|attention)", text)
    assert ("mosaic_gpu" in text) == ("hopper_attention_gradients" in text) == (platform == "cuda")
    assert ("tpu_custom_call" in text) == ("splash_mha_dkv" in text) == (platform == "tpu")
    assert "ragged_dot" not in text

"""V3's train step and decode step, lowered on a CPU host for the machines that they are meant for."""

import dataclasses
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.requests import make_requests
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import sampling_config
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import StepConfig, make_step
from deepseek_jax.workflows.recipe import load_recipe

TARGETS = [("cuda:9.0:132", "cuda"), ("tpu:TPU v5p", "tpu")]


def v3() -> ModelConfig:
    """All its widths; a dense layer and a MoE layer, whose programs are those of all layers."""
    return dataclasses.replace(
        load_recipe("models/deepseek_v3", ModelConfig), num_hidden_layers=2, first_k_dense_replace=1
    )


# What the experts' and attention's kernels are called: megablox has no other name for its own.
KERNELS = {"cuda": {"mosaic_gpu", "cudnn$fmha"}, "tpu": {'kernel_name = "kernel"', "splash_mha_fwd"}}


def check(traced, platform: str) -> str:
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert not re.search(r"deepseek_(grouped|experts|attention)|ragged_dot", text)  # the first are the C kernels
    assert {name for names in KERNELS.values() for name in names if name in text} == KERNELS[platform]
    return text


@pytest.mark.parametrize(
    ("remat", "products", "attention", "choices"),
    [("none", 6, 2, 1), ("dots", 6, 2, 1), ("kernels", 6, 2, 1), ("full", 7, 4, 2)],
)
def test_what_is_kept_is_not_computed_again(remat, products, attention, choices):
    """V2-Lite on Hopper: the experts' two products and their four gradients, and the gate's; attention of two stacks.
    With nothing kept, gate and up are multiplied again; what comes out of an expert is not needed by any gradient.
    Kept rows need the choice of experts that sorted them: the router's must be kept too."""
    text = gradient(ComputeConfig(dtype="bfloat16", target="cuda:9.0:132", remat=remat), "cuda")
    assert text.count("custom_call @mosaic_gpu") == products + 1
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == attention
    assert len(re.findall(r"= chlo\.top_k|custom_call @mhlo\.topk", text)) == choices


def gradient(compute, platform: str, rows: int = 1) -> str:
    """V2-Lite's, lowered."""
    config = dataclasses.replace(load_recipe("models/deepseek_v2_lite", ModelConfig), num_hidden_layers=3)
    params, bias = transformer.abstract_arrays(config, compute)

    def loss(params, tokens):
        model = transformer.merge(config, params, bias, compute)
        return jnp.sum(model(tokens, head=False).hidden.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((rows, 512), jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def of_tpu(text: str) -> tuple[int, ...]:
    """Grouped products, and attention forward and backward. Both stacks of layers call one program of attention's."""
    return tuple(text.count(f'kernel_name = "{name}') for name in ('kernel"', "splash_mha_fwd", "splash_mha_dkv"))


@pytest.mark.parametrize(("remat", "kernels"), [("kernels", (6, 1, 2)), ("full", (7, 2, 2))])
def test_what_is_kept_is_not_computed_again_on_a_tpu(remat, kernels):
    assert of_tpu(gradient(ComputeConfig(dtype="bfloat16", target="tpu:TPU v5p", remat=remat), "tpu")) == kernels


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"context": 2}], ids=str)
def test_kernels_of_tpus_on_a_mesh(axes):
    """Each device attends to its own rows and heads; where sequences are split none can, and blocks do it."""
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        text = gradient(ComputeConfig(dtype="bfloat16", target="tpu:TPU v5p", remat="kernels"), "tpu", rows=8)
    assert of_tpu(text) == ((6, 0, 0) if "context" in axes else (6, 1, 2))


@pytest.mark.parametrize(("target", "platform"), TARGETS)
def test_the_train_step(target, platform):
    config, compute = v3(), ComputeConfig(dtype="bfloat16", target=target, remat="full")
    optimizer = make_optimizer(OptimizerConfig(), config, 10)
    create = lambda params, bias: TrainState(jnp.int32(0), params, optimizer.init(params), bias)  # noqa: E731
    state = jax.eval_shape(create, *transformer.abstract_arrays(config))
    batch = {name: jax.ShapeDtypeStruct((2, 4096), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 4096), jnp.float32)
    step = make_step(config, LanguageModelLoss(), optimizer, StepConfig(), compute=compute)
    text = check(jax.jit(step).trace(state, batch), platform)
    assert ("splash_mha_dkv" in text) == (platform == "tpu")


@pytest.mark.parametrize(("target", "platform"), TARGETS)
def test_prefill_and_decode(target, platform):
    config, compute = sampling_config(v3()), ComputeConfig(dtype="bfloat16", target=target)
    params, bias = transformer.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
    requests = make_requests([[1, 2, 3]] * 64, SamplingParams(max_tokens=64), pad_id=2)
    text = check(generate.trace(config, compute, jax.eval_shape(transformer.unstack, params), bias, requests), platform)
    assert ('kernel_name = "mla_decode"' in text) == (platform == "tpu")


def shapes_cut_out(jaxpr):
    """Of what a program and its inner ones take out of larger arrays."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dynamic_slice", "gather"):
            yield from (var.aval.shape for var in equation.outvars)
        if equation.primitive.name == "scan":
            given = equation.params["num_consts"] + equation.params["num_carry"]
            yield from ((1, *var.aval.shape) for var in equation.params["jaxpr"].jaxpr.invars[given:])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_cut_out(inner)


def test_scanned_layers_read_experts_and_cache_where_they_lie():
    config = dataclasses.replace(sampling_config(v3()), num_hidden_layers=3)
    compute = ComputeConfig(dtype="bfloat16", target="cuda:9.0:132", scan_decode=True)
    params, bias = transformer.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
    requests = make_requests([[1, 2, 3]] * 64, SamplingParams(max_tokens=64), pad_id=2)
    traced = generate.trace(config, compute, params, bias, requests)
    cut = set(shapes_cut_out(traced.jaxpr.jaxpr))
    assert (1, 7168, 576) in cut  # a dense weight is
    assert not [
        shape for shape in cut if len(shape) > 3 and 256 in shape[:2] or shape[-3:] == (64, requests.columns, 576)
    ]

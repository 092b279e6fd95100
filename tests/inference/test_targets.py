"""V3's train step and decode step, lowered on a CPU host for the machines that they are meant for."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from deepseek_jax.cli.bench_training import training_flops
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.decoding import decode
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.paged import empty_pages, read
from deepseek_jax.inference.programs import gathers
from deepseek_jax.inference.requests import make_requests
from deepseek_jax.inference.rows import Rows
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.serving_config import ServingConfig
from deepseek_jax.inference.weights import sampling_compute, sampling_config
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import StepConfig, make_step
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe

TARGETS = [("cuda:9.0:132", "cuda"), ("tpu:TPU v5p", "tpu")]


def v3() -> ModelConfig:
    """All its widths; a dense layer and a MoE layer, whose programs are those of all layers."""
    return dataclasses.replace(
        load_recipe("models/deepseek_v3", ModelConfig), num_hidden_layers=2, first_k_dense_replace=1
    )


# What the experts' and attention's kernels are called: megablox has no other name for its own.
KERNELS = {"cuda": {"mosaic_gpu", "@hopper_attention"}, "tpu": {'kernel_name = "kernel"', "splash_mha_fwd"}}


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
    assert of_hopper(text) == (attention, 2)
    others = [body for body in text.split("\n  func.func") if not body.startswith(" private @hopper_attention")]
    assert sum(body.count("custom_call @mosaic_gpu") for body in others) == products + 1
    assert len(re.findall(r"= chlo\.top_k|custom_call @mhlo\.topk", text)) == choices


def gradient(compute, platform: str, rows: int = 1) -> str:
    """V2-Lite's, lowered."""
    config = dataclasses.replace(load_recipe("models/deepseek_v2_lite", ModelConfig), num_hidden_layers=3)
    params, bias = parameters.abstract_arrays(config, compute)

    def loss(params, tokens):
        model = parameters.merge(config, params, bias, compute)
        return jnp.sum(model(tokens, head=False).hidden.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((rows, 512), jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def of_hopper(text: str) -> tuple[int, ...]:
    """Calls of attention, forward and backward: its kernels stand in functions that both stacks call."""
    return tuple(len(re.findall(rf"call @hopper_attention{of}(_\d+)?\(%", text)) for of in ("", "_gradients"))


def of_tpu(text: str) -> tuple[int, ...]:
    """Grouped products, and attention forward and backward. Both stacks of layers call one program of attention's."""
    return tuple(text.count(f'kernel_name = "{name}') for name in ('kernel"', "splash_mha_fwd", "splash_mha_dkv"))


@pytest.mark.parametrize(("remat", "kernels"), [("kernels", (6, 1, 2)), ("full", (7, 2, 2))])
def test_what_is_kept_is_not_computed_again_on_a_tpu(remat, kernels):
    assert of_tpu(gradient(ComputeConfig(dtype="bfloat16", target="tpu:TPU v5p", remat=remat), "tpu")) == kernels


@pytest.mark.parametrize(("target", "platform"), TARGETS)
@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"context": 2}], ids=str)
def test_kernels_on_a_mesh(axes, target, platform):
    """Each device attends to its own rows and heads; where rows are split, with its own queries."""
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        text = gradient(ComputeConfig(dtype="bfloat16", target=target, remat="kernels"), platform, rows=8)
    if platform == "tpu":
        assert of_tpu(text) == (6, 1, 2)
    else:
        assert of_hopper(text) == (2, 2)


def test_a_device_of_a_mesh_decodes_with_one_devices_kernels():
    """Of 64 rows eight; dense products too read a layer's weights where they lie. Those by head, like norms, have their
    kernels on one device alone."""

    def calls() -> int:
        config = sampling_config(load_recipe("models/deepseek_v2_lite", ModelConfig))
        config = dataclasses.replace(config, num_hidden_layers=3)
        compute = ComputeConfig(dtype="bfloat16", target="cuda:9.0:132", scan_decode=True)
        params, bias = parameters.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
        # Prompts of more rows than the kernels of few take, on each device.
        requests = make_requests([[1, 2, 3]] * 64, SamplingParams(max_tokens=64), pad_id=2, width=64)
        traced = generate.trace(config, sampling_compute(compute), params, bias, requests)
        functions = traced.lower(lowering_platforms=("cuda",)).as_text().split("\n  func.func private @")
        others = [body for body in functions if not body.startswith(("normalise", "product_by_head"))]
        return sum(body.count("custom_call @mosaic_gpu") for body in others)

    alone = calls()
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        assert calls() == alone > 0


@pytest.mark.parametrize(("target", "platform"), TARGETS)
def test_the_train_step(target, platform):
    compute = ComputeConfig(dtype="bfloat16", target=target, remat="full")
    text = check(traced_step(v3(), compute, LanguageModelLoss(), rows=2), platform)
    assert ("splash_mha_dkv" in text) == (platform == "tpu")


def traced_step(config: ModelConfig, compute: ComputeConfig, loss: LanguageModelLoss, *, rows: int):
    """The train step of rows of 4096 tokens, of shapes alone."""
    optimizer = make_optimizer(OptimizerConfig(), config, 10)
    create = lambda params, bias: TrainState(jnp.int32(0), params, optimizer.init(params), bias)  # noqa: E731
    state = jax.eval_shape(create, *parameters.abstract_arrays(config))
    batch = {name: jax.ShapeDtypeStruct((rows, 4096), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((rows, 4096), jnp.float32)
    step = make_step(config, loss, optimizer, StepConfig(), compute=compute)
    return jax.jit(step).trace(state, batch)


def test_with_everything_kept_a_step_computes_what_the_model_needs():
    """V2-Lite's benchmark on Hopper: the step's products and kernels beside three times the forward pass."""
    recipe = load_recipe("bench/v2_lite_8_layers", PretrainConfig)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=3))
    compute = dataclasses.replace(recipe.compute, target="cuda:9.0:132")
    traced = traced_step(recipe.model, compute, recipe.loss, rows=4)
    done, needed = count_flops(traced.jaxpr.jaxpr), training_flops(recipe) * 4 * 4096
    assert needed <= done <= 1.15 * needed, done / needed


def count_flops(jaxpr) -> int:
    """Of matrix products and of the Hopper kernels, told by their operands."""
    total = 0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval.shape if eqn.outvars else ()
        shapes: list[Any] = [getattr(operand.aval, "shape", ()) for operand in eqn.invars]
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(shapes[0][axis] for axis in contracted)
        elif name == "mpmd_map" and len(out) == 4:
            total += attention_kernel_flops(
                shapes[4], shapes[5], gradients=len(shapes) > 7, of_queries=len(eqn.outvars) == 1
            )
        elif name == "mpmd_map":  # groups' numbers or sizes, then rows with matrices or with rows
            matrices = [shape for shape in (*shapes, out) if len(shape) == 3]
            assert len(matrices) <= 1, shapes
            total += sum(2 * shapes[1][0] * D * F for _, D, F in matrices)  # none: the gate's gradient
        else:
            assert not name.startswith("dot_product_attention"), name
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(count_flops(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
    return total


def attention_kernel_flops(q, kv, *, gradients: bool, of_queries: bool) -> int:
    """Half a square for each product: scores, dq and dk are as wide as keys; results, dp and dv as values. Both kernels
    of gradients make scores and dp."""
    (B, S, H, K), V = q, kv[-1] - (192 - 64)  # keys as far as they are not the rotated ones
    return B * S * S * H * (K + V if not gradients else 2 * K + V if of_queries else 2 * K + 2 * V)


@pytest.mark.parametrize(("target", "platform"), TARGETS)
def test_prefill_and_decode(target, platform):
    config, compute = sampling_config(v3()), ComputeConfig(dtype="bfloat16", target=target)
    params, bias = parameters.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
    requests = make_requests([[1, 2, 3]] * 64, SamplingParams(max_tokens=64), pad_id=2)
    text = check(generate.trace(config, compute, jax.eval_shape(parameters.unstack, params), bias, requests), platform)
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
    params, bias = parameters.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
    requests = make_requests([[1, 2, 3]] * 64, SamplingParams(max_tokens=64), pad_id=2)
    traced = generate.trace(config, compute, params, bias, requests)
    cut = set(shapes_cut_out(traced.jaxpr.jaxpr))
    assert (1, 7168, 576) in cut  # a dense weight is
    assert not [
        shape for shape in cut if len(shape) > 3 and 256 in shape[:2] or shape[-3:] == (64, requests.columns, 576)
    ]


@pytest.mark.parametrize(
    ("target", "platform", "page", "cache"),
    [(*TARGETS[0], 64, "compute"), (*TARGETS[0], 64, "float8_e4m3"), (*TARGETS[1], 128, "compute")],
)
def test_requests_read_pages_where_they_lie(target, platform, page, cache):
    """In decoding, and when more of a prompt is read in: kernels take the pages, no copy of them."""
    config = dataclasses.replace(sampling_config(v3()), num_hidden_layers=3)
    compute = ComputeConfig(dtype="bfloat16", target=target, scan_decode=True)
    assert not gathers(config, compute, ServingConfig(page=page, cache=cache))
    params, bias = parameters.abstract_arrays(config, ComputeConfig(param_dtype="bfloat16"))
    pages = jax.eval_shape(lambda: empty_pages(config, compute, 96, page, cache))
    assert pages.layers[0].shape[-1] == (640 if platform == "tpu" else 576)  # else XLA would copy them twice a call
    numbers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    given = config, compute, params, bias, pages
    rows = dataclasses.replace(Rows.filling(64, 8), allowed_BV=numbers(64, -(-config.vocab_size // 32)))
    for traced in (
        decode.trace(*given, rows, numbers(), jax.ShapeDtypeStruct((), bool), most=8),
        read.trace(*given, numbers(2, 256), numbers(2), numbers(2, 8), fresh=False),
    ):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "mosaic_gpu" in text if platform == "cuda" else 'kernel_name = "mla_decode"' in text
        table = 8, page  # of a row
        cut = [shape for shape in shapes_cut_out(traced.jaxpr.jaxpr) if shape[-1] in (640, 576, 512)]
        assert not [shape for shape in cut if 96 in shape or shape[-3:-1] == table]

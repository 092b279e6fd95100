"""``bench RECIPE``: what it counts, and what it refuses."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.cli.bench_model import ModelBench, ask, measure
from deepseek_jax.cli.bench_training import random_batch, training_flops
from deepseek_jax.cli.device_trace import Event, communication
from deepseek_jax.cli.longest_kernels import kernels_of, longest_kernels
from deepseek_jax.cli.main import main
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.inference.weights import sampling_config
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe


def test_a_batch_is_cut_into_segments():
    batch = random_batch(PretrainConfig(batch_size=3), 7)
    assert batch["tokens"].shape == (3, 128)
    for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
        sizes = np.bincount(segments)[1:]
        assert len(sizes) == 7 and min(sizes) > 0 and np.all(np.diff(segments) >= 0)
        np.testing.assert_array_equal(positions, np.concatenate([np.arange(size) for size in sizes]))


def test_arithmetic_is_three_times_the_forward_pass_and_attention_keeps_to_segments():
    recipe = load_recipe("bench/v2_lite_8_layers", PretrainConfig)
    model = recipe.model
    assert training_flops(recipe) == 3 * (forward_flops(model) + attention_flops(model, 2048))
    apart = training_flops(recipe, 4096)
    assert apart == 3 * forward_flops(model)  # of one token each


def test_what_cannot_be_is_refused(capsys):
    few = ["--new-tokens", "127", "--work", "decode"]
    for wrong in (["--segments", "129"], ["--repeats", "0"], ["--work", "nothing"], few, ["--quantize", "fp8"]):
        with pytest.raises(SystemExit):
            main(["bench", "demo/pretrain", *wrong])
        assert wrong[0][2:].replace("-", "_") in capsys.readouterr().err
    assert main(["bench", "nothing"]) == 1
    assert "no recipe 'nothing'" in capsys.readouterr().err


def test_the_peer_is_asked_for_the_same_work(tmp_path):
    """In its place a program that writes the request down."""
    peer = tmp_path / "python"
    speed = lambda tokens: {"tokens_per_second": tokens}  # noqa: E731
    found = {"peer": "it", "train": speed(1234.5), "phases": {"2": {"decode": speed(6.0)}}}
    peer.write_text(f"#!/bin/sh\ncat > {tmp_path}/request\necho '{json.dumps(found)}'\n")
    peer.chmod(0o755)
    recipe = dataclasses.replace(load_recipe("demo/pretrain", PretrainConfig), batch_size=2)
    rows: Any = {"train": "1,234 tokens a second, it", "decode": "6 tokens a second, it"}
    for work, row in rows.items():
        assert ask(ModelBench(recipe, work=work, columns=16, new_tokens=4, peer_python=str(peer))) == row
        request = json.loads((tmp_path / "request").read_text())
        assert request["config"]["hidden_size"] == recipe.model.hidden_size
        assert (request["rows"], request["seq"]) == (2, 16) if work == "train" else request["prompt"] == 12
    peer.write_text("#!/bin/sh\necho out of memory >&2; exit 1")
    assert ask(ModelBench(recipe, peer_python=str(peer))) == "the peer failed: ['out of memory']"


@pytest.mark.parametrize(("scanned", "quantize", "size"), [(False, "none", 4), (True, "fp8", 1), (False, "int8", 1)])
def test_prefill_and_decoding_of_a_tiny_recipe(scanned, quantize, size):
    """What a step reads, of experts those that are chosen, and what is said of the routing."""
    tiny = dataclasses.replace(load_recipe("demo/pretrain", PretrainConfig).model, num_hidden_layers=2)
    compute = ComputeConfig(scan_decode=scanned)
    recipe = PretrainConfig(batch_size=2, model=tiny, compute=compute)
    for work in ("prefill", "decode"):
        found = measure(ModelBench(recipe, work=work, columns=16, new_tokens=2, repeats=1, quantize=quantize))
        assert {"work", "tokens a second", "time", "peak memory", "compile time", "routing"} < set(found.facts)
        assert "experts touched in a layer" in found.facts["routing"]
        assert found.call() is not None
    params = count_parameters(sampling_config(tiny))
    touched = float(found.facts["weights and cache"].split(" GB")[0]) * 1e9
    assert ("matrices in" in found.facts["work"]) == (quantize != "none")
    assert size * params["parameters_active"] < 1.5 * touched < 1.5 * size * params["parameters_total"]


def test_drafts_beside_none():
    """A turn's tokens are what the coin says, 1 + 1, and that they do not cost nothing is said."""
    tiny = dataclasses.replace(load_recipe("demo/pretrain", PretrainConfig).model, num_hidden_layers=2)
    recipe = PretrainConfig(batch_size=2, model=tiny)
    found = measure(ModelBench(recipe, work="decode", columns=16, new_tokens=2, repeats=1, drafts=1, acceptance=1.0))
    assert "1.00 of a row in a turn" in found.facts["without drafts"]
    assert "2.00 of a row in a turn" in found.facts["drafts: 1"]
    bound = float(found.facts["ratio"].split(" of the ")[1].split("×")[0])
    assert 0.5 < bound < 2


def test_a_cpus_trace_has_no_kernels(tmp_path):
    assert longest_kernels(lambda: jnp.ones(2) + 1, str(tmp_path)) == ([], 0)
    assert list(tmp_path.glob("**/*.xplane.pb"))
    assert communication([]) is None


def test_communication_is_exposed_where_nothing_else_runs():
    """Two devices by hand: of the first a collective of 40 with a product under half of it, 10 of nothing, and one that
    two products hide whole; the second computes alone. Seconds, of each of two calls."""
    nccl = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    first = [
        Event("gemm", 0, 20),
        Event(nccl, 0, 40),
        Event("loop_reduce_fusion", 50, 70),
        Event("gemm", 65, 90),
        Event("all-gather.3", 55, 85),
    ]
    found = communication([first, [Event("gemm", 0, 50)]], calls=2)
    assert found is not None
    np.testing.assert_allclose([second * 4e9 for second in found], [70, 20, 10])
    kernels, span = kernels_of([first, [Event("gemm", 0, 50)]])
    assert (kernels[0].name, kernels[0].calls) == ("gemm", 3) and span == 90e-9
    np.testing.assert_allclose(kernels[0].seconds, 95e-9)

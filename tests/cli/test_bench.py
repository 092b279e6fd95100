"""``bench RECIPE``: what it counts, and what it refuses."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.cli.bench_model import ModelBench, random_batch, training_flops
from deepseek_jax.cli.longest_kernels import longest_kernels
from deepseek_jax.cli.main import main
from deepseek_jax.model.costs import attention_flops, forward_flops
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe


def test_a_batch_is_cut_into_segments():
    batch = random_batch(ModelBench(PretrainConfig(batch_size=3), segments=7))
    assert batch["tokens"].shape == (3, 128)
    for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
        sizes = np.bincount(segments)[1:]
        assert len(sizes) == 7 and min(sizes) > 0 and np.all(np.diff(segments) >= 0)
        np.testing.assert_array_equal(positions, np.concatenate([np.arange(size) for size in sizes]))


def test_arithmetic_is_three_times_the_forward_pass_and_attention_keeps_to_segments():
    options = ModelBench(load_recipe("bench/v2_lite_8_layers", PretrainConfig))
    model = options.recipe.model
    assert training_flops(options) == 3 * (forward_flops(model) + attention_flops(model, 2048))
    apart = training_flops(dataclasses.replace(options, segments=4096))
    assert apart == 3 * forward_flops(model)  # of one token each


def test_what_cannot_be_is_refused(capsys):
    for wrong in (["--segments", "129"], ["--repeats", "0"], ["--work", "nothing"]):
        with pytest.raises(SystemExit):
            main(["bench", "demo/pretrain", *wrong])
        assert wrong[0][2:] in capsys.readouterr().err
    assert main(["bench", "nothing"]) == 1
    assert "no recipe 'nothing'" in capsys.readouterr().err


def test_a_cpus_trace_has_no_kernels(tmp_path):
    assert longest_kernels(lambda: jnp.ones(2) + 1, str(tmp_path)) == ([], 0)
    assert list(tmp_path.glob("**/*.xplane.pb"))

"""What XLA is asked for, of whom."""

from deepseek_jax.parallel.overlap import OPTIONS, overlapping


def test_options_are_for_several_gpus_alone():
    assert overlapping("gpu", 2) == OPTIONS and all(name.startswith("xla_gpu_") for name in OPTIONS)
    for platform, count in (("gpu", 1), ("cpu", 8), ("tpu", 8)):
        assert overlapping(platform, count) == {}

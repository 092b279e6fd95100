"""How a network is computed: what no device here can do is refused before anything compiles."""

from typing import Any

import pytest

from deepseek_jax.compute import ComputeConfig


@pytest.mark.parametrize("field", ["attention", "decode_attention", "experts", "grouped_matmul"])
def test_an_implementation_that_is_none_is_refused(field):
    named: Any = {field: "nonsense"}
    with pytest.raises(ValueError, match=f"{field}='nonsense': expected one of auto, .*"):
        ComputeConfig(**named)


def test_a_target_that_the_devices_are_not_is_refused():
    assert ComputeConfig().on(None).target == ComputeConfig(target="cpu").on(None).target == "cpu"
    with pytest.raises(ValueError, match="target='tpu:TPU v5p': the devices here are cpu"):
        ComputeConfig(target="tpu:TPU v5p").on(None)

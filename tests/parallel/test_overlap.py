from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from jax.sharding import Mesh

from deepseek_jax.parallel.overlap import OPTIONS, TPU_OPTIONS, overlapping


def mesh(platform: str, kind: str, count: int) -> Mesh:
    devices = np.array([SimpleNamespace(platform=platform, device_kind=kind)] * count)
    return Mock(spec=Mesh, devices=devices, size=count)


def test_several_gpus_and_v5p_are_asked_for_overlap_and_no_others():
    assert overlapping(mesh("gpu", "NVIDIA H100 80GB HBM3", 2)) == OPTIONS
    assert overlapping(mesh("tpu", "TPU v5", 2)) == TPU_OPTIONS["TPU v5"]
    assert all(name.startswith("xla_gpu_") for name in OPTIONS)


@pytest.mark.parametrize(
    ("platform", "kind", "count"), [("gpu", "H100", 1), ("cpu", "cpu", 8), ("tpu", "TPU v6 lite", 8)]
)
def test_others_are_compiled_as_they_were(platform, kind, count):
    assert overlapping(mesh(platform, kind, count)) == {}

"""Where the Hopper kernels run: on such a GPU with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from deepseek_kernels import Target


@pytest.fixture
def hopper_gpu():
    if jax.default_backend() == "gpu":
        if Target.here().chip != "9.0":
            pytest.skip("this GPU is not of compute capability 9.0")
        yield
        return
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("Mosaic GPU's interpreter needs jax 0.11")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):  # pyright: ignore[reportAttributeAccessIssue]
        yield

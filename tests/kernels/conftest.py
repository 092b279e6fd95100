"""Where the Hopper kernels run: on such a GPU with ``TEST_ON=cuda``, else in Mosaic GPU's interpreter."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from deepseek_kernels import Target, hopper_fp8


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


@pytest.fixture
def hopper_registers(hopper_gpu, monkeypatch):
    """For kernels that multiply out of registers, which the interpreter does not. A GPU's memory is full of NaN."""

    def multiplied(w, x, slot, mine):
        return jnp.dot(w[slot, mine].astype(jnp.float32), x[slot].astype(jnp.float32).T)

    if jax.default_backend() == "gpu":
        poison = [jnp.full(1 << 26, jnp.nan) for _ in range(8)]
        jax.block_until_ready(poison)
    else:
        monkeypatch.setattr(hopper_fp8, "_from_registers", multiplied)

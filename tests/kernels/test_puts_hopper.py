"""Rows put into other GPUs' memory: lowered without one; run where a host has several, with ``TEST_ON=cuda``."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_kernels import Target
from deepseek_kernels.puts_hopper import put_rows, refuses

HOPPER = Target("cuda", "9.0", 132)
SPLIT = PartitionSpec("x")
needs_jax_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jax 0.10 has no kernels that write in place")


def on_devices(ways):
    mesh = Mesh(np.array(jax.devices()[:ways]), "x")
    run = functools.partial(put_rows, axis="x")
    specs: dict[str, Any] = {"in_specs": (SPLIT, SPLIT), "out_specs": (SPLIT, PartitionSpec())}
    return jax.jit(jax.shard_map(run, mesh=mesh, **specs, check_vma=False)), NamedSharding(mesh, SPLIT)


@needs_jax_11
def test_all_meet_before_the_kernel_and_behind_it():
    run, _ = on_devices(4)
    given = jax.ShapeDtypeStruct((4 * 64, 512), jnp.bfloat16), jax.ShapeDtypeStruct((4 * 4, 16), jnp.int32)
    text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    first, last = (find("stablehlo.all_reduce") for find in (text.find, text.rfind))
    assert text.count("stablehlo.all_reduce") == 2 and first < text.find("@mosaic_gpu") < last


@needs_jax_11
def test_what_is_put_within_a_scan_has_a_gradient():
    @jax.custom_vjp
    def swapped(x, token):
        y, met = put_rows(x, token, axis="x")
        return y.reshape(x.shape) * (1 + met).astype(x.dtype)

    swapped.defvjp(lambda x, token: (swapped(x, token), token), lambda token, dy: (swapped(dy, token), None))
    mesh, token = Mesh(np.array(jax.devices()[:2]), "x"), jnp.arange(64, dtype=jnp.int32).reshape(2, 32)
    layers = lambda x: jax.lax.scan(lambda x, _: (swapped(x, token), None), x, None, length=2)[0]  # noqa: E731
    run = jax.shard_map(layers, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32) ** 2)))
    lowered = gradient.trace(jax.ShapeDtypeStruct((2 * 64, 512), jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 2  # there and back


@pytest.mark.skipif(jax.default_backend() != "gpu" or jax.device_count() < 2, reason="needs several GPUs")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_lie_where_they_were_asked_for(dtype):
    if Target.here().chip != "9.0":
        pytest.skip("this GPU is not of compute capability 9.0")
    ways, tokens, rows, width = jax.device_count(), 512, 2000, 1024
    (run, split), rng = on_devices(ways), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ways, tokens, width), np.float32), dtype)
    token = rng.integers(0, tokens, (ways, ways, rows)).astype(np.int32)
    given = jax.device_put(x.reshape(-1, width), split), jax.device_put(token.reshape(-1, rows), split)
    expected = np.array([[np.asarray(x)[n, token[n, m]] for n in range(ways)] for m in range(ways)])
    for _ in range(10):
        found, met = run(*given)
        np.testing.assert_array_equal(np.asarray(found).reshape(expected.shape), expected)
        assert met == 0


def test_what_cannot_be_put_is_named():
    if jax.__version_info__ >= (0, 11):
        assert not refuses(HOPPER, 4096)
        assert "multiples of 512 bytes" in refuses(HOPPER, 4000)
    assert "Hopper GPUs, not cpu" in refuses(Target("cpu"), 4096)

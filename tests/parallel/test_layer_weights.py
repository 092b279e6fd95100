"""What a layer gets of a stack, and what becomes of its gradient, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.layer_weights import Rounded, weight_of_layer
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.sharding import ShardingRules


def test_a_layers_weight_is_rounded_and_its_gradient_is_summed_so():
    """Against a plain cast: values to the bit; the gradient in bfloat16, and none for the float32 stack."""
    mesh, axes, rules = make_mesh(MeshConfig(fsdp=8)), ("embed", "mlp"), ShardingRules()
    master, x = jnp.linspace(-1.0, 1.0, 128).reshape(16, 8), jnp.ones((4, 16), jnp.bfloat16)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(master, zeros):
            def value(master, zeros):
                w = weight_of_layer(Rounded(master, zeros), axes, rules)
                return jnp.sum((x @ w).astype(jnp.float32) ** 2), w

            (_, w), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(master, zeros)
            return w, gradients

        w, (none, gradient) = run(master, jnp.zeros(master.shape, jnp.bfloat16))
    cast = master.astype(jnp.bfloat16)
    expected = jax.grad(lambda w: jnp.sum((x @ w).astype(jnp.float32) ** 2))(cast)
    np.testing.assert_array_equal(w, cast)
    assert not np.any(none) and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(np.float32), expected.astype(np.float32), rtol=2**-7)

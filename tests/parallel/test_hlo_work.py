"""FLOPs of an HLO's instructions, beside XLA's own count; bytes: see test_roofline.py."""

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.hlo import Module
from deepseek_jax.parallel.hlo_work import convolution_flops, dot_flops


def test_flops_of_products_in_xlas_own_count():
    """XLA's count of the same programs: dots of any axes, and convolutions with windows, strides and dilations."""
    arrays = [jnp.zeros(shape, jnp.float32) for shape in ((4, 8, 16), (4, 16, 32), (2, 9, 9, 3), (3, 3, 3, 5))]
    products = {
        "dot": lambda a, b, x, w: jnp.einsum("bij,bjk->bik", a, b),
        "convolution": lambda a, b, x, w: jax.lax.conv_general_dilated(
            x, w, (2, 1), ((1, 1), (0, 2)), (1, 2), (2, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
    }
    for opcode, function in products.items():
        lowered = jax.jit(function).lower(*arrays)
        program, cost = lowered.compiler_ir("hlo"), lowered.cost_analysis()
        assert program and cost
        module = Module(program.as_hlo_module().to_string())
        instructions = module.computations[module.entry]
        one = next(each for each in instructions.values() if each.opcode == opcode)
        count = dot_flops if opcode == "dot" else convolution_flops
        found = count(one, *(instructions[name].shape for name in one.operands))
        assert found == cost["flops"], opcode

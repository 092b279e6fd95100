"""Kernels as functions of arrays, each beside its plain-``jnp`` reference. Imports jax alone."""

from deepseek_kernels.attention import mla_attention, mla_attention_reference
from deepseek_kernels.block_fp8 import BlockScaled, dequantise, dequantise_reference, quantise
from deepseek_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from deepseek_kernels.product import product, weight_gradient
from deepseek_kernels.registry import Choice, choose, table
from deepseek_kernels.routed_experts import can_fuse_experts, fused_experts, fused_experts_reference
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible
from deepseek_kernels.weights import Columns, InStack

__all__ = [
    "BlockScaled",
    "Choice",
    "Columns",
    "InStack",
    "Target",
    "Visible",
    "can_fuse_experts",
    "choose",
    "dequantise",
    "dequantise_reference",
    "fused_experts",
    "fused_experts_reference",
    "grouped_matmul",
    "grouped_matmul_reference",
    "mla_attention",
    "mla_attention_reference",
    "product",
    "quantise",
    "table",
    "weight_gradient",
]

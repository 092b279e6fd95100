"""Kernels as functions of arrays, each beside its plain-``jnp`` reference. Imports jax alone."""

from deepseek_kernels.attention import mla_attention, mla_attention_reference
from deepseek_kernels.block_fp8 import BlockScaled, dequantise, dequantise_reference, quantise
from deepseek_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference, row_alignment, weight_gradient
from deepseek_kernels.routed_experts import can_fuse_experts, fused_experts, fused_experts_reference

__all__ = [
    "BlockScaled",
    "can_fuse_experts",
    "dequantise",
    "dequantise_reference",
    "fused_experts",
    "fused_experts_reference",
    "grouped_matmul",
    "grouped_matmul_reference",
    "mla_attention",
    "mla_attention_reference",
    "quantise",
    "row_alignment",
    "weight_gradient",
]

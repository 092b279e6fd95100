"""Kernels as functions of arrays, each beside its plain-``jnp`` reference. Imports jax alone."""

from deepseek_kernels.attention import mla_attention, mla_attention_reference
from deepseek_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference, row_alignment

__all__ = [
    "grouped_matmul",
    "grouped_matmul_reference",
    "mla_attention",
    "mla_attention_reference",
    "row_alignment",
]

"""Kernels as functions of arrays, each beside its plain-``jnp`` reference. Imports jax alone."""

from deepseek_kernels.attention import attention_reference, gqa_attention, gqa_decode, mla_attention, mla_decode
from deepseek_kernels.block_fp8 import BlockScaled, dequantise, dequantise_reference, quantise
from deepseek_kernels.cached import FP8Entries, quantise_entries, write_entries
from deepseek_kernels.fp8_matmul import fp8_matmul
from deepseek_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from deepseek_kernels.integers import quantise_groups
from deepseek_kernels.look_up import look_up
from deepseek_kernels.product import product, weight_gradient
from deepseek_kernels.registry import Choice, choose, table
from deepseek_kernels.routed_experts import routed_experts
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible
from deepseek_kernels.weights import Columns, InStack

__all__ = [
    "BlockScaled",
    "Choice",
    "Columns",
    "FP8Entries",
    "InStack",
    "Target",
    "Visible",
    "attention_reference",
    "choose",
    "dequantise",
    "dequantise_reference",
    "fp8_matmul",
    "gqa_attention",
    "gqa_decode",
    "grouped_matmul",
    "grouped_matmul_reference",
    "look_up",
    "mla_attention",
    "mla_decode",
    "product",
    "quantise",
    "quantise_entries",
    "quantise_groups",
    "routed_experts",
    "table",
    "weight_gradient",
    "write_entries",
]

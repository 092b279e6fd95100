"""Weights in int8 or int4 as a released folder has them: compressed-tensors' ``pack-quantized``, which llm-compressor
writes and transformers and vLLM read.

A matrix ``X.weight`` (O, I) is three tensors: ``X.weight_packed``, int32 (O, ⌈I · bits / 32⌉), see
``deepseek_kernels.integers.pack``; ``X.weight_scale``, (O, ⌈I / group⌉); ``X.weight_shape``, O and I.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.hf_names import HFTensor, hf_tensors
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.config import ModelConfig
from deepseek_jax.files import read_json_object
from deepseek_jax.hf_families import PACKED
from deepseek_jax.typed import check_types
from deepseek_kernels.block_fp8 import BlockScaled, Groups, scales_shape
from deepseek_kernels.integers import DTYPES, GROUP, quantise_groups, unpack

KEPT_INTEGERS = {f"int{bits}": bits for bits in DTYPES}
STAYS = "kv_b"  # absorbed decoding reads it by head, in both directions, and it is some 1 % of a model
_IGNORED = ("lm_head", "re:.*kv_b_proj$", "re:.*mlp[.]gate$", "re:.*eh_proj$")
_SUFFIXES = ("_packed", "_scale", "_shape")


@dataclasses.dataclass(frozen=True)
class Integers:
    """How the matrices of a model are kept: so many bits, a scale for each ``group`` terms of an output."""

    bits: int
    group: int = GROUP

    def __post_init__(self) -> None:
        check_types(self)
        if self.bits not in DTYPES:
            raise ValueError(f"bits={self.bits}: expected {' or '.join(map(str, DTYPES))}")
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group={self.group}: must be an even number of terms")

    @classmethod
    def named(cls, dtype: str, group: int = GROUP) -> "Integers | None":
        """Of ``int8`` or ``int4``; None for another."""
        return cls(KEPT_INTEGERS[dtype], group) if dtype in KEPT_INTEGERS else None

    @classmethod
    def of_folder(cls, path: str | Path) -> "Integers | None":
        """What a released folder's config.json says, which ``ModelConfig.from_hf`` has checked."""
        found = read_json_object(Path(path) / "config.json").get("quantization_config")
        if not isinstance(found, Mapping) or found.get("quant_method") != PACKED:
            return None
        [of_group] = found["config_groups"].values()
        return cls(of_group["weights"]["num_bits"], of_group["weights"]["group_size"])

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.bits]

    def takes(self, tensor: HFTensor) -> bool:
        """What V3 has in FP8, but for the matrix that is read by head: no router, embedding, head, norm or bias."""
        return tensor.quantised and tensor.path[-1] != STAYS

    def groups(self, tensor: HFTensor) -> Groups:
        """As ``HFTensor.groups``."""
        return tuple((axes, self.group if i == 0 else 1) for i, (axes, _) in enumerate(tensor.groups))

    def names(self, tensor: HFTensor) -> tuple[str, str, str]:
        packed, scale, shape = (tensor.name + suffix for suffix in _SUFFIXES)
        return packed, scale, shape

    def shapes(self, tensor: HFTensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of the three in the file."""
        outputs, inputs = tensor.shape
        return (outputs, -(-inputs * self.bits // 32)), (outputs, -(-inputs // self.group)), (2,)

    def content(self) -> dict[str, Any]:
        """quantization_config of a config.json."""
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
        of_group = {"targets": ["Linear"], "weights": weights | {"group_size": self.group}}
        return {
            "quant_method": PACKED,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": of_group | {"input_activations": None, "output_activations": None}},
            "ignore": [*_IGNORED],
        }

    def problems(self, tensor: HFTensor, files: TensorFiles) -> list[str]:
        """What is wrong with a tensor that the files have packed."""
        found = []
        for name, shape, dtypes in zip(
            self.names(tensor),
            self.shapes(tensor),
            (("int32",), ("bfloat16", "float32", "float16"), ("int64", "int32")),
            strict=True,
        ):
            info = files.tensors.get(name)
            if info is None:
                found.append(f"{name} is missing, but {tensor.name}_packed is there")
            elif info.shape != shape or info.dtype.name not in dtypes:
                found.append(f"{name} is {info.dtype}{list(info.shape)}, not {' or '.join(dtypes)}{list(shape)}")
        return found

    def read(self, tensor: HFTensor, files: TensorFiles) -> tuple[np.ndarray, np.ndarray]:
        """(Numbers (O, I), bfloat16 scales (O, I/group)) of a tensor, quantised where the files have it in floats."""
        packed, scale, _ = self.names(tensor)
        if packed in files.tensors:
            return unpack(files.array(packed), self.bits, tensor.shape[1]), files.array(scale).astype(jnp.bfloat16)
        if tensor.scale_name in files.tensors:
            wide = BlockScaled(files.array(tensor.name), files.array(tensor.scale_name)).astype(jnp.float32)
        else:
            wide = files.array(tensor.name)
        numbers, scales = quantise_groups(np.asarray(wide, np.float32).T, self.bits, self.group, xp=np)
        return numbers.T, scales.T


def packed_names(name: str) -> tuple[str, ...]:
    return tuple(name + suffix for suffix in _SUFFIXES)


def quantise_params(params: Any, config: ModelConfig, scheme: Integers) -> Any:
    """Parameters with the matrices that ``scheme`` takes in integers. Those are used up, one after another; the others
    are handed on."""
    groups = {tensor.path: scheme.groups(tensor) for tensor in hf_tensors(config) if scheme.takes(tensor)}

    def make(path: Sequence[Any], leaf: Any) -> Any:
        found = groups.get(tuple(part.key for part in path))
        if found is None:
            return leaf
        made = jax.block_until_ready(quantise_leaf(leaf, found, scheme.bits))
        leaf.delete()
        return made

    return jax.tree_util.tree_map_with_path(make, params)


def quantise_leaf(leaf: jax.Array, groups: Groups, bits: int) -> BlockScaled:
    """A parameter of any axes in integers, a layer of a stack at a time."""

    def one(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        lead = leaf.ndim - sum(axes for axes, _ in groups)
        axes, group = groups[0]
        terms = range(lead, lead + axes)
        others = [axis for axis in range(leaf.ndim) if axis not in terms]
        turned = jnp.transpose(leaf, (*terms, *others))
        sizes = turned.shape
        matrix = turned.reshape(int(np.prod(sizes[:axes])), -1)
        numbers, scales = quantise_groups(matrix, bits, group)
        numbers = jnp.transpose(numbers.reshape(sizes), [int(axis) for axis in np.argsort((*terms, *others))])
        scales = jnp.moveaxis(scales.reshape(len(scales), *sizes[axes:][:lead], -1), 0, lead)
        return numbers, scales.reshape(scales_shape(leaf.shape, groups))

    if leaf.ndim > sum(axes for axes, _ in groups):
        numbers, scales = jax.jit(lambda leaf: jax.lax.map(one, leaf))(leaf)
    else:
        numbers, scales = jax.jit(one)(leaf)
    return BlockScaled(numbers, scales, groups)

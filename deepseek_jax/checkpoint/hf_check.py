"""Compare the tensors of a released model's files with those its configuration asks for, before any is read."""

import dataclasses
import logging
import re
import warnings

import numpy as np

from deepseek_jax.checkpoint.hf_names import HFTensor, LeafPath, hf_tensors, mtp_copies, mtp_prefix
from deepseek_jax.checkpoint.integers import Integers
from deepseek_jax.checkpoint.safetensors import TensorFiles
from deepseek_jax.config import ModelConfig
from deepseek_kernels.block_fp8 import FP8

_INERT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
_FLOATS = ("bfloat16", "float32", "float16")
_LISTED = 5  # differences that an error message spells out
_CHUNK = 2**24  # bytes compared at a time
_LOG = logging.getLogger(__name__)


def find_mtp(config: ModelConfig, files: TensorFiles) -> ModelConfig:
    """The configuration without the MTP module where the files hold nothing of it, with a warning: transformers
    announces one and never writes it."""
    prefix = mtp_prefix(config)
    if not config.num_nextn_predict_layers or any(name.startswith(prefix) for name in files.tensors):
        return config
    warnings.warn(
        f"num_nextn_predict_layers={config.num_nextn_predict_layers}, but there is no tensor {prefix}*: "
        "loading without the MTP module",
        stacklevel=4,
    )
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def check_tensors(
    config: ModelConfig, files: TensorFiles, *, keep_fp8: bool, integers: Integers | None = None
) -> list[HFTensor]:
    """The tensors to load. Those left out are named: in the log where nothing is lost, else in a warning.

    Raises ValueError naming each (of the first few) that is missing, unknown, or of another shape or dtype, that is
    FP8 without scales, or, with keep_fp8, not FP8 where a released checkpoint has it.
    """
    tensors = hf_tensors(config)
    problems: list[str] = []
    expected: set[str] = set()
    packed: dict[LeafPath, bool] = {}
    for tensor in tensors:
        in_integers = integers is not None and bool(tensor.inputs) and integers.names(tensor)[0] in files.tensors
        if packed.setdefault(tensor.path, in_integers) != in_integers:
            problems.append(f"{tensor.name} and what lies beside it are not all in integers")
        if integers is not None and in_integers:
            expected.update(integers.names(tensor))
            problems += integers.problems(tensor, files)
            continue
        expected.add(tensor.name)
        info = files.tensors.get(tensor.name)
        if info is None:
            untied = " (tie_word_embeddings=False)" if tensor.name == "lm_head.weight" else ""
            problems.append(f"{tensor.name} is missing{untied}")
            continue
        if info.shape != tensor.shape:
            problems.append(f"{tensor.name} has shape {list(info.shape)}, the configuration wants {list(tensor.shape)}")
        if info.dtype == FP8 and tensor.inputs:
            expected.add(tensor.scale_name)
            problems += _scale_problems(tensor, files)
        elif info.dtype.name not in _FLOATS:
            problems.append(f"{tensor.name} has dtype {info.dtype}, not one of {', '.join(_FLOATS)}")
        if keep_fp8 and tensor.quantised != (info.dtype == FP8):
            there, here = info.dtype, "float8_e4m3fn" if tensor.quantised else "a wider dtype"
            problems.append(f"{tensor.name} is {there}; dtype='float8_e4m3' keeps FP8 checkpoints and needs {here}")
    repeats = mtp_copies(config) if config.num_nextn_predict_layers else {}
    if config.tie_word_embeddings:
        repeats["lm_head.weight"] = "model.embed_tokens.weight"
    extra = [name for name in files.tensors if name not in expected and name not in repeats]
    extra = _without_mtp(config, extra)
    inert = [name for name in extra if _INERT.fullmatch(name)]
    problems += [f"{name} is unknown" for name in extra if name not in inert]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(f"{files.path}: the files do not hold this model: {'; '.join(problems[:_LISTED])}{more}")
    if inert:
        _LOG.info("left out: %s", ", ".join(inert))
    for copy, original in repeats.items():
        _check_copy(files, copy, original)
    return tensors


def _without_mtp(config: ModelConfig, names: list[str]) -> list[str]:
    """Without an MTP module that config.json does not announce, with a warning: how one is switched off."""
    prefix = mtp_prefix(config)
    if config.num_nextn_predict_layers or prefix + "eh_proj.weight" not in names:
        return names
    warnings.warn(f"num_nextn_predict_layers=0: leaving out the MTP module in the files, {prefix}*", stacklevel=5)
    return [name for name in names if not name.startswith(prefix)]


def _scale_problems(tensor: HFTensor, files: TensorFiles) -> list[str]:
    scale = files.tensors.get(tensor.scale_name)
    if scale is None:
        return [f"{tensor.scale_name} is missing, but {tensor.name} is FP8"]
    if scale.shape != tensor.scale_shape or scale.dtype != np.float32:
        return [f"{scale.name} is {scale.dtype}{list(scale.shape)}, not float32{list(tensor.scale_shape)}"]
    return []


def _check_copy(files: TensorFiles, copy: str, original: str) -> None:
    """Name a tensor that ought to repeat another one and does not; it is not used either way."""
    if copy not in files.tensors:
        return
    one, other = files.tensors[copy], files.tensors[original]
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    if same:
        flat, wanted = (files.array(name).reshape(-1).view(np.uint8) for name in (copy, original))
        same = all(
            np.array_equal(flat[at : at + _CHUNK], wanted[at : at + _CHUNK]) for at in range(0, flat.size, _CHUNK)
        )
        files.forget(copy)
        files.forget(original)
    if not same:
        warnings.warn(f"{copy} differs from {original}, which is used in its place", stacklevel=4)

"""DeepSeek in JAX: from pretraining to answers."""

from deepseek_jax.checkpoint.hf_save import save_hf
from deepseek_jax.checkpoint.model import Model, load, load_hf
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.inference.cache import Cache
from deepseek_jax.inference.engine import Completion, Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model.transformer import ModelOutput, Transformer

__all__ = [
    "Cache",
    "Completion",
    "ComputeConfig",
    "Engine",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "RopeScaling",
    "SamplingParams",
    "Transformer",
    "load",
    "load_hf",
    "save_hf",
]

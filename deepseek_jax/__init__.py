"""DeepSeek in JAX: from pretraining to answers."""

from deepseek_jax.checkpoint.hf_load import load_hf
from deepseek_jax.checkpoint.hf_save import save_hf
from deepseek_jax.config import ModelConfig, RopeScaling
from deepseek_jax.inference.cache import Cache
from deepseek_jax.inference.engine import Completion, Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.model.transformer import ModelOutput, Transformer

__all__ = [
    "Cache",
    "Completion",
    "Engine",
    "ModelConfig",
    "ModelOutput",
    "RopeScaling",
    "SamplingParams",
    "Transformer",
    "load_hf",
    "save_hf",
]

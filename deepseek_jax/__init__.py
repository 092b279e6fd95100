"""DeepSeek in JAX: from pretraining to answers."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.checkpoint.hf_save import save_hf
    from deepseek_jax.checkpoint.model import Model, load, load_hf
    from deepseek_jax.compute import ComputeConfig
    from deepseek_jax.config import ModelConfig, RopeScaling
    from deepseek_jax.inference.answers import Completion
    from deepseek_jax.inference.cache import Cache
    from deepseek_jax.inference.engine import Engine
    from deepseek_jax.inference.events import Event
    from deepseek_jax.inference.sampling import SamplingParams
    from deepseek_jax.inference.serving_config import ServingConfig
    from deepseek_jax.model.transformer import ModelOutput, Transformer

__all__ = [
    "Cache",
    "Completion",
    "ComputeConfig",
    "Engine",
    "Event",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "RopeScaling",
    "SamplingParams",
    "ServingConfig",
    "Transformer",
    "load",
    "load_hf",
    "save_hf",
]

# Imported when first asked for: `deepseek-jax --help` does not wait for jax.
_MODULES = {
    "checkpoint.hf_save": ("save_hf",),
    "checkpoint.model": ("Model", "load", "load_hf"),
    "compute": ("ComputeConfig",),
    "config": ("ModelConfig", "RopeScaling"),
    "inference.answers": ("Completion",),
    "inference.cache": ("Cache",),
    "inference.events": ("Event",),
    "inference.engine": ("Engine",),
    "inference.sampling": ("SamplingParams",),
    "inference.serving_config": ("ServingConfig",),
    "model.transformer": ("ModelOutput", "Transformer"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
